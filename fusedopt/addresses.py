"""Where tensors are in memory, and which of them overlap."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterator
from itertools import repeat
from operator import attrgetter
from typing import NamedTuple

from torch import Tensor

from . import memory

# The types of devices on which data_ptr() is an address.
_ADDRESSED = ("cpu", "cuda", "xpu")


def span_of(tensor: Tensor) -> int:
    """Bytes from its first element to the end of its last; none of one that has no memory."""
    if tensor.numel() == 0 or memory.is_zero(tensor):
        return 0
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def address_of(tensor: Tensor) -> int:
    if tensor.device.type in _ADDRESSED:
        return operator.index(tensor.data_ptr())
    # What a data_ptr() is elsewhere only the device knows.
    storage: int = tensor.untyped_storage()._cdata
    return (storage << 48) + operator.index(tensor.storage_offset()) * tensor.element_size()


def addresses_of(tensors: list[Tensor], types: set[str]) -> list[int]:
    return [*map(Tensor.data_ptr if types.issubset(_ADDRESSED) else address_of, tensors)]


def range_of(tensor: Tensor) -> tuple[int, int]:
    """Where it begins and ends."""
    begin = address_of(tensor)
    return begin, begin + span_of(tensor)


class Range(NamedTuple):
    """Bytes that a step reads or writes."""

    begin: int
    end: int
    of: int  # a parameter
    is_written: bool


def overlapping(ranges: list[Range]) -> Iterator[list[Range]]:
    """The ranges in order, those in one list that overlap, directly or through others."""
    found: list[Range] = []
    end = 0
    for one in sorted(ranges, key=attrgetter("begin")):
        if one.begin == one.end:
            continue
        if found and one.begin >= end:
            yield found
            found = []
        end = max(end, one.end) if found else one.end
        found.append(one)
    if found:
        yield found


class Written:
    """Where a step writes: ranges of memory, in order and apart from each other."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        # Where the next range begins, and where the one before ends, of which the first has none.
        self._next = [begin for begin, _ in ranges] + [1 << 128]
        self._ends = [0] + [end for _, end in ranges]

    def is_apart(self, begins: list[int], spans: list[int]) -> bool:
        """Whether nothing is written where some tensors are."""
        at = [*map(bisect.bisect_right, repeat(self._next), begins)]
        ends, following = map(self._ends.__getitem__, at), map(self._next.__getitem__, at)
        return all(map(operator.le, ends, begins)) and all(
            map(operator.le, map(operator.add, begins, spans), following)
        )
