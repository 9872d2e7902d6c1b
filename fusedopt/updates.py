"""An update of parameters whose numbers, as step counts, are equal: by torch's implementation over
lists, or by the rule."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import stock_step
from .rule import numbers_as_scalars
from .tensor_list import TensorList

if TYPE_CHECKING:
    from .work import Bucket


def of_equal_numbers(
    bucket: Bucket, grads: list[Tensor]
) -> Iterator[tuple[int, list[int], list[list[Tensor]]]]:
    """The first of them, all of them, and their columns: parameters, gradients, state tensors."""
    columns, first = bucket.columns, bucket.record(0)
    like = columns.like((*first.rule.scalar_by_name,))
    own = [columns.params, grads, *map(columns.state, first.keys)]
    for at in sorted({*like}):
        those = [i for i, of in enumerate(like) if of == at]
        is_all = len(those) == len(like)
        yield at, those, own if is_all else [[column[i] for i in those] for column in own]


class ByTorch:
    """An update of parameters with equal numbers by torch's implementation over lists."""

    def __init__(self, bucket: Bucket, at: int) -> None:
        self._function = stock_step.implementation(bucket)
        self._bucket, self._at = bucket, at
        self.numbers: dict[str, Tensor] = {}

    def __call__(self, lists: list[list[Tensor]]) -> None:
        record, rule = self._bucket.record(self._at), self._bucket.members.rule
        self.numbers = {s.name: record.entries[s.name].clone() for s in rule.scalars}
        kept = dict(zip(("param", "grad", *record.keys), lists, strict=True))
        numbers = [[self.numbers[s.name]] for s in (*rule.scalars[1:], *rule.scalars[:1])]
        slots = [kept.get(slot.name, []) for slot in rule.slots]
        self._function(kept["param"], kept["grad"], *slots, *numbers)


class ByRule:
    """An update of parameters with equal numbers by the rule."""

    def __init__(self, bucket: Bucket, at: int) -> None:
        record = bucket.record(at)
        self._rule, self._group = record.rule, numbers_as_scalars(record.group)
        kept, self._scalars = record.next_scalars(self._group)
        names = [scalar.name for scalar in record.rule.scalars]
        self.numbers = dict(zip(names, kept, strict=True))

    def __call__(self, lists: list[list[Tensor]]) -> None:
        update: Any = self._rule.update
        values = update(self._group, *self._scalars, *map(TensorList, lists))
        for tensors, new in zip([lists[0], *lists[2:]], values, strict=True):
            torch._foreach_copy_(tensors, new.tensors)


def written_numbers(bucket: Bucket, those: list[int], numbers: dict[str, Tensor]) -> Iterator[Any]:
    for name, value in numbers.items():
        column = bucket.columns.at(those).state(name)
        yield functools.partial(torch._foreach_copy_, column, [value] * len(column))


def in_pieces(sizes: Iterable[int], largest: int) -> list[slice]:
    """Neighbours that together have at most so many elements, or are one."""
    pieces, begin, end, total = [], 0, 0, 0
    for size in sizes:
        if end > begin and total + size > largest:
            pieces.append(slice(begin, end))
            begin, total = end, 0
        end, total = end + 1, total + size
    return [*pieces, slice(begin, end)] if end else []
