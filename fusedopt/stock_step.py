"""The step as torch's class has it: its for-loop for one parameter whose elements only torch's
operators reach, and its fastest implementation for many ordinary ones."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections import defaultdict
from collections.abc import Iterator, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import formats, modes, tensor_kinds
from .modes import Mode, own_options
from .problem import Problem
from .rule import STEP, Group

if TYPE_CHECKING:
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
    way, optimizer = bucket.way, bucket.members.optimizer
    if way.function is None:
        step: Any = inspect.unwrap(optimizer._stock.step)  # type: ignore[union-attr]
        function = step.__globals__[step.__module__.rpartition(".")[2]]
        names = _parameters(function)
        own = {"foreach": way.mode is Mode.FOREACH, "fused": way.mode is Mode.FUSED}
        own |= {"capturable": bucket.kind.counts_on_device, "differentiable": False}
        own = {name: value for name, value in own.items() if name in names}
        own |= dict.fromkeys(names & {"has_complex"}, False)
        options = _options(names - own.keys(), bucket.record(0).group, optimizer.defaults)
        way.function = functools.partial(function, **options, **own)
    return way.function


def take_together(bucket: Bucket, grads: list[Tensor]) -> None:
    """Steps parameters of one group on a device, with all their state, by its
    ``implementation``."""
    mode, columns, rule = bucket.mode, bucket.columns, bucket.members.rule
    params, device = columns.params, bucket.record(0).param.device
    slots = _slots(bucket)
    counts = kept = columns.state(STEP.name) if rule.counts_steps else []
    numbers = [columns.state(scalar.name) for scalar in rule.scalars if scalar is not STEP]
    if mode is Mode.FUSED:
        torch._C._increment_version([*params, *itertools.chain(*slots)])  # which torch does not
        if counts and counts[0].device != device:
            # Its kernels take the counts from the device; ours stay where they are.
            values = torch.tensor(
                [count.item() for count in counts], dtype=torch.float32, device="cpu"
            )
            counts = [*values.to(device, non_blocking=True).unbind()]
    lists = [params, grads, *slots, *numbers, *([counts] if rule.counts_steps else [])]
    implementation(bucket)(*lists)
    if mode is Mode.FUSED and counts is not kept:
        torch._foreach_add_(kept, 1)


def fused_calls(bucket: Bucket, grads: list[Tensor]) -> list[functools.partial[Any]]:
    """What steps parameters on the CPU by the operator that torch's implementation calls, one C
    function each."""
    way, columns, rule, slots = bucket.way, bucket.columns, bucket.members.rule, _slots(bucket)
    if way.function is None:
        group = bucket.record(0).group
        name = modes.fused_operator(rule, group)
        options = _options(_required(name), group, bucket.members.optimizer.defaults)
        options |= dict.fromkeys(_required(name) & {"is_first_step"}, False)
        way.function = functools.partial(getattr(torch, name), **options)
    counts = [columns.state(STEP.name)] if rule.counts_steps else []
    written = [*columns.params, *itertools.chain(*slots)]
    one = torch.ones((), device="cpu") if counts else None
    return [
        functools.partial(torch._C._increment_version, written),  # torch does not count this
        *(functools.partial(torch._foreach_add_, column, one) for column in counts),
        functools.partial(way.function, columns.params, grads, *slots, *counts),
    ]


def _slots(bucket: Bucket) -> list[list[Tensor]]:
    """The columns of state tensors, empty ones where the group keeps none."""
    columns, keys = bucket.columns, bucket.record(0).keys
    return [columns.state(s.name) if s.name in keys else [] for s in bucket.members.rule.slots]


def _options(names: Set[str], group: Group, defaults: Group) -> dict[str, Any]:
    """Of those names that are options, as torch's functions take them: flags, and numbers."""
    values = {name: group[name] for name in defaults if name in group}
    flags = {name for name, default in defaults.items() if isinstance(default, bool)}
    if "betas" in values:
        values["beta1"], values["beta2"] = values.pop("betas")

    def plain(name: str, value: Any) -> Any:
        if name in flags:
            return bool(value)
        # What is on a device stays there.
        return value if isinstance(value, Tensor) and not value.is_cpu else float(value)

    return {name: plain(name, value) for name, value in values.items() if name in names}


@functools.cache
def _required(operator: str) -> frozenset[str]:
    """The options that an operator must be given."""
    arguments = getattr(torch.ops.aten, operator).default._schema.arguments
    return frozenset(a.name for a in arguments if a.kwarg_only and not a.has_default_value())


@functools.cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
