"""Parameters as a step found them when all of them was checked: whether they still are."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from . import backend, formats, memory, tensor_kinds
from .addresses import address_of, range_of, span_of
from .forms import Forms, Property, are_equal, listed
from .modes import Kind
from .record import Record

# Where these and its form are equal a tensor is the same, or as good.
_MEMORY: tuple[Property, ...] = (
    lambda tensors: map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors)),
    functools.partial(map, Tensor.data_ptr),
)
# A gradient may be elsewhere in every step.
_MEMORY_OF_GRAD: tuple[Property, ...] = (_MEMORY[0], functools.partial(map, Tensor.storage_offset))

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
        if not any(self.states):
            return self.params
        pairs = zip(zip(self.params), map(dict.values, self.states), strict=True)
        return [*chain.from_iterable(chain.from_iterable(pairs))]


class Picture:
    """What parameters, gradients and state were, without these themselves. Another step sees
    without a line of Python for each tensor whether all of it still is."""

    def __init__(self, columns: Columns) -> None:
        self._size = len(columns.params)
        self._blocks = [_Block(columns[part]) for part in self._parts()]

    def is_still(self, columns: Columns) -> bool:
        """Whether all is as it was, but for values and where the gradients are."""
        if len(columns.params) != self._size:
            return False
        try:
            return all(
                block.is_still(columns[part])
                for part, block in zip(self._parts(), self._blocks, strict=True)
            )
        except RuntimeError:  # a tensor of another kind, which has no strides or no storage
            return False

    def _parts(self) -> Iterable[slice]:
        return (slice(at, at + _BLOCK) for at in range(0, self._size, _BLOCK))


class _Block:
    """A part of a picture."""

    __slots__ = ("_forms", "_keys", "_memory")

    def __init__(self, columns: Columns) -> None:
        own, grads = columns.own(), columns.grads
        self._keys = [*map(tuple, columns.states)]
        self._forms = Forms(own), Forms(grads)
        self._memory = listed(_MEMORY, own), listed(_MEMORY_OF_GRAD, grads)

    def is_still(self, columns: Columns) -> bool:
        if {*map(type, columns.states)} != {dict} or [*map(tuple, columns.states)] != self._keys:
            return False
        own, grads = columns.own(), columns.grads
        return (
            self._forms[0].are_those_of(own)
            and self._forms[1].are_those_of(grads)
            and are_equal(_MEMORY, own, self._memory[0])
            and are_equal(_MEMORY_OF_GRAD, grads, self._memory[1])
        )


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


def goes_with_others(record: Record, is_refused: bool) -> bool:
    """Whether a parameter and all that belongs to it are ordinary, and it has no native step: its
    device has none, or has refused the kernel."""
    if record.group.get("differentiable"):
        return False
    if not is_refused and backend.runs_on(record.param.device):
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
