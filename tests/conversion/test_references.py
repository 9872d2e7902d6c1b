"""What refers to a converted optimizer, schedulers, hooks, scalers, copies, goes on with it."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from cases import RICHEST, RICHEST_OF, TORCH_NAMES, Amp, Case, leaf, richest, snapshot, those_with
from schedulers import FEW
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fusedopt
from conversion import Run, assert_alike, build, class_in, convert, convert_to, drawn, other


@convert_to
@richest
def test_the_object_stays(case, to, backend):
    values, grads = drawn(5)
    run = Run(case, other(to), values).go(grads)
    opt = run.opt
    before, saved = snapshot(opt), opt.state_dict()
    parts = [opt.state, opt.param_groups, opt.defaults, *opt.param_groups]
    tensors = [value for state in opt.state.values() for value in state.values()]
    convert(opt)
    after = [opt.state, opt.param_groups, opt.defaults, *opt.param_groups]
    assert all(a is b for a, b in zip(parts, after, strict=True))
    left = [value for state in opt.state.values() for value in state.values()]
    assert all(a is b for a, b in zip(tensors, left, strict=True))
    assert snapshot(opt) == before
    assert opt.state_dict()["param_groups"] == saved["param_groups"]
    name = opt._zero_grad_profile_name
    assert name == f"Optimizer.zero_grad#{case.name}.zero_grad"


SCHEDULERS = {
    **FEW,
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda at: 0.9**at, lambda at: 0.8**at]),
}


@richest
@convert_to
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=[*SCHEDULERS])
@pytest.mark.parametrize("convert_at", [0, 1, 4])
def test_schedulers_go_on(case, to, schedule, convert_at):
    """And none says that ``optimizer.step()`` was replaced, or called too late."""
    values, grads = drawn(8)
    runs = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for library, when in (("torch", None), (other(to), convert_at)):
            run = Run(case, library, values)
            scheduler = schedule(run.opt)
            for at, now in enumerate(grads):
                if at == when:
                    assert convert(run.opt, scheduler) is run.opt is scheduler.optimizer
                run.go([now])
                scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
            runs.append((run, scheduler))
    (expected, there), (run, here) = runs
    assert_alike(run, expected)
    assert here.get_last_lr() == there.get_last_lr()


@convert_to
def test_a_scheduler_that_is_stepped_too_early_still_warns(to):
    case = RICHEST_OF["SGD"]
    opt = build(case, other(to), [torch.ones(2)])
    scheduler = lr_scheduler.StepLR(opt, 1)
    convert(opt, scheduler)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


@convert_to
def test_schedulers_that_come_after_the_conversion(to):
    opt = build(RICHEST_OF["SGD"], other(to), [torch.ones(2)])
    lr_scheduler.StepLR(opt, 1)
    convert(opt)
    convert(opt)
    wrapped = opt.step
    scheduler = lr_scheduler.ExponentialLR(convert(opt), 0.5)
    opt.param_groups[0]["params"][0].grad = torch.ones(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
        scheduler.step()
    assert opt.step.__wrapped__ is type(opt).step is not wrapped.__wrapped__


@convert_to
def test_schedulers_make_no_cycle(to):
    """A converted optimizer is freed at once, with its state, as torch's are."""
    opt = build(RICHEST_OF["SGD"], other(to), [torch.ones(2)])
    scheduler = lr_scheduler.StepLR(opt, 1)
    alive = weakref.ref(convert(opt, scheduler))
    gc.disable()
    try:
        del opt, scheduler
        assert alive() is None
    finally:
        gc.enable()


@richest
@convert_to
def test_hooks_stay(case, to, backend):
    values, grads = drawn(4)
    run, calls = Run(case, other(to), values), []

    def log(name):
        return lambda *_: calls.append(name)

    opt = run.opt
    if case.table.counts_steps:
        lr_scheduler.StepLR(opt, 1)
    opt.register_step_pre_hook(log("step pre"))
    opt.register_step_post_hook(log("step post"))
    opt.register_state_dict_pre_hook(log("state_dict pre"))
    opt.register_state_dict_post_hook(log("state_dict post"))
    opt.register_load_state_dict_pre_hook(log("load pre"))
    handle = opt.register_load_state_dict_post_hook(log("load post"))
    everywhere = register_optimizer_step_pre_hook(log("all"))
    try:
        for _ in range(2):
            convert(opt)
            run.go(grads[:1])
            assert sorted(calls) == ["all", "step post", "step pre"]
            opt.load_state_dict(opt.state_dict())
            assert calls[3:] == ["state_dict pre", "state_dict post", "load pre", "load post"]
            calls.clear()
        handle.remove()
        opt.load_state_dict(opt.state_dict())
        assert "load post" not in calls
    finally:
        everywhere.remove()


