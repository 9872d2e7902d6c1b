"""Parameters as a step found them when all of them was checked: whether they still are."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from itertools import chain, repeat
from operator import attrgetter, eq, is_
from typing import Any

import torch
from torch import Tensor

from . import backend, formats, memory, tensor_kinds
from .modes import Kind
from .record import Record

# A property of some tensors, one after the other: nothing that is compared stays in memory, or
# Python's garbage collection would come in every step.
Property = Callable[[Iterable[Tensor]], Iterable[Any]]


def _bytes(tensors: Iterable[Tensor]) -> Iterable[int]:
    """How long their storages are."""
    return map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors))


_TYPE: Property = functools.partial(map, type)
_DTYPE: Property = functools.partial(map, attrgetter("dtype"))
_SHAPE: Property = functools.partial(map, attrgetter("shape"))
_STRIDES: Property = functools.partial(map, Tensor.stride)
# Of a parameter and its state. Where all of this is equal the tensor is the same, or as good.
_OF_OWN: tuple[Property, ...] = (
    _TYPE,
    functools.partial(map, id),
    functools.partial(map, Tensor.data_ptr),
    _bytes,
    _DTYPE,
    _SHAPE,
    _STRIDES,
    functools.partial(map, Tensor.is_neg),
)
# Of a gradient, which may be another in every step. The keys say what kind of tensor it is for
# torch: of which device and layout, negated, inside a transformation, and so on.
_OF_GRAD: tuple[Property, ...] = (
    _TYPE,
    functools.partial(map, torch._C._dispatch_keys),
    _DTYPE,
    functools.partial(map, attrgetter("device")),
    _SHAPE,
    _STRIDES,
    functools.partial(map, Tensor.storage_offset),
    _bytes,
)


def _read(properties: tuple[Property, ...], tensors: list[Tensor]) -> list[list[Any]]:
    return [[*of(tensors)] for of in properties]


def _agree(
    properties: tuple[Property, ...], tensors: list[Tensor], values: list[list[Any]]
) -> bool:
    return all(all(map(eq, of(tensors), v)) for of, v in zip(properties, values, strict=True))


# Parameters that are looked at together, one property of all of them after the other: as many as
# stay in the cache meanwhile.
_BLOCK = 64


class Picture:
    """Parameters as one step found them, without the tensors themselves. Another step sees without
    a line of Python for each tensor whether all of them still are."""

    def __init__(self, records: list[Record]) -> None:
        self._blocks = [_Block(records[at:end]) for at, end in _blocks(records)]

    def is_still(self, records: list[Record]) -> bool:
        """Whether all is as it was, but for values and where the gradients are."""
        slices = _blocks(records)
        return len(slices) == len(self._blocks) and all(
            block.is_still(records[at:end])
            for block, (at, end) in zip(self._blocks, slices, strict=True)
        )


def _blocks(records: list[Record]) -> list[tuple[int, int]]:
    return [(at, at + _BLOCK) for at in range(0, len(records), _BLOCK)]


class _Block:
    def __init__(self, records: list[Record]) -> None:
        grads = [record.grad for record in records]
        self._keys = [tuple(record.entries) for record in records]
        self._own = _read(_OF_OWN, [tensor for record in records for tensor in own_tensors(record)])
        self._grads = _read(_OF_GRAD, grads)

    def is_still(self, records: list[Record]) -> bool:
        states = [{} if record.state is None else record.state for record in records]
        if len(records) != len(self._keys) or not all(map(is_, map(type, states), repeat(dict))):
            return False
        if not all(map(eq, map(tuple, states), self._keys)):
            return False
        grads = [record.grad for record in records]
        if not _agree(_OF_GRAD, grads, self._grads):
            return False
        params = ([record.param] for record in records)
        pairs = zip(params, map(dict.values, states), strict=True)
        own = [*chain.from_iterable(chain.from_iterable(pairs))]
        return _agree(_OF_OWN, own, self._own)


class Known:
    """A parameter that was checked; another step may begin from the same."""

    __slots__ = ("kind", "numbers", "picture", "ranges", "shares", "span", "terms")

    def __init__(self, record: Record, terms: Any) -> None:
        param, grad, entries = record.param, record.grad, record.entries
        like = [grad, *(entries[key] for key in record.keys)]
        count: Tensor | None = entries.get("step")
        self.terms = terms
        self.picture = _Block([record])
        self.ranges = [range_of(tensor) for tensor in own_tensors(record)]
        self.span = span_of(grad)
        self.shares = False
        # All whose numbers are checked together in a step: where the count may go, and what the
        # numbers of the group meet.
        of_count = None if count is None or not count.is_cpu else count.dtype
        self.numbers = record.g, param.dtype, of_count
        self.kind = Kind(
            device=param.device.type,
            dtype=param.dtype,
            is_uniform=all(t.dtype == param.dtype for t in like),
            is_aligned=formats.is_dense(param) and all(formats.same_layout(t, param) for t in like),
            counts_on_device=count is not None and not count.is_cpu,
            is_first=record.rule.first_step_fills_state and record.is_first_step,
            is_scaled=False,
        )

    def is_still(self, record: Record) -> bool:
        return not self.kind.is_first and self.picture.is_still([record])


# What torch's implementations take as a number of a parameter.
_COUNTS = (torch.float32, torch.float64)


def goes_with_others(record: Record) -> bool:
    """Whether a parameter and all that belongs to it are ordinary."""
    if record.group.get("differentiable") or backend.runs_on(record.param.device):
        return False
    if tensor_kinds.is_transforming() or tensor_kinds.is_traced():
        return False
    entries = record.entries
    if record.param.is_complex() or type(entries) is not dict or not _is_ordinary(record.grad):
        return False
    if not all(isinstance(value, Tensor) for value in entries.values()):
        return False
    counts = [entries[scalar.name] for scalar in record.rule.scalars]
    if any(count.dim() or count.dtype not in _COUNTS for count in counts):
        return False
    return all(
        _is_ordinary(tensor) and not tensor_kinds.is_lazy_view(tensor)
        for tensor in own_tensors(record)
    )


def _is_ordinary(tensor: Tensor) -> bool:
    return memory.is_plain(tensor) and not tensor_kinds.is_unusual(tensor)


def own_tensors(record: Record) -> list[Any]:
    """A parameter and what its state consists of."""
    return [record.param, *record.entries.values()]


# Where tensors are ------------------------------------------------------------------------------


def span_of(tensor: Tensor) -> int:
    """Bytes from its first element to the end of its last; none of one that has no memory."""
    if tensor.numel() == 0 or memory.is_zero(tensor):
        return 0
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def address_of(tensor: Tensor) -> int:
    if tensor.device.type in ("cpu", "cuda", "xpu"):
        return operator.index(tensor.data_ptr())
    # What a data_ptr() is elsewhere only the device knows.
    storage: int = tensor.untyped_storage()._cdata
    return (storage << 48) + operator.index(tensor.storage_offset()) * tensor.element_size()


def range_of(tensor: Tensor) -> tuple[int, int]:
    """Where it begins and ends."""
    begin = address_of(tensor)
    return begin, begin + span_of(tensor)
