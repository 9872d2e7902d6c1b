"""Moving over: a live optimizer changes its library, and nothing else."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import pickle
import subprocess
import sys
import types
import warnings
import weakref

import pytest
import torch
from cases import (
    CASES,
    EXTRAS,
    RICHEST,
    RICHEST_OF,
    TORCH_NAMES,
    Amp,
    Case,
    bits,
    draw,
    every_torch_name,
    leaf,
    richest,
    snapshot,
    step_through,
    those_with,
)
from conftest import skip_or_fail
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fusedopt

convert_to = pytest.mark.parametrize("to", ["fusedopt", "torch"])

DOUBLE = functools.partial(torch.tensor, dtype=torch.float64)
SWITCHES = [{"foreach": True}, {"fused": True}, {"fused": False}, {"maximize": True}]


def accepts(name, option):
    return option in inspect.signature(getattr(torch.optim, name)).parameters


VARIANTS = [
    # A float32 lr would be the precision of the whole step.
    *(
        case
        for case in CASES
        if case.name in TORCH_NAMES and not any(map(torch.is_tensor, case.options.values()))
    ),
    *(
        Case(case.name, {**case.options, **switch})
        for case in RICHEST
        for switch in (*SWITCHES, {"differentiable": True, "foreach": None})
        if all(accepts(case.name, option) for option in switch)
    ),
    *(Case(case.name, {**case.options, "lr": DOUBLE(0.05)}) for case in RICHEST),
    Case("Adam", {"lr": DOUBLE(0.05), "betas": (DOUBLE(0.8), DOUBLE(0.95))}),
    Case("SGD", {"lr": DOUBLE([0.05]), "momentum": 0.9, "weight_decay": DOUBLE(0.1)}),
]
VARIANTS = [case for case in VARIANTS if not set(case.options) & set(EXTRAS)]
every_variant = pytest.mark.parametrize("case", VARIANTS, ids=str)


def stock(case, params):
    """As users build it: torch chooses among its implementations."""
    return getattr(torch.optim, case.name)(params, **copy.deepcopy(case.options))


def build(case, library, params):
    return case.ours(params) if library == "fusedopt" else stock(case, params)


def convert(opt, *schedulers):
    """To the other library."""
    ours = type(opt).__module__.startswith("fusedopt")
    return (fusedopt.to_torch if ours else fusedopt.from_torch)(opt, *schedulers)


def other(library):
    return "torch" if library == "fusedopt" else "fusedopt"


def class_in(library, name):
    return getattr(fusedopt if library == "fusedopt" else torch.optim, name)


class Run:
    """Two groups of float64 tensors that are stepped through given gradients."""

    def __init__(self, case, library, values):
        self.params = [v.clone() for v in values]
        groups = [{"params": self.params[:1]}, {"params": self.params[1:], "weight_decay": 0.01}]
        self.opt = build(case, library, groups)

    def go(self, grads):
        with torch.no_grad():
            step_through(self.opt, self.params, grads)
        return self


def drawn(steps, dtype=torch.float64, case=None):
    """Values, and gradients: the second tensor has none at first, the third none in between."""
    values, grads = draw([(3, 4), (7,), ()], steps, dtype)
    for at, now in enumerate(grads):
        now[1] = now[1] if at >= 3 or fails_on_late_gradients(case) else None
        now[2] = now[2] if at % 2 == 0 else None
    return values, grads


def fails_on_late_gradients(case):
    """torch 2.13: ``TypeError: expected Tensor as element 0 in argument 2, but got NoneType``."""
    return case is not None and case.name == "SGD" and case.options.get("fused")


def assert_alike(run, expected):
    """Parameters, state and options, to the roundings of a few steps in float64. torch's Adam takes
    the count of a differentiable step in float32, fusedopt's does not."""
    in_float32 = run.opt.defaults["differentiable"] and "betas" in run.opt.defaults
    near = 1e-5 if in_float32 else 1e-12
    close = functools.partial(torch.testing.assert_close, rtol=near, atol=near)
    close(run.params, expected.params)
    for p, q in zip(run.params, expected.params, strict=True):
        assert (p in run.opt.state) == (q in expected.opt.state)
        here, there = run.opt.state.get(p, {}), expected.opt.state.get(q, {})
        assert here.keys() == there.keys()
        for key, value in there.items():
            close(here[key], value, msg=lambda m, key=key: f"{key}: {m}")
    for here, there in zip(run.opt.param_groups, expected.opt.param_groups, strict=True):
        assert here.keys() == there.keys()
        for key in there.keys() - {"params"}:
            assert here[key] == there[key], key


