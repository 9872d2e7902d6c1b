"""Interrupts, failed allocations, raising hooks, killed processes: after each the optimizer is as
before the step or fully stepped, and the next step is right."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import seam
import torch
from cases import RICHEST_OF, Case, gradient_like, leaf, snapshot
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fusedopt


@pytest.fixture(autouse=True)
def grad_mode():
    """An interrupt in the middle of torch's own context managers leaves gradients switched off."""
    yield
    torch.set_grad_enabled(True)


BF16 = torch.bfloat16


class Interrupt:
    """Raises KeyboardInterrupt at the nth place where CPython delivers one: when a function begins,
    and after C code was called."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __enter__(self) -> Interrupt:
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def __call__(self, frame: Any, event: str, _arg: Any) -> None:
        is_generator = frame.f_code.co_flags & inspect.CO_GENERATOR  # "call" also when it is closed
        if event == "c_return" or (event == "call" and not is_generator):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


class OutOfMemory(TorchFunctionMode):
    """Lets the nth operator fail, before it does anything."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MAKERS:
            self.left -= 1
            if self.left == 0:
                raise MemoryError
        return func(*args, **(kwargs or {}))


# All that the step calls to make tensors; what only looks at them needs no memory.
MAKERS = {
    torch.zeros_like,
    torch.full_like,
    torch.empty_like,
    torch.zeros,
    torch.empty,
    torch.randint,
    torch.stack,
    torch.clone,
    torch.where,
    torch.maximum,
    torch._foreach_copy_,
    Tensor.clone,
    Tensor.to,
    Tensor.copy_,
    Tensor.double,
    Tensor.float,
    Tensor.sqrt,
    Tensor.lerp,
    Tensor.__add__,
    Tensor.__mul__,
    Tensor.__sub__,
    Tensor.__truediv__,
    Tensor.__rmul__,
    Tensor.mul_,
    Tensor.add_,
    Tensor.coalesce,
}


def odd_params() -> list[Tensor]:
    """What the native call takes, what is copied for it, and what takes the Python rule."""
    dense, transposed, gaps, complex_ = (torch.randn(*s) for s in [(7, 9), (5, 3), (6, 8), (4, 2)])
    params = [
        leaf(dense),
        leaf(transposed),
        leaf(torch.randn(3, 2), BF16),
        gaps[:, ::2].requires_grad_(),
        leaf(torch.view_as_complex(complex_)),
        leaf(torch.randn(11)),
    ]
    for param in params:
        param.grad = gradient_like(param.detach())
    params[1].grad = params[1].grad.t().contiguous().t()
    return params


def even_params(dtype: torch.dtype) -> list[Tensor]:
    params = [leaf(torch.randn(*shape), dtype) for shape in [(4100,), (3, 5), (0,), (17,)]]
    for param in params:
        param.grad = gradient_like(param.detach())
    return params


def sparse_params() -> list[Tensor]:
    params = [leaf(torch.randn(8, 3)) for _ in range(3)]
    for param in params:
        param.grad = torch.sparse_coo_tensor([[1, 4]], torch.randn(2, 3), (8, 3))
    params[0].grad = torch.randn(8, 3)
    return params


def scaled(opt: Any) -> None:
    opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(0.0)


def two_groups(case: Case, params: list[Tensor], **more: Any) -> Any:
    return case.ours([{"params": params[:2]}, {"params": params[2:]}], **more)


