"""The step of torch's own for-loop, for parameters whose elements only torch's operators reach."""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import formats, tensor_kinds
from .problem import Problem
from .rule import STORAGE_OPTIONS, Group

if TYPE_CHECKING:
    from .record import Record

# Options that reinterpret the bits of memory.
_OF_MEMORY = {"state_dtype": "8bit", "master_weights": "split", "rounding": "stochastic"}


def concerns(param: Tensor, grad: Tensor | None, state: Any) -> bool:
    """Whether torch's operators must do the step: because they are recorded, or a parameter, its
    gradient or its state is no ordinary tensor. (Those of sparse embeddings are: they have an
    update of their own.)"""
    if tensor_kinds.is_unusual(param) or tensor_kinds.is_traced():
        return True
    values = (grad, *state.values()) if isinstance(state, dict) else (grad,)
    for value in values:
        if isinstance(value, Tensor) and tensor_kinds.is_unusual(value):
            if not tensor_kinds.is_coo(value):
                return True
    return False


def own_options(record: Record) -> list[str]:
    """Options that are on and that torch does not compute. (``capturable`` says where steps are
    counted; torch's loop is told that by itself.)"""
    group = record.group
    on = [name for name in ("l1", *record.rule.switches) if group.get(name)]
    on = [name for name in on if name != "capturable"]
    return on + [name for name in STORAGE_OPTIONS if group.get(name) is not None]


def can_take(record: Record) -> bool:
    """Whether torch's loop does what the group asks for, with the state that there is."""
    entries = record.entries
    if record.members.optimizer._stock is None or own_options(record):
        return False
    if any(map(formats.is_code, entries.values())):
        return False
    step = entries.get("step")
    # The loop of most classes reads the count.
    return not tensor_kinds.is_fake(step) or tensor_kinds.number(step) is not None


def check(record: Record) -> None:
    """Raises a Problem if an option that torch does not have cannot work on an unusual
    parameter."""
    held, group = record.held, record.group
    if tensor_kinds.is_virtual(held) or not record.is_unusual:
        return
    on = own_options(record)
    if held.layout is torch.strided and not held.is_nested:
        on = [name for name in on if group[name] == _OF_MEMORY.get(name)]
    if on:
        raise Problem(
            RuntimeError,
            f"{on[0]}={group[on[0]]!r} is not compatible with a parameter "
            f"{tensor_kinds.name(record.param)}; put it into a param group without",
        )


@contextlib.contextmanager
def scaled_grad(param: Tensor, factor: Tensor | None) -> Iterator[None]:
    """While the gradient of a parameter is the product with a factor."""
    grad = param.grad
    # A number where there is one: not every class multiplies with ordinary tensors.
    scale: Tensor | float | None = factor
    if factor is not None and not tensor_kinds.is_unusual(factor):
        scale = tensor_kinds.number(factor)
    if grad is None or scale is None or scale is not factor and scale == 1.0:
        yield
        return
    try:
        param.grad = grad * scale
        yield
    finally:
        param.grad = grad


def take(record: Record) -> None:
    """Steps one parameter from its ``grad``, as torch's class with ``foreach=False`` and
    ``fused=False`` does; creates the state that it lacks."""
    optimizer, group, param, state = (
        record.members.optimizer,
        record.group,
        record.param,
        record.entries,
    )
    stock: Any = optimizer._stock
    one: Any = object.__new__(stock)
    one.__dict__.update(
        defaults=optimizer.defaults,
        state=defaultdict(dict, {param: state}),
        param_groups=[
            {
                **with_numbers(group, param),
                "params": [param],
                "foreach": False,
                "fused": False,
                "capturable": bool(group.get("capturable")) and param.device.type != "cpu",
            }
        ],
    )
    inspect.unwrap(stock.step)(one)  # without the hooks, which belong to the whole step


def with_numbers(group: Group, param: Tensor) -> Group:
    """The options for a fake parameter, which goes with no other tensors: numbers in place of those
    that know theirs."""
    if not tensor_kinds.is_fake(param):
        return group

    def known(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(known, value))
        if not isinstance(value, Tensor) or value.numel() != 1:
            return value
        number = tensor_kinds.number(value)
        return value if number is None else number

    return {name: known(value) for name, value in group.items() if name != "params"}