# The trajectory -------------------------------------------------------------------------------


@every_variant
@convert_to
def test_in_the_middle_of_training(case, to, backend):
    """Against the run of stock that was never converted."""
    values, grads = drawn(8, case=case)
    expected = Run(case, "torch", values).go(grads)
    run = Run(case, other(to), values).go(grads[:4])
    assert convert(run.opt) is run.opt
    assert type(run.opt) is class_in(to, case.name)
    assert_alike(run.go(grads[4:]), expected)


@every_variant
def test_to_and_fro(case, backend):
    """Before the first step, and after each."""
    values, grads = drawn(8, case=case)
    expected = Run(case, "torch", values).go(grads)
    run = Run(case, "torch", values)
    kept = vars(run.opt).keys()
    for now in grads:
        convert(run.opt)
        run.go([now])
    assert type(run.opt) is class_in("torch", case.name)
    assert_alike(run, expected)
    assert vars(run.opt).keys() == kept
    assert repr(run.opt) == repr(expected.opt)


@every_variant
def test_to_torch_is_what_torch_makes(case):
    run, expected = (
        Run(case, library, [torch.ones(2), torch.ones(3)]) for library in ("fusedopt", "torch")
    )
    opt = fusedopt.to_torch(run.opt)
    # Of fused optimizers, which look for it in this way: getattr(..., True).
    optional = {"_need_device_dtype_check_for_fused"}
    assert vars(opt).keys() - optional == vars(expected.opt).keys() - optional
    assert opt.defaults == expected.opt.defaults and [*opt.defaults] == [*expected.opt.defaults]
    assert repr(opt) == repr(expected.opt)
    assert [[*group] for group in opt.param_groups] == [
        [*group] for group in expected.opt.param_groups
    ]
    flag = "_step_supports_amp_scaling"
    assert getattr(opt, flag, None) == getattr(expected.opt, flag, None)


@pytest.mark.parametrize("name", [n for n in those_with("capturable") if n in TORCH_NAMES])
@convert_to
def test_capturable(name, to):
    """Can be made on a CPU, and not be stepped there by either library."""
    case = Case(name, {"capturable": True})
    run = Run(case, other(to), [torch.ones(3), torch.ones(2)])
    opt = convert(run.opt)
    assert all(group["capturable"] for group in (opt.defaults, *opt.param_groups))
    with pytest.raises((RuntimeError, AssertionError), match="capturable"):
        run.go([[torch.ones(3), torch.ones(2)]])


@convert_to
@richest
def test_complex_parameters(case, to, backend):
    values, grads = drawn(6, torch.complex128)
    expected = Run(case, "torch", values).go(grads)
    run = Run(case, other(to), values).go(grads[:3])
    convert(run.opt)
    assert_alike(run.go(grads[3:]), expected)


