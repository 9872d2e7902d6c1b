"""An update of tensors seen once and made many times: first all that can fail, then what writes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


class CannotTraceError(RuntimeError):
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
        places, noted = map(_Place, itertools.count()), list[_Call]()
        lists: list[list[Tensor]] = [[_another(dtype, places, noted)] for _ in range(num_lists)]
        # Else nothing is noted, as in the backward of a loss that is a subclass.
        with torch._C._EnableTorchFunction():
            update(lists)
        if not noted:
            raise CannotTraceError("an update called no function of torch's over lists")
        calls = _written_at_once(noted, num_lists)
        # The lists may be any, where one function makes the whole update.
        self.is_one_call = len(calls) == 1 and calls[0].out == calls[0].args[0] < num_lists
        calls, self.num_intermediates = _in_little_memory(calls, num_lists)
        self._constants: list[Any] = []
        self._first_constant = num_lists + self.num_intermediates
        self._calls = [*map(self._compiled, calls)]

    def _compiled(self, call: _Call) -> tuple[Any, Any, int, dict[str, Any]]:
        """A call that takes its arguments by their places among tensors and constants."""
        places: list[int] = []
        for arg in call.args:
            if type(arg) is not _Place:
                self._constants.append(arg)
            is_place = type(arg) is _Place
            places.append(arg if is_place else self._first_constant + len(self._constants) - 1)
        one = slice(places[0], places[0] + 1)
        return call.function, itemgetter(*places if places[1:] else [one]), call.out, call.kwargs

    def call_over_lists(self, lists: list[list[Tensor]]) -> functools.partial[Any]:
        """The update of all tensors, if it ``is_one_call``."""
        ((function, args_of, _, kwargs),) = self._calls
        in_place = getattr(torch, f"_foreach_{function.__name__}_")
        return functools.partial(in_place, *args_of([*lists, *self._constants]), **kwargs)

    def calls(
        self, operands: list[Tensor], intermediates: list[Tensor]
    ) -> list[functools.partial[Any]]:
        """The update of tensors of one shape and one order in memory: one C function each, so that
        no interrupt comes between them, in memory that is there."""
        values = [*operands, *intermediates, *self._constants]
        found = []
        for function, args_of, out, kwargs in self._calls:
            args = args_of(values)
            if function is torch._foreach_copy_:  # which has no ``out``
                found.append(functools.partial(function, [values[out]], args))
            else:
                found.append(functools.partial(function, *args, out=values[out], **kwargs))
        return found


def _written_at_once(calls: list[_Call], num_lists: int) -> list[_Call]:
    """The same without the copies of values that can be computed where they go: nobody reads there
    what was there before."""
    end = 0
    while end < len(calls):
        function, (value, *_), _, target = calls[end]
        if function is not torch._foreach_copy_ or type(value) is not _Place or value < num_lists:
            end += 1
            continue
        begin = next((i for i, call in enumerate(calls) if call.out == value), end)
        between = [place for call in calls[begin + 1 : end] for place in (*call.args, call.out)]
        is_read = any(type(place) is _Place and place == target for place in between)
        if is_read:
            end += 1
            continue

        def moved(place: Any, value: Any = value, target: Any = target) -> Any:
            return target if type(place) is _Place and place == value else place

        calls = [
            call._replace(args=tuple(map(moved, call.args)), out=moved(call.out))
            for call in (*calls[:end], *calls[end + 1 :])
        ]
    return calls


def _in_little_memory(calls: list[_Call], num_lists: int) -> tuple[list[_Call], int]:
    """The same with as few intermediate tensors as there are at one time, and their number."""
    used = [{a for a in (*call.args, call.out) if type(a) is _Place} for call in calls]
    last = {place: i for i, places in enumerate(used) for place in places}
    free: list[_Place] = []
    new: dict[Any, _Place] = {_Place(i): _Place(i) for i in range(num_lists)}
    number, found = num_lists, []
    for i, (function, args, kwargs, out) in enumerate(calls):
        if out not in new:
            if not free:
                free.append(_Place(number))
                number += 1
            new[out] = free.pop()
        those = tuple(new[arg] if type(arg) is _Place else arg for arg in args)
        found.append(_Call(function, those, kwargs, new[out]))
        free += [new[place] for place in used[i] if place >= num_lists and last[place] == i]
    return found, number - num_lists


class _Traced(Tensor):
    """Stands for a tensor that is updated, or an intermediate one: functions over lists of these
    compute nothing and are noted. Numbers, as counts of steps, are ordinary tensors."""

    place: _Place
    of_dtype: torch.dtype
    places: Iterator[_Place]  # of those that follow
    noted: list[_Call]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.__name__
        if name in _READERS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        in_place, name = name.endswith("_"), name.removesuffix("_")
        first, *others = map(_of_one, args)
        if name not in _ELEMENTWISE or type(first) is not _Traced:
            raise CannotTraceError(name)
        out = first if in_place else _another(first.of_dtype, first.places, first.noted)
        known = [arg.place if type(arg) is _Traced else arg for arg in (first, *others)]
        kwargs = dict(kwargs or {})
        if name == "_foreach_copy":
            first.noted.append(_Call(function, (known[1],), {}, out.place))
            return None
        if name.startswith("_foreach_addc") and len(known) > 3:
            kwargs["value"] = known.pop()
        of_one = getattr(torch, name.removeprefix("_foreach_"))
        first.noted.append(_Call(of_one, tuple(known), kwargs, out.place))
        return None if in_place else [out]


def _another(dtype: torch.dtype, places: Iterator[_Place], noted: list[_Call]) -> _Traced:
    empty = torch.empty(0, dtype=dtype, device="cpu")
    one: _Traced = Tensor._make_subclass(_Traced, empty)
    one.place, one.of_dtype, one.places, one.noted = next(places), dtype, places, noted
    return one


def _of_one(argument: Any) -> Any:
    """Of a list of one tensor or number that, else the same."""
    return argument[0] if isinstance(argument, (list, tuple)) and argument else argument
