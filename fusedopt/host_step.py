"""Ordinary parameters on the CPU together: calls of torch's operators that step them."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .modes import Mode
from .traced import CannotTraceError, Program, Update
from .updates import ByRule, ByTorch, in_pieces, of_equal_numbers, written_numbers

if TYPE_CHECKING:
    from .work import Bucket

Calls = list["functools.partial[Any]"]

# Elements up to which copying a tensor into one with others costs less than a call of each operator
# for it, and those that are together in one. A step takes for each of 100 tensors of 4,096 elements
# 38 us copied and 49 called with NAdam, 22 and 31 with RMSprop; of 10,000, 117 and 63, 56 and 49
# (two cores of a Zen 4, 2026-11).
_SMALL, _PIECE = 1 << 12, 1 << 18
# Elements of a large tensor that are updated before the next, so that intermediate values stay in a
# cache. Of 2**18, 2**20, 2**22 a step of 10 x 1,000,000 takes with NAdam 13.9, 12.0, 12.0 ms, with
# RMSprop 9.9, 7.8, 8.1 (two cores of a Zen 4, 2026-11).
_PART = 1 << 20

_GRAD = 1  # the place of the gradients among the lists; they are not written


def calls(bucket: Bucket, grads: list[Tensor]) -> Calls:
    """What writes the step of parameters, of the dtype that is computed with, and of their state:
    one C function each. All that can fail is done."""
    found: Calls = []
    for at, those, lists in of_equal_numbers(bucket, grads):
        if bucket.mode is not Mode.RULE:
            by_torch = ByTorch(bucket, at)
            try:
                found += _updates(bucket, by_torch, lists)
                found += written_numbers(bucket, those, by_torch.numbers)
                continue
            except CannotTraceError:  # another torch: the rule does the same
                pass
        by_rule = ByRule(bucket, at)
        found += _updates(bucket, by_rule, lists)
        found += written_numbers(bucket, those, by_rule.numbers)
    return found


def _updates(bucket: Bucket, update: Update, lists: list[list[Tensor]]) -> Calls:
    program = None
    if not bucket.members.rule.scalars:  # while the options are the same the update is
        program = bucket.way.program = bucket.way.program or _traced(update, lists)
        if program.is_one_call:
            return [program.call_over_lists(lists)]
    sizes = [*map(Tensor.numel, lists[0])]
    small = [i for i, size in enumerate(sizes) if size <= _SMALL]
    found: Calls = []
    for piece in in_pieces([sizes[i] for i in small], _PIECE):
        parts = [[column[i] for i in small[piece]] for column in lists]
        flat = [*map(_flat_copy, parts)]
        update([[tensor] for tensor in flat])
        for at, part in enumerate(parts):
            if at != _GRAD:
                new = _unflatten_dense_tensors(flat[at], part)
                found.append(functools.partial(torch._foreach_copy_, part, [*new]))
    if len(small) < len(sizes):
        program = program or _traced(update, lists)
        scratch = _Scratch(program.num_intermediates, lists[0][0].dtype)
        for i, size in enumerate(sizes):
            if size > _SMALL:
                tensors = [column[i] for column in lists]
                found += _large(program, scratch, tensors, bucket.kind.is_aligned)
    return found


def _flat_copy(tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 1:  # of which torch would make a view
        return tensors[0].clone(memory_format=torch.contiguous_format).view(-1)
    flat: Tensor = _flatten_dense_tensors(tensors)
    return flat


def _traced(update: Update, lists: list[list[Tensor]]) -> Program:
    return Program(update, len(lists), lists[0][0].dtype)


def _large(program: Program, scratch: _Scratch, tensors: list[Tensor], is_aligned: bool) -> Calls:
    """The update of one parameter, in parts. ``is_aligned``: its tensors have one order in memory,
    without gaps."""
    size = tensors[0].numel()
    if size <= _PART or not is_aligned:
        return program.calls(tensors, scratch.like(tensors[0], is_aligned))
    parts = zip(*(tensor.as_strided((size,), (1,)).split(_PART) for tensor in tensors), strict=True)
    calls = (program.calls([*those], scratch.like(those[0], True)) for those in parts)
    return [*itertools.chain.from_iterable(calls)]


class _Scratch:
    """Intermediate values of a part, over which those of the next are written."""

    def __init__(self, number: int, dtype: torch.dtype) -> None:
        self._rows = torch.empty(number, _PART, dtype=dtype, device="cpu")
        self._of: dict[Any, list[Tensor]] = {}

    def like(self, tensor: Tensor, is_aligned: bool) -> list[Tensor]:
        """In the order of the tensor, without its gaps if it is not ``is_aligned``."""
        dense = tensor if is_aligned else torch.empty_like(tensor, device="meta")
        form = tensor.shape, dense.stride()
        if form not in self._of:
            self._of[form] = (
                [row.as_strided(*form) for row in self._rows]
                if tensor.numel() <= _PART
                else [
                    torch.empty_strided(*form, dtype=tensor.dtype, device="cpu") for _ in self._rows
                ]
            )
        return self._of[form]
