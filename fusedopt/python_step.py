"""The step of parameters with torch's operators: values are loaded, updated and stored."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import dtensor, formats, host_step, memory, stock_step, tensor_kinds
from .modes import Mode
from .record import Record
from .rule import Group, numbers_as_scalars
from .tensor_list import TensorList
from .updates import ByRule, in_pieces, of_equal_numbers, written_numbers

if TYPE_CHECKING:
    from .work import Bucket


def take(record: Record, factor: Tensor | None) -> None:
    """Updates a parameter and its state, whatever kinds of tensors they are, from its gradient
    times a factor."""
    if stock_step.concerns(record.param, record.grad, record.entries):
        _take_of_unusual(record, factor)
    else:
        _take_of_ordinary(record, record.group, factor)


# Elements that are computed together on a device, in little more memory than the largest
# parameter has.
_PART = 1 << 24


def take_together(bucket: Bucket) -> list[functools.partial[Any]]:
    """Updates ordinary parameters. On the CPU the calls that write are returned."""
    columns, mode = bucket.columns, bucket.mode
    if bucket.kind.device == "cpu":
        if mode is Mode.FUSED:
            return stock_step.fused_calls(bucket, _scaled(bucket, columns.grads))
        if bucket.is_plain():
            return host_step.calls(bucket, _scaled(bucket, columns.grads))
        return [_new_values(bucket)]
    if mode is not Mode.RULE:
        stock_step.take_together(bucket, _scaled(bucket, columns.grads))
        return []
    for part in in_pieces(map(Tensor.numel, columns.params), _PART):
        if bucket.is_plain():
            _take_by_rule(bucket[part])
        else:
            _new_values(bucket[part])()
    return []


def _scaled(bucket: Bucket, grads: list[Tensor]) -> list[Tensor]:
    """Gradients as they are used."""
    if bucket.kind.is_lazy:
        grads = [*map(_materialized, grads)]
    factor = bucket.factor
    if factor is None:
        return grads
    dtype = grads[0].dtype
    scaled = torch._foreach_mul(grads, factor.to(dtype))
    # The product of two 0-dim tensors is of the wider dtype, and rounded once.
    return [
        new if grad.dim() else (grad * factor).to(dtype)
        for grad, new in zip(grads, scaled, strict=True)
    ]


def _take_by_rule(bucket: Bucket) -> None:
    """Updates tensors that are what the rule computes with."""
    for at, those, lists in of_equal_numbers(bucket, _scaled(bucket, bucket.columns.grads)):
        update = ByRule(bucket, at)
        update(lists)
        for call in written_numbers(bucket, those, update.numbers):
            call()


def _new_values(bucket: Bucket) -> functools.partial[Any]:
    """Writes what the rule has computed, for all parameters of one step count at once."""
    records, factor = bucket.records, bucket.factor
    steps: dict[Any, list[_Step]] = {}
    group = numbers_as_scalars(records[0].group)
    for record in records:
        step = _Step(record, group)
        steps.setdefault(tuple(step.scalars), []).append(step)
    tensors: list[Tensor] = []
    values: list[Tensor] = []
    for scalars, those in steps.items():
        columns = zip(
            *(step.loaded(_materialized(step.record.grad), factor) for step in those), strict=True
        )
        update: Any = records[0].rule.update
        results = update(group, *scalars, *map(TensorList, columns))
        of_each = zip(*(result.tensors for result in results), strict=True)
        for step, new in zip(those, of_each, strict=True):
            step.store(*new)
            tensors += step.tensors
            values += step.values
    return functools.partial(torch._foreach_copy_, tensors, values)


def _take_of_unusual(record: Record, factor: Tensor | None) -> None:
    """torch's own for-loop, if it knows all options."""
    param = record.param
    if (mode := tensor_kinds.inactive_mode(param)) is not None:
        with mode:
            return _take_of_unusual(record, factor)
    with record.explained(), stock_step.scaled_grad(param, factor):
        if stock_step.can_take(record):
            stock_step.take(record)
        else:
            _take_of_ordinary(record, stock_step.with_numbers(record.group, param), None)
    return None


def _take_of_ordinary(record: Record, group: Group, factor: Tensor | None) -> None:
    grad = _materialized(record.param.grad)
    if record.has_sparse_grad:
        update = record.rule.sparse_update
        assert update is not None
        grad = grad.to(torch.promote_types(grad.dtype, record.param.dtype))
        update(group, record.param, grad if factor is None else grad * factor, record.entries)
        return
    _Step(record, numbers_as_scalars(group)).take(grad, factor)


