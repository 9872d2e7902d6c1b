"""The step as torch's class has it: its for-loop for one parameter whose elements only torch's
operators reach, and its fastest implementation for many ordinary ones."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import formats, tensor_kinds
from .modes import Mode, own_options
from .problem import Problem
from .rule import STEP, Group

if TYPE_CHECKING:
    from .later import Later
    from .record import Record
    from .work import Bucket

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


def can_take(record: Record) -> bool:
    """Whether torch's loop does what the group asks for, with the state that there is."""
    entries = record.entries
    if record.members.optimizer._stock is None or own_options(record.rule, record.group):
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
    on = own_options(record.rule, group)
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


def implementation(bucket: Bucket) -> functools.partial[Any]:
    """The function of torch's that steps them, but for its lists of tensors."""
    optimizer, counts_on_device = bucket.members.optimizer, bucket.kind.counts_on_device
    step: Any = inspect.unwrap(optimizer._stock.step)  # type: ignore[union-attr]
    function = step.__globals__[step.__module__.rpartition(".")[2]]
    options = _options(function, bucket.record(0).group, optimizer.defaults, bucket.mode)
    if "capturable" in options:
        options["capturable"] = counts_on_device
    return functools.partial(function, **options)


def take_together(
    bucket: Bucket,
    function: functools.partial[Any],
    grads: list[Tensor],
    part: slice,
    later: Later | None = None,
) -> None:
    """Steps some parameters of one group, with all their state, by its ``implementation``; or
    leaves that to later calls.

    Raises:
        CannotWait: the implementation computes what cannot be left to them.
    """
    record, mode, columns = bucket.record(0), bucket.mode, bucket.columns[part]
    rule, params, device = record.rule, columns.params, record.param.device
    slots = [columns.state(slot.name) if slot.name in record.keys else [] for slot in rule.slots]
    counts = columns.state(STEP.name) if rule.counts_steps else []
    numbers = [columns.state(scalar.name) for scalar in rule.scalars if scalar is not STEP]
    kept = counts
    if mode is Mode.FUSED:
        # torch does not count this.
        written = functools.partial(
            torch._C._increment_version, [*params, *itertools.chain(*slots)]
        )
        written() if later is None else later.calls.append(written)
        if counts and counts[0].device != device:
            # Its kernels take the counts from the device; ours stay where they are.
            values = torch.tensor(
                [count.item() for count in counts], dtype=torch.float32, device="cpu"
            )
            counts = [*values.to(device, non_blocking=True).unbind()]
    elif later is not None and counts:
        counts, *numbers = later.copies(columns, (*rule.scalar_by_name,))
    lists = [params, grads, *slots, *numbers, *([counts] if rule.counts_steps else [])]
    call = functools.partial(function, *lists)
    call() if later is None else later.take(call)
    if mode is Mode.FUSED and counts is not kept:
        torch._foreach_add_(kept, 1)


def _options(function: Any, group: Group, defaults: Group, mode: Mode) -> dict[str, Any]:
    """Those that one of torch's functions takes, as it takes them: flags, and numbers."""
    values = {name: group[name] for name in defaults if name in group}
    flags = {name for name, default in defaults.items() if isinstance(default, bool)}
    if "betas" in values:
        values["beta1"], values["beta2"] = values.pop("betas")

    def plain(name: str, value: Any) -> Any:
        if name in flags:
            return bool(value)
        # What is on a device stays there.
        return value if isinstance(value, Tensor) and not value.is_cpu else float(value)

    options = {"foreach": mode is Mode.FOREACH, "fused": mode is Mode.FUSED}
    options |= {"differentiable": False, "has_complex": False}
    of_group = _parameters(function) - options.keys()
    options |= {name: plain(name, v) for name, v in values.items() if name in of_group}
    return {name: value for name, value in options.items() if name in _parameters(function)}


@functools.cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