SGD, ADAM, ADAMW, RMSPROP, ADAGRAD = (
    RICHEST_OF[name] for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad")
)
MODELS: dict[str, Callable[[], Any]] = {
    "adam": lambda: two_groups(ADAM, odd_params()),
    "sgd": lambda: two_groups(SGD, odd_params(), max_grad_norm=1.0),
    "rmsprop": lambda: two_groups(RMSPROP, odd_params(), ema=0.9),
    "adagrad": lambda: two_groups(ADAGRAD, odd_params()),
    "sparse sgd": lambda: SGD.ours(sparse_params(), weight_decay=0, nesterov=False),
    "sparse adagrad": lambda: ADAGRAD.ours(sparse_params(), weight_decay=0),
    "clipped and scaled": lambda: two_groups(
        ADAMW, even_params(torch.float32), max_grad_norm=0.5, amp_fused=True
    ),
    "split masters, 8 bits, ema": lambda: two_groups(
        ADAMW, even_params(BF16), master_weights="split", state_dtype="8bit", ema=0.5
    ),
    "whole masters": lambda: two_groups(
        SGD, even_params(torch.float16), master_weights="fp32", state_dtype=torch.float32
    ),
    "stochastic rounding": lambda: two_groups(
        RMSPROP, even_params(BF16), rounding="stochastic", state_dtype=BF16
    ),
}


def with_amsgrad(opt: Any) -> None:
    for group in opt.param_groups:
        group["amsgrad"] = not group["amsgrad"]


def with_new_group(opt: Any) -> None:
    params = [leaf(torch.randn(6)), leaf(torch.randn(2, 2))]
    for param in params:
        param.grad = torch.randn_like(param)
    opt.add_param_group({"params": params})


def with_moved_tensors(opt: Any) -> None:
    for param, state in opt.state.items():
        param.data = copy.deepcopy(param.data)  # with its strides
        for value in state.values():
            value.data = value.data.clone()


# (model, steps taken before, what is changed then)
SITUATIONS = [
    *((name, 0, None) for name in MODELS),
    *((name, 2, None) for name in MODELS),
    ("adam", 1, with_moved_tensors),
    ("adam", 1, with_new_group),
    ("adagrad", 1, with_new_group),
]
every_situation = pytest.mark.parametrize(
    ("model", "steps", "change"),
    SITUATIONS,
    ids=[f"{m} after {s} {getattr(c, '__name__', '')}".strip() for m, s, c in SITUATIONS],
)


def step(opt: Any) -> None:
    torch.manual_seed(7)  # the seeds of stochastic rounding are drawn at the first step
    if opt.amp_fused:
        scaled(opt)
    opt.step()


def faults(model: str, steps: int, change: Any, fault: Any, error: Any) -> None:
    """Lets a step fail at some of the places where it can, or with FUSEDOPT_FAULTS=all at each."""

    def twin() -> Any:
        opt = copy.deepcopy(origin)
        for _ in range(steps):
            step(opt)
        if change is not None:
            torch.manual_seed(3)
            change(opt)
        torch.manual_seed(7)
        if opt.amp_fused:
            scaled(opt)
        return opt

    origin = MODELS[model]()
    run(twin(), 1)  # what happens once in a process
    reference = twin()
    before = snapshot(reference)
    with fault(0) as counted:
        reference.step()
    after = snapshot(reference)
    step(reference)
    later = snapshot(reference)
    assert before != after != later
    places = range(1, 1 - counted.left)
    if os.environ.get("FUSEDOPT_FAULTS") != "all" and len(places) > 24:
        places = [*random.sample(places[:-8], 16), *places[-8:]]
    unheard = 0
    for at in places:
        opt = twin()
        assert snapshot(opt) == before
        try:
            with fault(at) as armed:
                opt.step()
        except error:
            pass
        else:  # a step may be shorter: whether a gradient is copied depends on addresses
            unheard += armed.left <= 0
        now = snapshot(opt)
        assert now in (before, after), f"torn by a fault at place {at}"
        for _ in range(2 - (now == after)):
            step(opt)
        assert snapshot(opt) == later, f"the step after a fault at place {at}"
    assert unheard <= 0.1 * len(places)  # those within finalizers


@every_situation
def test_an_interrupt_anywhere(model, steps, change, backend):
    faults(model, steps, change, Interrupt, KeyboardInterrupt)


@every_situation
def test_no_memory_for_a_tensor(model, steps, change, backend):
    faults(model, steps, change, OutOfMemory, MemoryError)


