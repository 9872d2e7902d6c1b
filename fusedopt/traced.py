"""An update of tensors seen once and made many times: first all that can fail, then what writes."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Updates lists of parameters, of their gradients and of each of their state tensors, in place.
Update = Callable[[list[list[Tensor]]], None]

# Functions over lists that compute each element from those at its place. Of one tensor they have
# another name, and can be told where the result goes.
_ELEMENTWISE = {
    f"_foreach_{name}"
    for name in (
        *("abs", "add", "addcdiv", "addcmul", "clamp_max", "clamp_min", "copy", "div", "lerp"),
        *("maximum", "minimum", "mul", "neg", "reciprocal", "sign", "sqrt", "sub"),
    )
}
# What else torch's implementations ask of tensors; it reads no elements.
_READERS = ("__get__", "is_complex")


class CannotTraceError(Exception):
    """An update does not leave all of its work to functions over lists."""


class _Place(int):
    """Of a tensor: among those that are updated, and after these among the intermediate ones."""


class _Call(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: _Place


class Program:
    """What an update calls, for one tensor of each of its lists."""

    def __init__(self, update: Update, num_lists: int, dtype: torch.dtype) -> None:
        """
        Raises:
            CannotTraceError: the update does more than functions over lists do.
        """
        mode = _Tracing([torch.empty(0, dtype=dtype, device="cpu") for _ in range(num_lists)])
        lists = [[tensor] for tensor in mode.tensors]
        # An interrupt comes after the mode has been entered and does not keep it from being left,
        # as it could in ``with``.
        enter = functools.partial(torch._C._push_on_torch_function_stack, mode)
        both = map(functools.partial.__call__, [enter, functools.partial(update, lists)])
        try:
            deque(both, maxlen=0)
        finally:
            torch._C._pop_torch_function_stack()
        self._num_lists = num_lists
        self._calls, self.num_intermediates = _in_little_memory(mode.calls, num_lists)

    def calls(
        self, operands: list[Tensor], intermediates: list[Tensor]
    ) -> list[functools.partial[Any]]:
        """The update of tensors of one shape and one order in memory: one C function each, so that
        no interrupt comes between them, in memory that is there."""
        tensors = [*operands, *intermediates]
        found = []
        for function, args, kwargs, out in self._calls:
            those = [tensors[arg] if type(arg) is _Place else arg for arg in args]
            if function is torch._foreach_copy_:
                found.append(functools.partial(function, [tensors[out]], those))
            else:
                found.append(functools.partial(function, *those, out=tensors[out], **kwargs))
        return found


def _in_little_memory(calls: list[_Call], num_lists: int) -> tuple[list[_Call], int]:
    """The same with as few intermediate tensors as there are at one time, and their number."""
    used = [{a for a in (*call.args, call.out) if type(a) is _Place} for call in calls]
    last = {place: i for i, places in enumerate(used) for place in places}
    free: list[_Place] = []
    new: dict[Any, _Place] = {_Place(i): _Place(i) for i in range(num_lists)}
    found = []
    for i, (function, args, kwargs, out) in enumerate(calls):
        if out not in new:
            new[out] = free.pop() if free else _Place(len({*new.values()}))
        those = tuple(new[arg] if type(arg) is _Place else arg for arg in args)
        found.append(_Call(function, those, kwargs, new[out]))
        free += [new[place] for place in used[i] if place >= num_lists and last[place] == i]
    return found, len({*new.values()}) - num_lists


class _Tracing(TorchFunctionMode):
    """While it is active, functions over lists of the tensors in question compute nothing and are
    noted. Numbers, as counts of steps, are computed at once."""

    def __init__(self, operands: list[Tensor]) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.tensors = operands  # and the intermediate ones
        self._places = {id(tensor): _Place(i) for i, tensor in enumerate(operands)}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = function.__name__, kwargs or {}
        one = tuple(map(_of_one, args))
        places = [self._places.get(id(arg)) for arg in one]
        if not any(place is not None for place in places) or name in _READERS:
            return function(*args, **kwargs)
        if name.removesuffix("_") not in _ELEMENTWISE or places[0] is None:
            raise CannotTraceError(name)
        known = [arg if place is None else place for arg, place in zip(one, places, strict=True)]
        of_one, kwargs = name.removesuffix("_").removeprefix("_foreach_"), dict(kwargs)
        if of_one.startswith("addc") and len(known) > 3:
            kwargs["value"] = known.pop()
        out = places[0] if name.endswith("_") else self._new_place(one[0].dtype)
        if of_one == "copy":  # which has no ``out``
            self.calls.append(_Call(function, (known[1],), {}, out))
        else:
            self.calls.append(_Call(getattr(torch, of_one), tuple(known), kwargs, out))
        return None if name.endswith("_") else [self.tensors[out]]

    def _new_place(self, dtype: torch.dtype) -> _Place:
        place = _Place(len(self.tensors))
        self.tensors.append(torch.empty(0, dtype=dtype, device="cpu"))
        self._places[id(self.tensors[-1])] = place
        return place


def _of_one(argument: Any) -> Any:
    """Of a list of one tensor or number that, else the same."""
    return argument[0] if isinstance(argument, (list, tuple)) and argument else argument