@pytest.mark.parametrize(
    "case",
    [Case("SGD", {"lr": 0.1}), Case("SGD", {"lr": 0.1, "momentum": 0.9}), Case("Adagrad", {})],
    ids=str,
)
@convert_to
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients(case, to, backend):
    """The momentum buffer of stock is then sparse, too."""
    embedding = nn.Embedding(7, 3, sparse=True).double()
    runs = []
    for library, convert_at in (("torch", None), (other(to), 3)):
        module = copy.deepcopy(embedding)
        opt = build(case, library, module.parameters())
        for at in range(6):
            if at == convert_at:
                convert(opt)
            opt.zero_grad()
            module(torch.arange(at, at + 4) % 7).square().sum().backward()
            opt.step()
        runs.append((module.weight, opt.state[module.weight]))
    (weight, state), (other_weight, other_state) = runs
    assert state.keys() == other_state.keys()
    for value, expected in [(weight, other_weight), *((state[k], other_state[k]) for k in state)]:
        value, expected = (t.to_dense() if t.is_sparse else t for t in (value, expected))
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@richest
def test_low_precision_moments_of_torch(case, backend):
    """Moments that fusedopt keeps in float32, torch could not go on with."""
    values, grads = draw([(3, 4)], 3, torch.float64)
    _, wide = (None, stock(case, params := [v.float() for v in values]))
    step_through(wide, params, grads)
    params = [v.bfloat16() for v in values]
    opt, expected = case.ours(params), stock(case, [v.bfloat16() for v in values])
    for each in (opt, expected):
        each.load_state_dict(copy.deepcopy(wide.state_dict()))
    assert fusedopt.to_torch(opt) is opt
    assert snapshot(opt) == snapshot(expected)
    for each in (opt, expected):
        step_through(each, each.param_groups[0]["params"], grads)
    assert snapshot(opt) == snapshot(expected)


# What refers to the optimizer -----------------------------------------------------------------


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
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda at: 0.9**at, lambda at: 0.8**at]),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, 0.1, 9, cycle_momentum="lr_decay" not in o.defaults
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.1, 2, cycle_momentum="lr_decay" not in o.defaults
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.CosineAnnealingLR(o, 5)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
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


# Errors leave the object as it was ------------------------------------------------------------


def everything(opt):
    """Class, attributes, what is in them, and every tensor bit for bit."""
    attributes = vars(opt)
    return (
        type(opt),
        {name: id(value) for name, value in attributes.items()},
        {name: repr(value) for name, value in attributes.items()},
        [id(value) for state in opt.state.values() for value in state.values()],
        snapshot(opt),
    )


def assert_refused(conversion, opt, *schedulers, error, match):
    before = everything(opt)
    with pytest.raises(error, match=match):
        conversion(opt, *schedulers)
    assert everything(opt) == before


@every_torch_name
def test_of_the_wrong_class(name):
    ours, theirs = (class_in(library, name) for library in ("fusedopt", "torch"))

    class Ours(ours):
        pass

    class Theirs(theirs):
        pass

    Theirs.__name__ = Ours.__name__ = name
    for conversion, classes, package in [
        (fusedopt.from_torch, (ours, Ours, Theirs, torch.optim.ASGD), r"torch\.optim"),
        (fusedopt.to_torch, (theirs, Ours, Theirs, torch.optim.ASGD), "fusedopt"),
    ]:
        for cls in classes:
            opt = cls([param := leaf(torch.ones(3))])
            lr_scheduler.StepLR(opt, 1)
            param.grad = torch.ones(3)
            opt.step()
            match = (
                f"takes an optimizer of a class of {package}'s itself .*got a .*{cls.__qualname__}"
            )
            assert_refused(conversion, opt, error=TypeError, match=match)
        for nonsense in (None, "AdamW", ours, theirs, nn.Linear(1, 1), {"state": {}}):
            with pytest.raises(TypeError, match="takes an optimizer"):
                conversion(nonsense)


def test_twice():
    opt = fusedopt.from_torch(torch.optim.Adam([leaf(torch.ones(3))]))
    assert_refused(fusedopt.from_torch, opt, error=TypeError, match=r"got a fusedopt\.adam\.Adam$")
    fusedopt.to_torch(opt)
    assert_refused(fusedopt.to_torch, opt, error=TypeError, match=r"got a torch\.optim\.adam\.Adam")