class _Step:
    """The values of one parameter on their way from memory through the rule and back."""

    def __init__(self, record: Record, group: Group) -> None:
        self.record, self.group = record, group
        self.entries = record.entries
        self.is_differentiable = bool(group["differentiable"])
        # Autograd goes through the DTensors themselves.
        self.held: Tensor = record.param if self.is_differentiable else record.held
        self.tensors: list[Tensor] = []  # to be written, and
        self.values: list[Tensor] = []
        self.kept_scalars, self.scalars = record.next_scalars(self.group)

    def take(self, grad: Tensor, factor: Tensor | None) -> None:
        record = self.record
        values = record.rule.update(self.group, *self.scalars, *self.loaded(grad, factor))
        if record.param.is_complex():
            values = tuple(torch.view_as_complex(value.contiguous()) for value in values)
        self.store(*values)
        self._write()

    def loaded(self, grad: Tensor, factor: Tensor | None) -> list[Tensor]:
        """Parameter, gradient and state as the rule takes them."""
        record = self.record
        param, *slots = map(
            self._loaded, (self._param(), *(record.value_of(key) for key in record.keys))
        )
        if not self.is_differentiable:
            grad = dtensor.local(dtensor.placed_like(grad, record.param))
        grad = _as_real(grad).to(param.dtype)
        grad = grad if factor is None else (grad * factor).to(param.dtype)
        return [param, grad, *slots]

    # Loading --------------------------------------------------------------------------------------

    def _param(self) -> Tensor:
        """The parameter as its master has it, if there is one."""
        key = self.record.extras.master
        if key is None:
            return self.held
        master = dtensor.local(self.entries[key])
        if key == "master_remainder":
            return formats.join(self.held, master)
        # A parameter that is not its master rounded was written by somebody else: it counts.
        return torch.where(master.to(self.held.dtype) == self.held, master, self.held.float())

    def _loaded(self, tensor: Tensor) -> Tensor:
        """Real numbers of the dtype that is computed in."""
        tensor = _as_real(tensor if self.is_differentiable else dtensor.local(tensor))
        real = self.record.param.dtype.to_real()
        # What autograd saves must not be what is written below.
        return tensor.to(torch.float32 if real.itemsize == 2 else real, copy=self.is_differentiable)

    # Storing --------------------------------------------------------------------------------------

    def store(self, param: Tensor, *slots: Tensor) -> None:
        record, entries = self.record, self.entries
        for scalar, kept in zip(record.rule.scalars, self.kept_scalars, strict=True):
            self._add(entries[scalar.name], kept)
        for at, (key, value) in enumerate(zip(record.keys, slots, strict=True)):
            target = entries[key] if self.is_differentiable else dtensor.local(entries[key])
            if formats.is_code(target):
                value = torch.empty_like(target, dtype=value.dtype).copy_(value)  # for its strides
                codes, scales = formats.encode(value, target.dtype, float(self.scalars[0]), at)
                kept = dtensor.local(entries[f"{key}_scale"]).view(-1)[: scales.numel()]
                self._add(target, codes)
                self._add(kept, scales)
            else:
                self._add(target, value)
        self._store_param(param)
        if (ema := record.extras.ema) is not None:
            average = dtensor.local(entries[ema])
            self._add(average, average + (1 - self.group["ema"]) * (param - average))

    def _store_param(self, value: Tensor) -> None:
        master, rounding, _ = self.record.extras
        if master == "master_remainder":
            high, low = formats.split(value)
            self._add(self.held, high)
            self._add(dtensor.local(self.entries[master]), low)
        elif rounding is not None:
            count = dtensor.local(self.entries[rounding])
            next_count = count.clone()
            next_count.view(-1)[1] += 1
            self._add(self.held, formats.round_stochastically(value, self.entries[rounding]))
            self._add(count, next_count)
        else:
            self._add(self.held, value)
            if master is not None:
                self._add(dtensor.local(self.entries[master]), value)

    def _add(self, tensor: Tensor, value: Tensor) -> None:
        self.tensors.append(tensor)
        self.values.append(value)

    def _write(self) -> None:
        if self.is_differentiable:
            for tensor, value in zip(self.tensors, self.values, strict=True):
                tensor.copy_(value)
            return
        if self.held is not self.record.param:  # what is written is what DTensors hold
            increment_version([self.record.param, *(self.entries[key] for key in self.record.keys)])
        # At once: an error or an interrupt finds all of it or nothing.
        tensor_kinds.write(self.tensors, self.values)


def _materialized(grad: Tensor) -> Tensor:
    """A gradient with memory, in which its values are: torch takes the product of a zero without
    memory with an infinity for zero."""
    return grad.clone() if memory.is_zero(grad) else grad.resolve_neg()


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