def test_interrupts_in_an_average(backend):
    """Entering and leaving swap_ema() divides nothing either."""
    origin = MODELS["split masters, 8 bits, ema"]()
    step(origin)
    expected = snapshot(origin)
    values = [p.detach().clone() for p in origin.ema_parameters()]

    def within(opt: Any) -> None:
        with opt.swap_ema():
            params = [p for group in opt.param_groups for p in group["params"]]
            assert all(torch.equal(p, v.to(p)) for p, v in zip(params, values, strict=True))

    with Interrupt(0) as counted:
        within(copy.deepcopy(origin))
    for at in range(1, 1 - counted.left):
        opt = copy.deepcopy(origin)
        with contextlib.suppress(KeyboardInterrupt), Interrupt(at):
            within(opt)
        assert snapshot(opt) == expected
        opt.step()
        assert snapshot(opt) != expected


# Of real signals --------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers")
@pytest.mark.parametrize("model", ["adam", "sgd", "clipped and scaled", "stochastic rounding"])
def test_signals_at_random_times(model, backend):
    """A timer interrupts a run of steps; what is found is a point of the undisturbed run."""
    origin = MODELS[model]()
    course = [snapshot(origin)]
    reference = copy.deepcopy(origin)
    for _ in range(4):
        step(reference)
        course.append(snapshot(reference))
    started = time.perf_counter()
    run(copy.deepcopy(origin), 4)
    usual = time.perf_counter() - started

    def interrupt(*_: Any) -> None:
        if armed:
            raise KeyboardInterrupt

    armed, found = False, signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(12):
            opt = copy.deepcopy(origin)
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 1.2 * usual))
            try:
                armed = True
                run(opt, 4)
                armed = False
            except KeyboardInterrupt:
                armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            at = course.index(snapshot(opt))
            run(opt, 4 - at)
            assert snapshot(opt) == course[-1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, found)


def run(opt: Any, steps: int) -> None:
    for _ in range(steps):
        step(opt)


@pytest.mark.parametrize("model", ["adam", "split masters, 8 bits, ema"])
def test_a_handler_that_runs_in_the_middle_of_a_step(model, backend):
    """It may save, as on a machine that is about to be taken away, and not step or load."""
    origin = MODELS[model]()
    expected = copy.deepcopy(origin)
    step(expected)

    def handler(_frame: Any, event: str, _arg: Any) -> None:
        if event == "c_return" and seam.is_stepping(opt) and not ran:
            ran.append(event)
            saved = opt.state_dict()
            for call in (
                lambda: seam.step_without_hooks(opt),
                lambda: opt.load_state_dict(saved),
            ):
                with pytest.raises(RuntimeError, match="from within step"):
                    call()

    ran: list[str] = []
    opt = copy.deepcopy(origin)
    sys.setprofile(handler)
    try:
        step(opt)
    finally:
        sys.setprofile(None)
    assert ran
    assert snapshot(opt) == snapshot(expected)


# Code of others ---------------------------------------------------------------------------------


def fail(*_: Any) -> None:
    raise ZeroDivisionError


@every_situation
def test_raising_hooks_and_closures(model, steps, change, backend):
    opt = MODELS[model]()
    run(opt, steps)
    if change is not None:
        change(opt)
    before = snapshot(opt)
    hook = opt.register_step_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        step(opt)
    hook.remove()
    assert snapshot(opt) == before
    with pytest.raises(ZeroDivisionError):
        opt.step(fail)
    assert snapshot(opt) == before
    twin = copy.deepcopy(opt)
    hook = opt.register_step_post_hook(fail)
    with pytest.raises(ZeroDivisionError):
        step(opt)
    hook.remove()
    run(twin, 1)
    assert snapshot(opt) == snapshot(twin)
    run(twin, 1)
    step(opt)
    assert snapshot(opt) == snapshot(twin)


def test_a_raising_scheduler(backend):
    opt = MODELS["clipped and scaled"]()
    twin = copy.deepcopy(opt)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda at: 1.0 if at != 1 else 1 / 0)
    step(opt)
    with pytest.raises(ZeroDivisionError):
        scheduler.step()
    step(opt)
    run(twin, 2)
    assert snapshot(opt)[:2] == snapshot(twin)[:2]