def replaced(opt):
    opt.step = lambda closure=None: None


def replaced_below_a_scheduler(opt):
    """What the scheduler wraps is not the step of the class."""
    opt.step = types.MethodType(lambda self, closure=None: None, opt)
    lr_scheduler.StepLR(opt, 1)


def replaced_above_a_scheduler(opt):
    """``functools.wraps`` copies the mark of the scheduler, too."""
    lr_scheduler.StepLR(opt, 1)
    opt.step = functools.wraps(opt.step)(lambda *args: None)


@convert_to
@every_torch_name
@pytest.mark.parametrize(
    "replace", [replaced, replaced_below_a_scheduler, replaced_above_a_scheduler]
)
def test_a_step_that_was_replaced(name, to, replace):
    opt = build(Case(name, {}), other(to), [leaf(torch.ones(3))])
    replace(opt)
    match = rf"step\(\) of this {name} has been replaced by .*; convert the optimizer before"
    assert_refused(convert, opt, error=ValueError, match=match)


@convert_to
def test_schedulers_of_others(to):
    opt, another = (build(RICHEST_OF["SGD"], other(to), [leaf(torch.ones(3))]) for _ in range(2))
    mine, foreign = (lr_scheduler.StepLR(each, 1) for each in (opt, another))
    plateau = lr_scheduler.ReduceLROnPlateau(another)
    for schedulers, name in [
        ((foreign,), "StepLR"),
        ((mine, plateau), "ReduceLROnPlateau"),
        ((None,), "NoneType"),
        ((opt,), "SGD"),
    ]:
        match = f"{name} is a scheduler of another optimizer"
        assert_refused(convert, opt, *schedulers, error=ValueError, match=match)
    assert convert(opt, mine) is opt


TORCH_LACKS = [
    *((name, {"l1": 0.1}) for name in TORCH_NAMES),
    *((name, {"max_grad_norm": 1.0}) for name in TORCH_NAMES),
    *((name, {"max_grad_norm": 0.0}) for name in TORCH_NAMES),
    *((name, {"amp_fused": True}) for name in TORCH_NAMES),
    ("RMSprop", {"eps_inside_sqrt": True}),
    ("SGD", {"capturable": True}),
    ("Adagrad", {"capturable": True}),
    ("Adagrad", {"l1": 0.1, "capturable": True, "max_grad_norm": 1.0, "amp_fused": True}),
]


@pytest.mark.parametrize(("name", "options"), TORCH_LACKS, ids=str)
def test_options_that_torch_lacks(name, options):
    opt = getattr(fusedopt, name)([leaf(torch.ones(3))], **options)
    match = rf"torch.optim.{name} has no {', '.join(options)}; switch that off first"
    assert_refused(fusedopt.to_torch, opt, error=ValueError, match=match)
    for group in (opt.defaults, *opt.param_groups):
        group.update({key: False for key in options if key in group})
    opt.max_grad_norm, opt.amp_fused = None, False
    expected = getattr(torch.optim, name)([leaf(torch.ones(3))])
    assert repr(fusedopt.to_torch(opt)) == repr(expected)
    assert vars(opt).keys() == vars(expected).keys() and opt.defaults == expected.defaults


def test_an_option_of_one_group():
    params = [leaf(torch.ones(1)), leaf(torch.ones(1))]
    opt = fusedopt.AdamW([{"params": params[0]}, {"params": params[1], "l1": 0.1}])
    assert_refused(fusedopt.to_torch, opt, error=ValueError, match="has no l1;")


def test_an_attached_optimizer():
    opt = fusedopt.attach([leaf(torch.ones(3))], fusedopt.AdamW)
    match = r"attached to a backward; detach\(\)"
    assert_refused(fusedopt.to_torch, opt, error=ValueError, match=match)
    fusedopt.detach(opt)
    assert type(fusedopt.to_torch(opt)) is torch.optim.AdamW


