"""Moving over: live optimizers of torch's become fusedopt's and back, and code that names
``torch.optim`` gets fusedopt."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch

from . import checkpoint
from .optimizer import CLASSES, FusedOptimizer
from .rule import STORAGE_OPTIONS


def _ours() -> dict[str, Any]:
    """fusedopt's classes that torch has too, by name."""
    return {name: cls for name, cls in CLASSES.items() if cls._stock is not None}


def _torchs() -> dict[str, Any]:
    """torch's own, whatever is under their names in ``torch.optim`` now."""
    return {name: cls._stock for name, cls in _ours().items()}


def from_torch(optimizer: torch.optim.Optimizer, *schedulers: Any) -> FusedOptimizer:
    """Turn a live optimizer of ``torch.optim`` into fusedopt's, in place.

    The object stays, and with it its state, param groups, hooks, and whatever refers to it:
    schedulers, a ``GradScaler``, a trainer. The next ``step()`` continues the trajectory.

    Args:
        optimizer: of a class of ``torch.optim`` that fusedopt has too, such as ``AdamW``.
        schedulers: learning-rate schedulers, which are checked to be those of this optimizer.

    Returns:
        The same object, now of fusedopt's class.

    Raises:
        TypeError: it is of another class; also of a class derived from one, whose ``step()``
            may be another.
        ValueError: a scheduler belongs to another optimizer, or ``step`` of this object has been
            replaced by other code than a scheduler's.
    """
    _check(optimizer, _torchs(), schedulers)
    steps = _steps_on_host(optimizer)
    _convert(optimizer, _ours())
    for param, step in steps.items():
        optimizer.state[param]["step"] = step
    optimizer.__dict__.pop("_step_supports_amp_scaling", None)  # what amp_fused=True sets
    optimizer._set_defaults()  # type: ignore[attr-defined]
    return optimizer  # type: ignore[return-value]


def to_torch(optimizer: FusedOptimizer, *schedulers: Any) -> torch.optim.Optimizer:
    """Turn a live optimizer of fusedopt's back into ``torch.optim``'s, in place.

    Args:
        optimizer: of one of fusedopt's classes that torch has too.
        schedulers: as for :func:`from_torch`.

    Returns:
        The same object, now of torch's class. State tensors of another dtype than their parameter's
        are cast to it, as torch's ``load_state_dict`` does.

    Raises:
        TypeError: it is of another class.
        ValueError: an option is on that torch does not have, the optimizer is attached to a
            backward, a scheduler belongs to another optimizer, or ``step`` has been replaced.
    """
    _check(optimizer, _ours(), schedulers)
    optimizer._check_can_step("to_torch()")
    extras = optimizer._own_options
    groups = (optimizer.defaults, *optimizer.param_groups)
    # An average with a decay of 0 is on, too.
    off = {name: (None,) if name in STORAGE_OPTIONS else (None, 0) for name in extras}
    on = [name for name in extras if any(group.get(name) not in off[name] for group in groups)]
    on += ["max_grad_norm"] * (optimizer.max_grad_norm is not None)
    on += ["amp_fused"] * optimizer.amp_fused
    if on:
        raise ValueError(
            f"torch.optim.{type(optimizer).__name__} has no {', '.join(on)}; switch that off first"
        )
    if optimizer._in_backward is not None:
        raise ValueError("the optimizer is attached to a backward; detach() it first")
    for record in optimizer._members().all():
        param, entries = record.param, checkpoint.as_stock(record, record.entries)
        for name in record.rule.by_name:
            if isinstance(entries.get(name), torch.Tensor):
                entries[name] = entries[name].to(param.dtype)
        if entries or param in optimizer.state:
            optimizer.state[param] = entries
    _convert(optimizer, _torchs())
    for group in groups:
        for name in extras:
            group.pop(name, None)
    for name in FusedOptimizer.__annotations__:
        optimizer.__dict__.pop(name, None)
    if optimizer.defaults.get("fused"):
        optimizer._step_supports_amp_scaling = True  # as torch's constructors do
    return optimizer