def test_an_interrupted_load(backend):
    opt = MODELS["adam"]()
    run(opt, 1)
    saved = copy.deepcopy(opt.state_dict())
    run(opt, 1)
    before = snapshot(opt)
    with Interrupt(0) as counted:
        copy.deepcopy(opt).load_state_dict(saved)
    loaded = copy.deepcopy(opt)
    loaded.load_state_dict(saved)
    after = snapshot(loaded)
    for at in random.sample(range(1, 1 - counted.left), 20):
        again = copy.deepcopy(opt)
        with contextlib.suppress(KeyboardInterrupt), Interrupt(at):
            again.load_state_dict(saved)
        assert snapshot(again) in (before, after)


# Of the operating system ------------------------------------------------------------------------


def script(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    paths = [str(Path(fusedopt.__file__).parents[1]), str(Path(__file__).parent)]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


LIMITED = """
import copy, resource, sys
import fusedopt, torch
from cases import RICHEST_OF, draw, leaf, snapshot

torch.set_num_threads(1)
if sys.argv[1] == "python":
    fusedopt.backend.native = None
failed = done = 0
for case in [RICHEST_OF["SGD"], RICHEST_OF["Adam"]]:
    values, (grads,) = draw([(200_000,), (3,), (100_000,)] + [(2,)] * 200, 1)
    for steps in (0, 1):
        def twin():
            params = [leaf(v) for v in values]
            for p, g in zip(params, grads):
                p.grad = g
            opt = case.ours(params)
            for _ in range(steps):
                opt.step()
            return opt

        reference = twin()
        before = snapshot(reference)
        reference.step()
        after = snapshot(reference)
        del reference
        opt = twin()
        for more in range(0, 12 << 20, 3 << 17):
            pages = int(open("/proc/self/statm").read().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, -1))
            try:
                opt.step()
                stepped = True
            except (MemoryError, RuntimeError):
                stepped = False
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
            assert snapshot(opt) == (after if stepped else before), (case, steps, more)
            failed += not stepped
            done += stepped
            if stepped:
                break
        else:
            raise AssertionError("never enough memory")
print(failed, done)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("which", ["native", "python"])
def test_a_limit_of_memory(which):
    """Until the address space is enough for the step, it fails and changes nothing."""
    # Without these, the allocator would have what the runs before have freed.
    process = script(LIMITED, which, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0")
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    failed, done = map(int, out.split())
    assert failed > done == 4


SAVING = """
import os, sys
import torch
from torch import nn
import fusedopt

torch.set_num_threads(1)
path, end = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))
optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2)
at = 0
if os.path.exists(path):
    checkpoint = torch.load(path)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    at = checkpoint["at"]
print("ready", flush=True)
while at < end:
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(at))
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()
    at += 1
    with open(path + ".new", "wb") as file:
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "at": at}, file
        )
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".new", path)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_a_process_killed_while_it_saves(tmp_path):
    """docs/schedulers-and-checkpoints.md: the file is the old or the new one, and resuming from it
    gives the bits of a run that nobody disturbed."""
    end = 40
    undisturbed, path = tmp_path / "undisturbed.pt", tmp_path / "checkpoint.pt"
    process = script(SAVING, str(undisturbed), str(end))
    assert process.wait(100) == 0, process.stderr.read()
    killed = 0
    while killed < 3:
        process = script(SAVING, str(path), str(end))
        assert process.stdout.readline() == "ready\n"
        time.sleep(random.uniform(0, 0.04))
        process.kill()
        process.communicate()
        killed += process.returncode != 0
        if path.exists():
            torch.load(path)
        if process.returncode == 0:
            break
    process = script(SAVING, str(path), str(end))
    assert process.wait(100) == 0, process.stderr.read()
    ours, expected = torch.load(path), torch.load(undisturbed)
    assert killed and ours["at"] == expected["at"] == end
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
