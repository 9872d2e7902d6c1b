"""The private parts of fusedopt that tests reach, each through a function of this module alone.

Where fusedopt has a public way, tests take that. What is here may be renamed or replaced together
with what it reaches.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import fusedopt
from fusedopt import (
    chunk_queue,
    formats,
    forms,
    grad_norm,
    known,
    modes,
    optimizer,
    python_step,
    rule,
    scaling,
    state,
    stepper,
    tensor_kinds,
    together,
    unloading,
)
from fusedopt.link import Link

__all__ = ["Link", "formats", "forms", "grad_norm", "modes"]

# Which way a step goes ------------------------------------------------------------------------


@contextlib.contextmanager
def python_steps(opt: Any) -> Iterator[list[tuple[int, int]]]:
    """What takes the Python rule meanwhile: group and index of the parameter, for each time."""
    take, seen = opt._stepper.step_in_python, []

    def record(work: Any) -> Any:
        seen.extend((record.g, record.i) for record in work.records)
        return take(work)

    with mock.patch.object(opt._stepper, "step_in_python", record):
        yield seen


@contextlib.contextmanager
def no_python_steps(opt: Any) -> Iterator[None]:
    """No parameter takes the Python rule meanwhile."""
    error = AssertionError("the Python rule")
    with mock.patch.object(opt._stepper, "step_in_python", side_effect=error):
        yield


@contextlib.contextmanager
def failing_before_the_update(opt: Any, error: type[Exception]) -> Iterator[None]:
    """Steps raise this when all is checked and in place, and the update is what comes next."""
    with mock.patch.object(opt._stepper, "_native_step", side_effect=error):
        with mock.patch.object(opt._stepper, "step_in_python", side_effect=error):
            yield


@contextlib.contextmanager
def new_plans(opt: Any = None) -> Iterator[list[Any]]:
    """The plans that are made meanwhile, by an optimizer or, without one, by any of them and by any
    bucket."""
    of = stepper.Stepper if opt is None else opt._stepper
    make, made = of._make_plan, []

    def record(*args: Any) -> Any:
        made.append(make(*args))
        return made[-1]

    with mock.patch.object(of, "_make_plan", record):
        yield made


@contextlib.contextmanager
def only_by_the_rule() -> Iterator[None]:
    """What is not left to the native module is left to torch's implementations by no means."""
    choose = modes.choose

    def without_torch(of: Any, _: Any, *rest: Any) -> Any:
        return choose(of, None, *rest)

    with mock.patch.object(modes, "choose", without_torch):
        yield


@contextlib.contextmanager
def one_by_one() -> Iterator[None]:
    """It is computed parameter by parameter."""
    with mock.patch.object(modes, "choose", lambda *_: modes.Mode.ALONE):
        yield


@contextlib.contextmanager
def as_on_a_device(part: int) -> Iterator[None]:
    """What is left to torch's operators goes the way of a device without kernels, by the rule, that
    many elements at a time."""

    def kind(**facts: Any) -> Any:
        return modes.Kind(**{**facts, "device": "xpu"})

    with (
        mock.patch.object(known, "Kind", kind),
        mock.patch.object(python_step, "_PART", part),
        only_by_the_rule(),
    ):
        yield


def forget_what_was_checked(opt: Any) -> None:
    """The next step looks at all tensors closely, as the first does."""
    opt._stepper._together = together.Together()


def has_repeated(opt: Any) -> bool:
    """Whether the last step took the list of work of the one before it."""
    return opt._stepper.plan is not None and opt._stepper.plan.has_repeated


def is_settled(opt: Any) -> bool:
    """Whether the next step looks at what it finds with no line of Python for each parameter."""
    return opt._stepper._together.settled is not None


@contextlib.contextmanager
def checks_of(opt: Any) -> Iterator[list[Any]]:
    """The parameters that are checked meanwhile."""
    check, checked = stepper._check, []

    def record(one: Any) -> None:
        checked.append(one.param)
        check(one)

    with mock.patch.object(stepper, "_check", record):
        yield checked