def _check(optimizer: Any, origin: dict[str, Any], schedulers: tuple[Any, ...]) -> None:
    """Raises unless it is of a class of the origin itself, with its step and these schedulers."""
    name = type(optimizer).__name__
    if type(optimizer) is not origin.get(name):
        package = "torch.optim" if origin == _torchs() else "fusedopt"
        raise TypeError(
            f"takes an optimizer of a class of {package}'s itself ({', '.join(origin)}), got a "
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        )
    for scheduler in schedulers:
        if getattr(scheduler, "optimizer", None) is not optimizer:
            raise ValueError(
                f"{type(scheduler).__name__} is a scheduler of another optimizer than the one "
                "given; convert the optimizer that it was made with"
            )
    # A scheduler wraps the step of the class, and nothing else is lost with its wrapper.
    step = vars(optimizer).get("step")
    if step is not None and not (
        hasattr(step, "_wrapped_by_lr_sched") and step.__wrapped__ is type(optimizer).step
    ):
        raise ValueError(
            f"step() of this {name} has been replaced by "
            f"{getattr(step, '__qualname__', step)}; convert the optimizer before that"
        )


def _steps_on_host(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, torch.Tensor]:
    """On the CPU, the step counts that torch has made on a default device which is not that of the
    parameter.

    Raises:
        ValueError: one was made on the meta device, where nothing counts, and then loaded.
    """
    steps = {}
    for g, group in enumerate(optimizer.param_groups):
        on_device = group.get("fused") or group.get("capturable")
        for i, param in enumerate(group["params"]):
            state = optimizer.state.get(param) or {}
            step = state.get("step")
            if not isinstance(step, torch.Tensor) or on_device:
                continue
            if step.device.type == "cpu" or step.device == param.device:
                continue
            if not step.is_meta:
                steps[param] = step.cpu()
                continue
            # torch's step() raises with it. What its constructor made is at its start.
            if not _is_initial(state, group):
                raise ValueError(
                    f"param group {g}, parameter {i}: its step count is on the meta device, "
                    "without data; set state['step'] to the count, as a tensor on the CPU"
                )
            steps[param] = torch.zeros((), dtype=step.dtype, device="cpu")
    return steps


def _is_initial(state: dict[str, Any], group: dict[str, Any]) -> bool:
    """Whether the state is what torch's Adagrad makes before any step."""
    initial, sums = group.get("initial_accumulator_value", 0), state.get("sum")
    if set(state) != {"step", "sum"} or not isinstance(sums, torch.Tensor):
        return False
    value = complex(initial, initial) if sums.is_complex() else initial
    return bool((sums == torch.full_like(sums, value)).all())


def _convert(optimizer: Any, target: dict[str, Any]) -> None:
    optimizer.__class__ = target[type(optimizer).__name__]
    optimizer._patch_step_function()  # runs the hooks of step(); __init__ does it otherwise
    if "step" in vars(optimizer):
        _count_steps_of(optimizer)


def _count_steps_of(optimizer: Any) -> None:
    """What a scheduler does to notice steps, again: it had wrapped the step of the old class."""
    del optimizer.step
    step = type(optimizer).step
    reference = weakref.ref(optimizer)

    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        opt: Any = reference()
        opt._opt_called = True
        return step(opt, *args, **kwargs)

    counted._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = counted


class Patch:
    """What :func:`patch` returns: as a context manager it ends by restoring what it found."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._found = found

    def __enter__(self) -> None:
        patch()

    def __exit__(self, *_: object) -> None:
        _name(self._found)


def patch() -> Patch:
    """Put fusedopt's classes under their names in ``torch.optim``, for code that cannot be
    edited::

        with fusedopt.patch():
            train()  # torch.optim.AdamW(...) makes a fusedopt.AdamW

    Without ``with`` the names stay until :func:`unpatch`. Names that were imported before
    (``from torch.optim import AdamW``) and optimizers that exist are not touched; see
    :func:`from_torch`.

    Raises:
        RuntimeError: a name is not torch's own, because other code has replaced it.
    """
    return Patch(_name(_ours()))


def unpatch() -> None:
    """Put torch's own classes back under their names in ``torch.optim``; nothing to do if they are
    there.

    Raises:
        RuntimeError: other code has replaced a name since :func:`patch`.
    """
    _name(_torchs())


def _name(classes: dict[str, Any]) -> dict[str, Any]:
    """Puts classes under their names in ``torch.optim``; returns those that were there."""
    ours, torchs = _ours(), _torchs()
    found = {name: getattr(torch.optim, name) for name in ours}
    for name, cls in found.items():
        if cls not in (ours[name], torchs[name]):
            raise RuntimeError(
                f"torch.optim.{name} is {cls}: other code has replaced it; undo that first"
            )
    for name, cls in classes.items():
        setattr(torch.optim, name, cls)
    return found
