"""Interrupts, signals and failed allocations, anywhere in a step."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest
import seam
import torch
from cases import snapshot
from torch import Tensor
from torch.overrides import TorchFunctionMode

from faults import MODELS, Interrupt, every_situation, run, scaled, step


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
    Tensor.maximum,
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
    *(
        getattr(torch, name)
        for name in dir(torch)
        if name.startswith("_foreach_") and not name.endswith("_")
    ),
}


def chosen(places: Sequence[int]) -> Sequence[int]:
    """Some of them, the last ones always; with FUSEDOPT_FAULTS=all each."""
    if os.environ.get("FUSEDOPT_FAULTS") == "all" or len(places) <= 24:
        return places
    return [*random.sample(places[:-8], 16), *places[-8:]]


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
    places = chosen(range(1, 1 - counted.left))
    unheard = 0
    for at in places:
        opt = twin()
        assert snapshot(opt) == before
        # torch's record_function turns calls of subclasses off for a moment. Python 3.14 can
        # deliver an interrupt between that and what ends it, and they would stay off.
        with torch._C._EnableTorchFunction():
            try:
                with fault(at) as armed:
                    opt.step()
            except error:
                pass
            else:  # a step may be shorter: whether a gradient is copied depends on addresses
                unheard += armed.left <= 0
            assert torch._C._is_torch_function_enabled() or sys.version_info >= (3, 14)
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
    """Entering and leaving swap_ema() divides nothing either, wherever it was tried."""
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
    for at in chosen(range(1, 1 - counted.left)):
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