def has_stock(cls: Any) -> bool:
    """Whether torch has a class of the same name."""
    return cls._stock is not None


def has_plan(opt: Any) -> bool:
    """Whether the native side remembers the last step."""
    return opt._stepper.plan is not None


def forget_plan(opt: Any) -> None:
    opt._stepper.plan = None


def number(tensor: torch.Tensor) -> float:
    """The number of a step count, fake or not."""
    return tensor_kinds.number(tensor)


# Whose turn it is -----------------------------------------------------------------------------


def step_without_hooks(opt: Any) -> None:
    inspect.unwrap(type(opt).step)(opt)


def is_stepping(opt: Any) -> bool:
    return opt._turn.is_stepping


def share_turns(opt: Any, other: Any) -> bool:
    """Whether one of them waits for the other's step."""
    return opt._turn is other._turn


def in_turn(opt: Any) -> contextlib.AbstractContextManager[Any]:
    """No other thread steps it meanwhile."""
    return opt._turn.lock


def call_in_next_steps(opt: Any, call: Callable[[], None]) -> None:
    """From the middle of a step, before anything is written."""
    opt._check_can_step = call


# What is kept ---------------------------------------------------------------------------------


@contextlib.contextmanager
def attached_steps(opt: Any) -> Iterator[list[list[torch.Tensor]]]:
    """The parameters of each step that hooks take meanwhile."""
    attached, seen = opt._in_backward, []
    step = attached.step_bucket

    def record(bucket: Any, arrived: Any) -> None:
        seen.append([slot.param for slot in arrived.values()])
        step(bucket, arrived)

    with mock.patch.object(attached, "step_bucket", record):
        yield seen


def make_links(monkeypatch: Any, make: Callable[[torch.device], Any]) -> None:
    """What brings tensors to the host and back, of optimizers that are offloaded from now on."""
    for module in (chunk_queue, unloading):
        monkeypatch.setattr(module, "make_link", make)


def copy_at_most(monkeypatch: Any, size: int) -> None:
    """What leaves for a while goes in copies of so many bytes."""
    monkeypatch.setattr(unloading, "_COPY_BYTES", size)


@contextlib.contextmanager
def idle_worker(opt: Any) -> Iterator[threading.Event]:
    """The thread that steps on the host does nothing meanwhile, or until the event is set, and then
    all it was told to."""
    go_on = threading.Event()
    opt._in_backward._queue._worker.submit(go_on.wait)
    try:
        yield go_on
    finally:
        go_on.set()


def finish_worker(opt: Any) -> None:
    """Waits for what it was told to do, and for nothing else."""
    opt._in_backward._queue._worker.finish()


def measure_another_norm(opt: Any) -> None:
    """In the memory in which that of a step was measured."""
    for clips in (opt._core._clips or {}).values():
        clips.fill_(0.5)


def in_chunks(opt: Any) -> list[list[torch.Tensor]]:
    """The parameters that are offloaded, as they are stepped together."""
    return [[slot.param for slot in chunk.images] for chunk in opt._in_backward._queue.chunks]


@contextlib.contextmanager
def failing_on_the_host(opt: Any, param: torch.Tensor, error: Exception) -> Iterator[None]:
    """Steps of the chunk that a parameter is in raise this in the middle."""
    chunks = opt._in_backward._queue.chunks
    chunk = next(c for c in chunks if any(slot.param is param for slot in c.images))
    with failing_before_the_update(SimpleNamespace(_stepper=chunk.stepper), error):
        yield


@contextlib.contextmanager
def native_threads() -> Iterator[list[int]]:
    """On how many threads native steps run meanwhile."""
    make, seen = stepper.Stepper._make_plan, []

    class Plan:
        def __init__(self, plan: Any) -> None:
            self._plan = plan

        def __getattr__(self, name: str) -> Any:
            return getattr(self._plan, name)

        def step(self, groups: Any, state: Any, threads: int, *rest: Any) -> Any:
            seen.append(threads)
            return self._plan.step(groups, state, threads, *rest)

    with mock.patch.object(stepper.Stepper, "_make_plan", lambda *args: Plan(make(*args))):
        yield seen