UNUSED_CLASS = """
import sys, torch, fusedopt
to = sys.argv[1]
origin, target = (torch.optim, fusedopt) if to == "fusedopt" else (fusedopt, torch.optim)
for name in sys.argv[2:]:
    p = torch.ones(3, requires_grad=True)
    opt = getattr(origin, name)([p], lr=0.1)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1) if name == "Adam" else None
    (fusedopt.from_torch if to == "fusedopt" else fusedopt.to_torch)(opt)
    assert type(opt) is getattr(target, name)
    p.grad = torch.ones(3)
    opt.step()
    assert calls == ["pre", "post"], (name, calls)
    assert not torch.equal(p, torch.ones(3))
"""


@convert_to
def test_a_class_that_nobody_has_used_yet(to):
    """torch makes ``step`` run hooks when the first optimizer of a class is constructed."""
    command = [sys.executable, "-W", "error", "-c", UNUSED_CLASS, to, *TORCH_NAMES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "case",
    [
        *RICHEST,
        *(
            Case(c.name, {**c.options, "fused": True})
            for c in map(RICHEST_OF.get, those_with("fused"))
        ),
    ],
    ids=str,
)
@convert_to
def test_grad_scaler(case, to, backend):
    """torch's fused classes unscale in the step; the scaler has to know when that changes."""
    runs = []
    for library, converts in (("torch", False), (other(to), True)):
        amp = Amp(functools.partial(build, case, library))
        for kinds in (". u .", "o c .", "a . uo u c"):
            amp.run(kinds)
            if converts:
                convert(amp.opt)
        unscales = "fused" in case.options and type(amp.opt).__module__.startswith("torch")
        assert hasattr(amp.opt, "_step_supports_amp_scaling") == unscales
        runs.append(amp)
    expected, amp = runs
    assert amp.log == expected.log
    for p, q in zip(amp.params, expected.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@richest
@convert_to
def test_between_unscale_and_step(case, to, backend):
    results = []
    for library, converts in (("torch", False), (other(to), True)):
        param = leaf(torch.linspace(1, 2, 5))
        opt, scaler = build(case, library, [param]), torch.amp.GradScaler("cpu", 64.0)
        for at in range(4):
            opt.zero_grad()
            scaler.scale((param**2).sum()).backward()
            if at == 1:
                param.grad[2] = torch.inf
            scaler.unscale_(opt)
            if converts:
                convert(opt)
            scaler.step(opt)
            scaler.update()
        results.append((param, scaler.get_scale()))
    (param, scale), (expected, other_scale) = results
    assert scale == other_scale
    torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6)


@richest
@convert_to
def test_checkpoints_load_in_both_libraries(case, to, backend):
    values, grads = drawn(8)
    expected = Run(case, "torch", values).go(grads)
    run = Run(case, other(to), values).go(grads[:2])
    convert(run.opt)
    run.go(grads[2:4])
    file = io.BytesIO()
    torch.save(run.opt.state_dict(), file)
    for library in ("fusedopt", "torch"):
        file.seek(0)
        resumed = Run(case, library, run.params)
        resumed.opt.load_state_dict(torch.load(file))
        assert_alike(resumed.go(grads[4:]), expected)
    file.seek(0)
    run.opt.load_state_dict(torch.load(file))
    assert_alike(run.go(grads[4:]), expected)


@richest
@convert_to
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["deepcopy", "pickle"],
)
def test_copies_of_a_converted_optimizer(case, to, scheduled, duplicate, backend):
    values, grads = drawn(6)
    expected = Run(case, "torch", values).go(grads)
    run = Run(case, other(to), values).go(grads[:2])
    if scheduled:
        lr_scheduler.ConstantLR(run.opt, 1.0)
        for group in expected.opt.param_groups:
            group["initial_lr"] = group["lr"]
    convert(run.opt)
    run.go(grads[2:4])
    twin = duplicate(run)
    assert type(twin.opt) is class_in(to, case.name) and "step" not in vars(twin.opt)
    assert_alike(twin.go(grads[4:]), expected)
    assert_alike(run.go(grads[4:]), expected)


@richest
def test_what_only_fusedopt_has_can_be_switched_on(case, backend):
    values, grads = drawn(6)
    run = Run(case, "torch", values)
    expected = Run(case, "fusedopt", values)
    fusedopt.from_torch(run.opt)
    assert run.opt.max_grad_norm is None and not run.opt.amp_fused and run.opt.grad_norm is None
    for each in (run, expected):
        each.opt.max_grad_norm = 0.5
        each.opt.param_groups[1]["l1"] = 0.01
        each.opt.amp_fused = True
        each.go(grads)
    assert snapshot(run.opt) == snapshot(expected.opt)
    assert run.opt.grad_norm == expected.opt.grad_norm