# patch() --------------------------------------------------------------------------------------

STOCK = {name: getattr(torch.optim, name) for name in TORCH_NAMES}
OURS = {name: getattr(fusedopt, name) for name in TORCH_NAMES}


def names():
    return {name: getattr(torch.optim, name) for name in TORCH_NAMES}


@pytest.fixture(autouse=True)
def restored():
    yield
    for name, cls in STOCK.items():
        setattr(torch.optim, name, cls)


def test_patch_and_unpatch():
    fusedopt.unpatch()
    assert names() == STOCK
    for _ in range(2):
        fusedopt.patch()
        assert names() == OURS
    for _ in range(2):
        fusedopt.unpatch()
        assert names() == STOCK


def test_patch_nests():
    with fusedopt.patch():
        with fusedopt.patch():
            assert names() == OURS
        assert names() == OURS
        with pytest.raises(ZeroDivisionError), fusedopt.patch():
            raise ZeroDivisionError
        assert names() == OURS
    assert names() == STOCK
    fusedopt.patch()
    with fusedopt.patch():
        pass
    assert names() == OURS
    fusedopt.unpatch()


def test_patch_ends_with_an_exception():
    with pytest.raises(ZeroDivisionError), fusedopt.patch():
        assert names() == OURS
        raise ZeroDivisionError
    assert names() == STOCK


def test_patch_again():
    patched = fusedopt.patch()
    fusedopt.unpatch()
    for _ in range(2):
        with patched:
            assert names() == OURS
        assert names() == STOCK
    with fusedopt.patch():
        fusedopt.unpatch()
        assert names() == STOCK
    assert names() == STOCK


def test_patch_restores_what_it_found():
    """Also a name that somebody had set by hand."""
    torch.optim.AdamW = fusedopt.AdamW
    with fusedopt.patch():
        assert names() == OURS
    assert names() == {**STOCK, "AdamW": fusedopt.AdamW}
    fusedopt.unpatch()
    assert names() == STOCK


@pytest.mark.parametrize(
    "foreign",
    [type("Mine", (STOCK["AdamW"],), {}), functools.partial(STOCK["AdamW"], lr=0.1), None],
    ids=["class", "partial", "None"],
)
@pytest.mark.parametrize("name", ["Adam", "Adagrad", "RMSprop"])
def test_names_that_other_code_has_replaced(foreign, name):
    for change in (fusedopt.patch, fusedopt.unpatch):
        before = {**names(), name: foreign}
        setattr(torch.optim, name, foreign)
        with pytest.raises(RuntimeError, match=rf"torch.optim.{name} is .*other code has replaced"):
            change()
        assert names() == before
        setattr(torch.optim, name, STOCK[name])
        fusedopt.patch()
    with pytest.raises(RuntimeError, match="other code has replaced"), fusedopt.patch():
        setattr(torch.optim, name, foreign)
    assert names() == {**OURS, name: foreign}


@every_torch_name
def test_construction_while_patched(name, backend):
    """With positional arguments, as other code writes it."""
    signature = inspect.signature(STOCK[name].__init__).parameters.values()
    defaults = [p.default for p in signature if p.kind is p.POSITIONAL_OR_KEYWORD][2:]
    values, grads = draw([(3,), (4, 5)], 3)
    with fusedopt.patch():
        params = [v.clone() for v in values]
        opt = getattr(torch.optim, name)(params, 0.05, *defaults[1:])
        step_through(opt, params, grads)
    assert type(opt) is getattr(fusedopt, name)
    params = [v.clone() for v in values]
    expected = getattr(fusedopt, name)(params, lr=0.05)
    step_through(expected, params, grads)
    assert snapshot(opt) == snapshot(expected)


