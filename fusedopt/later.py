"""torch's implementations over lists in two parts: first all that can fail, then what writes."""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .known import Columns

# Tensors up to which one call for each costs less than a pass over their elements.
_FEW = 8

# Functions over lists whose results have the form of their first operands.
_ELEMENTWISE = {
    f"_foreach_{name}"
    for name in (
        *("abs", "add", "addcdiv", "addcmul", "div", "lerp", "maximum", "mul", "neg"),
        *("reciprocal", "sign", "sqrt", "sub"),
    )
}
# What else torch's implementations call; it reads no elements.
_READERS = ("__get__", "is_complex", "tensor", "_set_grad_enabled")


class CannotWait(Exception):
    """An implementation does not leave all of its work to functions over lists."""


class Later(TorchFunctionMode):
    """While it is active, torch's functions over lists compute nothing: ``calls`` are left, which
    do. They are one C function each, so that no interrupt comes between them, and the memory that
    they need is there. What might read elements before that raises CannotWait."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[functools.partial[Any]] = []
        # Numbers that the implementations read, on which all is computed at once, and where each of
        # them comes first.
        self._now: set[int] = set()
        self._first: list[int] = []
        # Intermediate values: what later calls may write over, and what this piece uses.
        self._free: defaultdict[Any, list[Tensor]] = defaultdict(list)
        self._used: list[tuple[Any, Tensor]] = []

    def copies(self, columns: Columns, keys: tuple[str, ...]) -> list[list[Tensor]]:
        """Copies of numbers of each parameter, to compute on at once; the originals get it later.
        Parameters with equal ones, as their counts nearly always are, share copies."""
        like = columns.like(keys)
        self._first = sorted({*like})
        copied = []
        for column in map(columns.state, keys):
            copies = {at: column[at].clone() for at in self._first}
            self._now.update(map(id, copies.values()))
            copied.append([copies[at] for at in like])
            self.calls.append(functools.partial(torch._foreach_copy_, column, copied[-1]))
        return copied

    def take(self, function: Callable[[], Any]) -> None:
        """Calls a function while this mode is active, and only then: an interrupt comes after the
        mode has been entered and does not keep it from being left, as it could in ``with``."""
        enter = functools.partial(torch._C._push_on_torch_function_stack, self)
        both = map(functools.partial.__call__, [enter, functools.partial(function)])
        try:
            deque(both, maxlen=0)
        finally:
            torch._C._pop_torch_function_stack()

    def next_piece(self) -> None:
        """What follows does not read what came before."""
        for form, tensor in self._used:
            self._free[form].append(tensor)
        self._used = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.__name__
        if name == "item" and id(args[0]) in self._now:  # several times for each parameter
            return function(*args)
        kwargs = kwargs or {}
        if name in _READERS:
            return function(*args, **kwargs)
        if not name.startswith(("_foreach_", "_fused_")) or not isinstance(args[0], (list, tuple)):
            raise CannotWait(name)
        if id(args[0][0]) in self._now:
            return function(*map(self._once, args), **kwargs)
        if name.endswith("_"):
            self.calls.append(functools.partial(function, *args, **kwargs))
            return None
        if name not in _ELEMENTWISE:
            raise CannotWait(name)
        results = [self._intermediate(tensor) for tensor in args[0]]
        if len(results) > _FEW or len(args) > 2:
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
        form = like.dtype, like.shape, like.stride()
        free = self._free[form]
        tensor = free.pop() if free else torch.empty_like(like)
        self._used.append((form, tensor))
        return tensor


def in_pieces(sizes: Iterable[int], largest: int) -> list[slice]:
    """Neighbours that together have at most so many elements, or are one."""
    pieces, begin, end, total = [], 0, 0, 0
    for size in sizes:
        if end > begin and total + size > largest:
            pieces.append(slice(begin, end))
            begin, total = end, 0
        end, total = end + 1, total + size
    return [*pieces, slice(begin, end)]