def is_attached(opt: Any) -> bool:
    return opt._in_backward is not None


def forget_norm(opt: Any) -> None:
    """The memory that norms are measured in."""
    opt._stepper._norm = grad_norm.GradNorm()


def share_norm(opt: Any, other: Any) -> None:
    """From now on, the second optimizer measures norms in the memory of the first."""
    other._stepper._norm = opt._stepper._norm


def tickets(opt: Any) -> list[torch.Tensor]:
    """By which the blocks of a kernel know the last of them; one tensor for each device."""
    return [*opt._stepper._tickets.values()]


def initial_state_of(cls: type, value: float) -> contextlib.AbstractContextManager[Any]:
    """New state has this number everywhere."""
    return mock.patch.object(
        state, "initial", lambda record, slot: torch.full_like(record.param, value)
    )


def classes() -> dict[str, type]:
    """fusedopt's, as it finds them itself."""
    return optimizer.CLASSES


def rule_of(cls: Any) -> rule.Rule:
    return cls._rule


def shared_options() -> frozenset[str]:
    """Those that all classes have, and torch's do not."""
    return frozenset(rule.Shared.__annotations__)


def own_options(cls: Any) -> frozenset[str]:
    """Those of param groups that torch does not have."""
    return frozenset(cls._own_options)


def torch_options(cls: Any) -> frozenset[str]:
    return frozenset(cls._torch_options)


# The native module ----------------------------------------------------------------------------


def bind(module: Any) -> None:
    """Readies another build of the native module for taking the place of fusedopt's."""
    fusedopt.backend._bind(module)


def use_driver(module: Any, library: str, problem: str = "") -> None:
    """Another library in the place of that with which torch brings NVRTC and the driver; what the
    module knew of GPUs is forgotten."""
    module.use_gpu(library, problem, fusedopt.backend._tell, fusedopt.backend._free_memory)
    forget_gpu_problems()


def gpu_library() -> tuple[str, str]:
    """That with which torch brings NVRTC and the driver, or why there is none."""
    return fusedopt.backend._gpu_library()


@contextlib.contextmanager
def questions_whether_to_skip() -> Iterator[list[Any]]:
    """How often a step asks a device whether it is skipped."""
    skips, asked = scaling.skips, []

    def ask(of_device: Any) -> bool:
        asked.append(of_device)
        return skips(of_device)

    with mock.patch.object(scaling, "skips", ask):
        yield asked


def forget_missing_kernels() -> None:
    """That a device has no kernels is said again."""
    fusedopt.backend.warn_of_missing_kernels.cache_clear()


def missing_kernels(device: torch.device) -> str:
    """Why torch's operators step the parameters of a device."""
    return fusedopt.backend.missing_kernels(device)


def warn_of_missing_kernels(device_type: str) -> None:
    """As the first step on such a device does."""
    problem = missing_kernels(torch.device(device_type))
    fusedopt.backend.warn_of_missing_kernels(device_type, problem)


@contextlib.contextmanager
def without_float64(device_type: str) -> Iterator[None]:
    """Nothing is computed in float64 on such devices."""
    widest = fusedopt.backend.widest_float

    def narrow(device: torch.device) -> torch.dtype:
        return torch.float32 if device.type == device_type else widest(device)

    with mock.patch.object(fusedopt.backend, "widest_float", narrow):
        yield


def widest_float(device: torch.device) -> torch.dtype:
    return fusedopt.backend.widest_float(device)


def moved(number: torch.Tensor, device: torch.device) -> torch.Tensor:
    return fusedopt.backend.moved(number, device)


def forget_gpu_problems() -> None:
    """Whether a GPU can run the kernels is asked again, and said again."""
    fusedopt.backend._problem.cache_clear()
    forget_missing_kernels()
