"""Parameters as a step found them when all of them was checked: whether they still are."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from . import backend, formats, memory, tensor_kinds
from .addresses import address_of, range_of, span_of
from .modes import Kind
from .record import Record

# A property of tensors, one after the other.
Property = Callable[[Iterable[Tensor]], Iterable[Any]]


def _bytes(tensors: Iterable[Tensor]) -> Iterable[int]:
    """How long their storages are."""
    return map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors))


# The type comes first: of other tensors than torch's own nothing more is asked. Those of another
# layout and nested ones have no strides or no storage, and raise RuntimeError.
_ORDINARY: tuple[Property, ...] = (
    functools.partial(map, type),
    functools.partial(map, attrgetter("dtype")),
    functools.partial(map, attrgetter("shape")),
    functools.partial(map, Tensor.stride),
    functools.partial(map, Tensor.is_neg),
    _bytes,
)
# Of a parameter and its state. Where all of this is equal the tensor is the same, or as good.
_OF_OWN: tuple[Property, ...] = (*_ORDINARY, functools.partial(map, Tensor.data_ptr))
# Of a gradient, which may be another in every step.
_OF_GRAD: tuple[Property, ...] = (
    *_ORDINARY,
    functools.partial(map, attrgetter("device")),
    functools.partial(map, Tensor.storage_offset),
    functools.partial(map, Tensor._is_zerotensor),  # which no address tells from an empty one
)

# Parameters that are looked at together, one property of all of them after the other: as many as
# stay in the cache meanwhile, and so few that Python's garbage collection does not come for it.
_BLOCK = 128


class Columns:
    """Parameters of a step with their gradients and state."""

    __slots__ = ("_like", "grads", "params", "states")

    def __init__(self, params: list[Any], grads: list[Any], states: list[dict[str, Any]]) -> None:
        self.params, self.grads, self.states = params, grads, states
        self._like: dict[tuple[str, ...], list[int]] = {}

    @classmethod
    def of(cls, records: list[Record]) -> Columns:
        return cls(
            [record.param for record in records],
            [record.grad for record in records],
            [record.entries for record in records],
        )

    def __getitem__(self, part: slice) -> Columns:
        if part.indices(len(self.params))[:2] == (0, len(self.params)):
            return self
        return Columns(self.params[part], self.grads[part], self.states[part])

    def at(self, indices: list[int]) -> Columns:
        if len(indices) == len(self.params):
            return self
        params, grads, states = self.params, self.grads, self.states
        return Columns(
            [params[i] for i in indices], [grads[i] for i in indices], [states[i] for i in indices]
        )

    def state(self, key: str) -> list[Any]:
        return [state[key] for state in self.states]

    def like(self, keys: tuple[str, ...]) -> list[int]:
        """Of each parameter the first whose numbers, as the step count, are the same ones."""
        if not keys:
            return [0] * len(self.params)
        if keys not in self._like:
            columns = [*map(self.state, keys)]
            types = [map(attrgetter("dtype"), column) for column in columns]
            numbers = [*zip(*types, *(map(Tensor.item, column) for column in columns), strict=True)]
            first = dict(zip(reversed(numbers), range(len(numbers) - 1, -1, -1), strict=True))
            self._like[keys] = [*map(first.__getitem__, numbers)]
        return self._like[keys]

    def own(self) -> list[Any]:
        """Each parameter, and what its state consists of."""
        pairs = zip(zip(self.params), map(dict.values, self.states), strict=True)
        return [*chain.from_iterable(chain.from_iterable(pairs))]


class Picture:
    """What parameters, gradients and state were, without these themselves. Another step sees
    without a line of Python for each tensor whether all of it still is."""

    def __init__(self, columns: Columns) -> None:
        self._size = len(columns.params)
        self._blocks = [[*self._block(columns[part])] for part in self._parts()]

    def is_still(self, columns: Columns) -> bool:
        """Whether all is as it was, but for values and where the gradients are."""
        if len(columns.params) != self._size:
            return False
        try:
            return all(
                {*map(type, columns.states[part])} == {dict}
                and all(map(operator.eq, self._block(columns[part]), block))
                for part, block in zip(self._parts(), self._blocks, strict=True)
            )
        except RuntimeError:  # a tensor of another kind, which has no strides or no storage
            return False

    def _parts(self) -> Iterable[slice]:
        return (slice(at, at + _BLOCK) for at in range(0, self._size, _BLOCK))

    @staticmethod
    def _block(columns: Columns) -> Iterable[list[Any]]:
        yield [*map(tuple, columns.states)]
        own = columns.own()
        yield from ([*of(own)] for of in _OF_OWN)
        yield from ([*of(columns.grads)] for of in _OF_GRAD)


class Known:
    """A parameter that was checked; another step may begin from the same."""

    __slots__ = ("begin", "kind", "picture", "ranges", "shares", "span", "terms")

    def __init__(self, record: Record, terms: Any) -> None:
        param, grad, entries = record.param, record.grad, record.entries
        like = [grad, *(entries[key] for key in record.keys)]
        count: Tensor | None = entries.get("step")
        self.terms = terms
        self.picture = Picture(Columns.of([record]))
        self.ranges = [range_of(tensor) for tensor in own_tensors(record)]
        self.begin, self.span = address_of(grad), span_of(grad)
        self.shares = False
        self.kind = Kind(
            device=param.device.type,
            dtype=param.dtype,
            is_uniform=all(t.dtype == param.dtype for t in like),
            is_aligned=formats.is_dense(param) and all(formats.same_layout(t, param) for t in like),
            counts_on_device=count is not None and not count.is_cpu,
            is_first=record.rule.first_step_fills_state and record.is_first_step,
            is_scaled=False,
            is_lazy=grad.is_neg() or memory.is_zero(grad),
        )

    def is_still(self, record: Record) -> bool:
        return not self.kind.is_first and self.picture.is_still(Columns.of([record]))


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
        _is_ordinary(tensor) and not tensor_kinds.is_lazy_view(tensor) and not tensor.is_inference()
        for tensor in own_tensors(record)
    )


def _is_ordinary(tensor: Tensor) -> bool:
    return memory.is_plain(tensor) and not tensor_kinds.is_unusual(tensor)


def own_tensors(record: Record) -> list[Any]:
    """A parameter and what its state consists of."""
    return [record.param, *record.entries.values()]
