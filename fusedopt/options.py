"""Options of param groups: whether they are what they can be."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import memory, tensor_kinds
from .problem import Problem
from .record import Members, Record
from .rule import STORAGE_OPTIONS, Group, Shared, storage_is_on

_CHOICES: dict[str, tuple[Any, ...]] = {
    "state_dtype": (None, torch.float32, torch.bfloat16, torch.float16, "8bit"),
    "master_weights": (None, "split", "fp32"),
    "rounding": (None, "stochastic"),
}
# Of torch's, they are no numbers, or used by the constructor alone.
_NOT_CHECKED = ("foreach", "fused", "initial_accumulator_value")


def read_shared(name: str, shared: Shared, **switches: bool) -> dict[str, Any]:
    """The options of param groups that are on, of those that torch does not have.

    Raises:
        TypeError: there is no such option.
        ValueError: an option cannot be that.
    """
    for key in shared.keys() - Shared.__annotations__.keys():
        raise TypeError(f"{name}.__init__() got an unexpected keyword argument {key!r}")
    l1 = shared.get("l1", 0)
    if not l1 >= 0.0:
        raise ValueError(f"Invalid l1 value: {l1}")
    check_max_grad_norm(shared.get("max_grad_norm"))
    values: dict[str, Any] = {key: value or None for key, value in switches.items()}
    values["l1"] = l1 or None
    values.update((key, shared.get(key)) for key in STORAGE_OPTIONS)
    return {key: value for key, value in values.items() if value is not None}


def check_max_grad_norm(value: Any) -> None:
    if value is not None and not (isinstance(value, (int, float)) and value >= 0.0):
        raise ValueError(f"Invalid max_grad_norm value: {value}")


def check_storage(group: Group) -> None:
    """Raises ValueError if an option of storage is none of its choices, or does not go with
    another."""
    options = {name: group.get(name) for name in STORAGE_OPTIONS}
    for name, choices in _CHOICES.items():
        if options[name] not in choices:
            known = ", ".join(repr(choice) for choice in choices)
            raise ValueError(f"Invalid {name} value: {options[name]!r}; it can be {known}")
    ema = options["ema"]
    is_number = isinstance(ema, (int, float)) and not isinstance(ema, bool)
    if ema is not None and not (is_number and 0.0 <= ema < 1.0):
        raise ValueError(f"Invalid ema value: {ema!r}; it is a decay in [0, 1)")
    if options["master_weights"] and options["rounding"]:
        raise ValueError(
            "Invalid rounding value: 'stochastic' is for parameters without master_weights"
        )
    if group.get("differentiable") and storage_is_on(group):
        on = [name for name, value in options.items() if value is not None]
        raise ValueError(f"differentiable=True does not go with {', '.join(on)}")


def check_group(members: Members, g: int) -> None:
    """Raises if a number among the options of a group is none, or an option no choice."""
    group, where = members.groups[g], members.describe_group(g)
    try:
        check_storage(group)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    optimizer = members.optimizer
    known = optimizer._torch_options | {*optimizer._own_options}  # a subclass may add others
    for name, default in optimizer.defaults.items():
        numbers = default if isinstance(default, tuple) else (default,)
        if name not in known or name in _NOT_CHECKED:
            continue
        if not all(isinstance(n, (int, float, Tensor)) for n in numbers):
            continue
        if name not in optimizer._torch_options and group.get(name) is None:
            continue  # off
        if (problem := _reading_problem(group.get(name))) is not None:
            raise RuntimeError(f"{where}: {name!r} {problem}")
        try:
            _check_numbers(group[name], default)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise TypeError(
                f"{where}: {name!r} must be a number like {default!r}, got {group.get(name)!r}"
            ) from error


def _check_numbers(values: Any, default: Any) -> None:
    if isinstance(default, bool):
        bool(values)
        return
    if isinstance(default, tuple) and len(values) != len(default):
        raise ValueError(f"{len(values)} values")
    for value in values if isinstance(default, tuple) else (values,):
        if isinstance(value, str):
            raise ValueError("a string")
        if not isinstance(value, Tensor):
            float(value)
        elif value.device.type == "cpu":
            tensor_kinds.check_number(value)


def _reading_problem(option: Any) -> str | None:
    """Why not all of an option can be read. It cannot be printed then, either."""
    values = option if isinstance(option, (tuple, list)) else (option,)
    return next(filter(None, map(memory.reading_problem, values)), None)


# Numbers of a step --------------------------------------------------------------------------------


def check_numbers(record: Record) -> None:
    """Raises a Problem if an option, which may be changed at any time, has no meaning now."""
    group, dtype = _known_numbers(record.group), record.param.dtype
    scalars = _known_scalars(record, group)
    known = scalars or [1.0, *(scalar.initial / 2 for scalar in record.rule.scalars[1:])]
    try:
        numbers = record.rule.numbers(group, *known)
    except (ArithmeticError, RuntimeError) as error:
        raise Problem(type(error), str(error)) from error
    if scalars is None:
        return  # what follows depends on it
    wide = dtype in (torch.float64, torch.complex128)
    largest = torch.finfo(torch.float64 if wide else torch.float32).max
    for name, value in numbers.items():
        if abs(value) > largest and not math.isinf(value):
            raise Problem(
                RuntimeError,
                f"{name} is {value:g}, which {dtype} cannot be multiplied with; the largest is "
                f"{largest:g}",
            )


def _known_scalars(record: Record, group: Group) -> list[float] | None:
    """Those of the next step, see Record.next_scalars; None if only the device knows them."""
    state, rule = record.state if isinstance(record.state, dict) else {}, record.rule
    if not rule.counts_steps:
        return [1.0 if any(state.get(key) is None for key in record.keys) else 2.0]
    count, *others = (_known(state.get(scalar.name), scalar.initial) for scalar in rule.scalars)
    if count is None or None in others:
        return None
    step = count + 1
    return [step, *rule.advance(group, step, *others)]


def _known(scalar: Any, initial: float) -> float | None:
    """A number that the state keeps, or will keep from now on."""
    if scalar is None:
        return initial
    if not memory.is_plain(scalar) or scalar.device.type != "cpu" or scalar.numel() != 1:
        return None
    return tensor_kinds.number(scalar)


def _known_numbers(group: Group) -> Group:
    """The group with its tensors of one element as numbers. One that is on a device, where nobody
    waits for it, is taken for 0.5, a value that every option may have."""

    def known(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(map(known, value))
        if not isinstance(value, Tensor) or value.numel() != 1:
            return value
        can_read = tensor_kinds.is_fake(value) or (value.is_cpu and memory.is_plain(value))
        number = tensor_kinds.number(value) if can_read else None
        return 0.5 if number is None else number

    return {name: known(value) for name, value in group.items() if name != "params"}
