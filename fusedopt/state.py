"""The state that a step needs: what is missing of it, and making that."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import dtensor, formats, stock_step, tensor_kinds
from .record import Members, Record
from .rule import STEP, Scalar, Slot


def missing(record: Record) -> list[str]:
    """Keys that the next step of a parameter needs and does not find as its group declares them. A
    step count that its dtype cannot continue is missing, too."""
    rule, entries = record.rule, record.state or {}
    if record.is_lazy:  # of what shape it will be is not known yet
        return [*rule.scalar_by_name, *record.keys]
    if rule.first_step_fills_state and record.has_sparse_grad:
        return [key for key in record.keys if entries.get(key) is None]
    keys = [scalar.name for scalar in rule.scalars if not _can_go_on(record, scalar)]
    keys += [slot.name for slot in record.slots if not _is_stored(record, slot)]
    return keys + [key for key in record.extras.names if entries.get(key) is None]


def complete(record: Record) -> None:
    """Creates the state that a parameter lacks: all of it at its first step, or what an option
    needs that was switched on later (amsgrad, momentum, centered)."""
    keys = missing(record)
    created = record.members.created
    if not keys or record.param in created:  # listed twice
        return
    if (mode := tensor_kinds.inactive_mode(record.param)) is not None:
        with mode:
            return complete(record)
    entries = created[record.param] = record.copied_entries()
    if _is_made_by_update(record):
        return
    scalars = record.rule.scalar_by_name
    with record.explained():
        for key in keys:
            if key in scalars:
                entries[key] = _continued(record, scalars[key], entries.get(key))
            elif key in record.extras:
                entries[key] = _new_extra(key, record)
            else:
                slot = record.rule.by_name[key]
                has_value = entries.get(key) is not None
                store(record, slot, record.value_of(key) if has_value else initial(record, slot))


def initial(record: Record, slot: Slot) -> Tensor:
    """The value of a state tensor before the first step."""
    return slot.initial(record.param, record.group, record.members.optimizer.defaults)


def store(record: Record, slot: Slot, value: Tensor) -> None:
    """Puts numbers into the state, in the layout of the parameter, as the group declares."""
    key, entries, dtype = slot.name, record.entries, record.declared(slot)
    entries.pop(f"{key}_scale", None)
    dense = value
    if not record.is_unusual:
        dense = torch.empty_like(
            record.param, dtype=value.dtype, memory_format=torch.preserve_format
        ).copy_(value)
    if dtype is None or dtype.is_floating_point:
        entries[key] = dense if dtype is None else dense.to(dtype)
    else:
        codes = formats.encode(dense, dtype, 0, record.keys.index(key))
        entries[key], entries[f"{key}_scale"] = codes


def match_layout(record: Record) -> None:
    """Gives state tensors the strides of their parameter, which may have moved to another memory
    format since they were made. Values and identity stay."""
    param, (master, _, ema) = record.held, record.extras
    for key in filter(None, (*record.keys, master, ema)):
        value = dtensor.local(record.entries.get(key))
        if (
            type(value) is Tensor
            and value.layout is param.layout is torch.strided
            and not param.is_nested
            and not value.is_nested
            and value.stride() != param.stride()
            and value.device == param.device
        ):
            copy = torch.empty_like(param, dtype=value.dtype, memory_format=torch.preserve_format)
            if copy.stride() == param.stride():
                value.data = copy.copy_(value)


def move(record: Record, device: torch.device) -> None:
    """Brings the tensors of a parameter to a device; the numbers of its rule to none but the CPU,
    where they are unless an option says otherwise."""
    for key, value in record.entries.items():
        is_number = key in record.rule.scalar_by_name
        if isinstance(value, Tensor) and not (is_number and device.type != "cpu"):
            held = dtensor.local(value)
            if held.device != device:
                record.entries[key] = dtensor.with_local(value, held.to(device))


def new_scalar(record: Record, scalar: Scalar) -> Tensor:
    """A number of a parameter that no step has updated."""
    fused = record.group.get("fused")
    double = torch.get_default_dtype() == torch.float64 and not fused
    # torch.full would make one that does not know its value in FakeTensorMode.
    return torch.tensor(
        scalar.initial,
        dtype=torch.float64 if double else torch.float32,
        device=record.param.device if fused or record.counts_on_device else "cpu",
    )


def _continued(record: Record, scalar: Scalar, value: Tensor | None) -> Tensor:
    """The same number, where and as it can go on."""
    if value is None:
        return new_scalar(record, scalar)
    if tensor_kinds.is_fake(record.param) and not tensor_kinds.is_fake(value):
        number = tensor_kinds.number(value)
        return torch.tensor(number, dtype=value.dtype, device=value.device)
    if record.counts_on_device:
        return value.to(dtype=torch.float32, device=record.param.device)
    if scalar is not STEP:
        return value.to(device=record.entries["step"].device)
    return value.double()


def _can_go_on(record: Record, scalar: Scalar) -> bool:
    entries = record.state or {}
    value = entries.get(scalar.name)
    if value is None:
        return False
    if record.counts_on_device:
        return bool(value.device == record.param.device)
    if tensor_kinds.is_fake(record.param) and not tensor_kinds.is_fake(value):
        return False
    if scalar is not STEP:
        step = entries.get("step")
        return step is None or bool(value.device == step.device)
    if value.device.type != "cpu" or value.dtype == torch.float64:
        return True
    count = tensor_kinds.number(value)
    return count is None or bool(count < last_count(value.dtype))


@functools.cache
def last_count(dtype: torch.dtype) -> float:
    """Up to where a step count of this dtype can go on; float64 further than any step counts."""
    if dtype == torch.bool:
        return 0
    return 2 / torch.finfo(dtype).eps if dtype.is_floating_point else torch.iinfo(dtype).max


def _is_stored(record: Record, slot: Slot) -> bool:
    """Whether the state has a tensor that is stored as the group declares."""
    value = (record.state or {}).get(slot.name)
    if value is None:
        return False
    dtype = record.declared(slot)
    if formats.is_code(value):
        value, held = dtensor.local(value), record.held
        # A scale is of neighbours in memory.
        return dtype in (None, value.dtype) and (
            formats.same_layout(value, held) or not formats.is_dense(held)
        )
    return dtype is None or value.dtype == dtype


def _is_made_by_update(record: Record) -> bool:
    """Whether it is the update of this parameter that makes the state it lacks."""
    if not record.rule.first_step_fills_state or record.grad is None:
        return False
    return record.has_sparse_grad or (
        stock_step.concerns(record.param, record.grad, record.entries)
        and stock_step.can_take(record)
    )


def draw_seed() -> Tensor:
    """For the random numbers that a parameter is rounded with, and how often it was. The seeds of
    an optimizer come from torch's generator in the order of its parameters."""
    seed = torch.randint(2**62, (2,), dtype=torch.int64, device="cpu")
    seed[1] = 0
    return seed


def draw_seeds(members: Members, ids: set[int], seeds: dict[Any, Tensor]) -> None:
    """Of parameters that are rounded at random, in their order, whatever the order of their steps.
    Where a step begins before all gradients are there, some wait for a later one. ``ids``: of the
    parameters that may have a step; ``seeds``: of those that have had none."""
    for record in members.all() if any(g.get("rounding") for g in members.groups) else ():
        if "rounding_state" in record.entries:
            seeds.pop(record.param, None)
        elif record.extras.rounding is not None and id(record.param) in ids:
            if record.param.requires_grad and record.param not in seeds:
                seeds[record.param] = draw_seed()


def _new_extra(key: str, record: Record) -> Tensor:
    param = record.param
    if key == "rounding_state":
        seed = record.members.seeds.get(param)
        if seed is None:
            seed = draw_seed()
        return dtensor.row_per_shard(seed.to(param.device), param)
    if key == "master_remainder":
        return torch.zeros_like(param, dtype=torch.int16, memory_format=torch.preserve_format)
    return torch.clone(
        param.detach().to(torch.float32 if param.dtype in formats.HALVES else param.dtype),
        memory_format=torch.preserve_format,
    )
