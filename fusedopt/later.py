"""torch's implementations over lists in two parts: first all that can fail, then what writes."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Tensors up to which one call for each costs less than a pass over their elements.
_FEW = 8


class Later(TorchFunctionMode):
    """While it is active, torch's functions over lists compute nothing: ``calls`` are left, which
    do. They are one C function each, so that no interrupt comes between them, and the memory that
    they need is there. Nothing may read what they compute before they are made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[functools.partial[Any]] = []
        # Numbers that the implementations read, on which all is computed at once, and where each of
        # them comes first.
        self._now: set[int] = set()
        self._first: list[int] = []
        # Intermediate values: what later calls may write over, and what this piece uses.
        self._free: defaultdict[Any, list[Tensor]] = defaultdict(list)
        self._used: list[Tensor] = []

    def copies(self, columns: list[list[Tensor]]) -> list[list[Tensor]]:
        """Copies of numbers, some of each parameter, to compute on at once; the originals get it
        later. Parameters with equal ones, as their counts nearly always are, share copies."""
        keys = [*zip(*(_values(column) for column in columns), strict=True)]
        first = dict(zip(reversed(keys), range(len(keys) - 1, -1, -1), strict=True))
        self._first = [*first.values()]
        copied = []
        for column in columns:
            of_key = {key: column[at].clone() for key, at in first.items()}
            copied.append([of_key[key] for key in keys])
            self._now.update(map(id, of_key.values()))
            self.calls.append(functools.partial(torch._foreach_copy_, column, copied[-1]))
        return copied

    def next_piece(self) -> None:
        """What follows does not read what came before."""
        for tensor in self._used:
            self._free[_form(tensor)].append(tensor)
        self._used = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = function.__name__, kwargs or {}
        if not name.startswith(("_foreach_", "_fused_")):
            return function(*args, **kwargs)
        if id(args[0][0]) in self._now:
            once = (
                [a[i] for i in self._first] if isinstance(a, (list, tuple)) else a for a in args
            )
            return function(*once, **kwargs)
        if name.endswith("_"):
            self.calls.append(functools.partial(function, *args, **kwargs))
            return None
        results = [self._intermediate(tensor) for tensor in args[0]]
        if len(results) > _FEW:
            in_place = getattr(torch, f"{name}_")
            self.calls.append(functools.partial(torch._foreach_copy_, results, args[0]))
            self.calls.append(functools.partial(in_place, results, *args[1:], **kwargs))
            return results
        # The same for one tensor can be told where its result goes, which saves the copy.
        of_one = getattr(torch, name.removeprefix("_foreach_"))
        columns = (a if isinstance(a, (list, tuple)) else [a] * len(results) for a in args)
        for result, *operands in zip(results, *columns, strict=True):
            self.calls.append(functools.partial(of_one, *operands, out=result, **kwargs))
        return results

    def _once(self, argument: Any) -> Any:
        """Of a column what is computed at once, else the same."""
        is_column = isinstance(argument, (list, tuple))
        return [argument[i] for i in self._first] if is_column else argument

    def _intermediate(self, like: Tensor) -> Tensor:
        free = self._free[_form(like)]
        self._used.append(free.pop() if free else torch.empty_like(like))
        return self._used[-1]


def _values(numbers: list[Tensor]) -> list[Any]:
    return [*zip(map(Tensor.item, numbers), map(attrgetter("dtype"), numbers), strict=True)]


def _form(tensor: Tensor) -> Any:
    return tensor.dtype, tensor.shape, tensor.stride()


def in_pieces(sizes: Iterable[int], largest: int) -> list[slice]:
    """Neighbours that together have at most so many elements, or are one."""
    pieces, begin, end, total = [], 0, 0, 0
    for size in sizes:
        if end > begin and total + size > largest:
            pieces.append(slice(begin, end))
            begin, total = end, 0
        end, total = end + 1, total + size
    return [*pieces, slice(begin, end)]