@every_torch_name
def test_stock_optimizers_while_patched(name, backend):
    values, grads = drawn(6)
    case = RICHEST_OF[name]
    expected = Run(case, "torch", values).go(grads)
    run = Run(case, "torch", values).go(grads[:2])
    with fusedopt.patch():
        run.go(grads[2:3])
        twins = [copy.deepcopy(run), pickle.loads(pickle.dumps(run))]
        pickled = pickle.dumps(run)
        assert isinstance(run.opt, torch.optim.Optimizer)
        assert not isinstance(run.opt, getattr(torch.optim, name))
    for twin in (run, *twins, pickle.loads(pickled)):
        assert type(twin.opt) is STOCK[name]
        assert_alike(twin.go(grads[3:]), expected)
        with fusedopt.patch():
            assert type(fusedopt.from_torch(twin.opt)) is OURS[name]
            assert type(fusedopt.to_torch(twin.opt)) is STOCK[name]


@every_torch_name
def test_what_is_made_while_patched_outlives_it(name, backend):
    values, grads = drawn(4)
    case = RICHEST_OF[name]
    expected = Run(case, "fusedopt", values).go(grads)
    with fusedopt.patch():
        run = Run(case, "torch", values).go(grads[:2])
        pickled = pickle.dumps(run)
    for twin in (run, pickle.loads(pickled)):
        assert type(twin.opt) is OURS[name]
        assert snapshot(twin.go(grads[2:]).opt) == snapshot(expected.opt)


@every_torch_name
def test_classes_that_inherit_while_patched(name, backend):
    with fusedopt.patch():

        class Theirs(getattr(torch.optim, name)):
            def __init__(self, params, lr):
                super().__init__(params, lr)

            def step(self, closure=None):
                self.steps = getattr(self, "steps", 0) + 1
                return super().step(closure)

    values, grads = draw([(3,)], 2)
    params = [v.clone() for v in values]
    opt = Theirs(params, 0.05)
    step_through(opt, params, grads)
    assert isinstance(opt, getattr(fusedopt, name)) and opt.steps == 2
    twins = [v.clone() for v in values]
    step_through(getattr(fusedopt, name)(twins, lr=0.05), twins, grads)
    assert bits(params[0]) == bits(twins[0])


def test_schedulers_and_checkpoints_while_patched(backend):
    """torch's own code asks for its base class only."""
    values, grads = drawn(6)
    case = RICHEST_OF["AdamW"]
    expected = Run(case, "torch", values)
    schedule = lr_scheduler.StepLR(expected.opt, 2, 0.5)
    with fusedopt.patch():
        run = Run(case, "torch", values)
        scheduler = lr_scheduler.StepLR(run.opt, 2, 0.5)
        for at, now in enumerate(grads):
            run.go([now])
            scheduler.step()
            expected.go([now])
            schedule.step()
            if at == 2:
                run.opt.load_state_dict(copy.deepcopy(expected.opt.state_dict()))
    assert_alike(run, expected)


def test_transformers_trainer(tmp_path):
    """The Trainer makes its optimizer itself."""
    try:
        import accelerate  # noqa: F401
        import transformers
    except ImportError as error:
        skip_or_fail(f"{error}; pip install 'fusedopt[interop]'")

    def trainer(optim):
        arguments = transformers.TrainingArguments(
            str(tmp_path), optim=optim, use_cpu=True, report_to=[], learning_rate=0.01
        )
        torch.manual_seed(0)
        return transformers.Trainer(nn.Linear(3, 2), arguments)

    for optim, name in [
        ("adamw_torch", "AdamW"),
        ("adamw_torch_fused", "AdamW"),
        ("sgd", "SGD"),
        ("rmsprop", "RMSprop"),
        ("adagrad", "Adagrad"),
    ]:
        with fusedopt.patch():
            opt = trainer(optim).create_optimizer()
        expected = trainer(optim).create_optimizer()
        assert type(opt) is OURS[name] and type(expected) is STOCK[name]
        assert snapshot(opt) == snapshot(expected)
