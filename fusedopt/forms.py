"""What tensors are, but for their memory and values, and whether others are the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

# A property of tensors, one after the other.
Property = Callable[[Iterable[Tensor]], Iterable[Any]]

# The type comes first: of other tensors than torch's own nothing more is asked. Those without
# strides, sparse and nested ones, raise RuntimeError.
_FIRST: tuple[Property, ...] = (
    functools.partial(map, type),
    functools.partial(map, Tensor.stride),
)
_OTHERS: tuple[Property, ...] = (
    *(functools.partial(map, attrgetter(name)) for name in ("dtype", "shape", "device")),
    functools.partial(map, Tensor.is_neg),
    functools.partial(map, Tensor._is_zerotensor),  # which no address tells from an empty one
)


class Forms:
    """Of many tensors. What the guards of Dynamo compare in one call takes them 40 ns for a tensor,
    and properties 310 (torch 2.13)."""

    __slots__ = ("_first", "_guards", "_others")

    def __init__(self, tensors: list[Any]) -> None:
        self._first = listed(_FIRST, tensors)
        self._guards = _guards_of(tensors) if can_use_guards() else None
        self._others = [] if self._guards else listed(_OTHERS, tensors)

    def are_those_of(self, tensors: list[Any]) -> bool:
        """Whether type, layout, dtype, device, shape, strides, and what torch makes of an element
        that it reads, are the same. The guards also ask what may differ without harm.

        Raises:
            RuntimeError: a tensor has no strides. (Of these the guards would end the process.)
        """
        if not are_equal(_FIRST, tensors, self._first):
            return False
        if self._guards is not None:
            return bool(self._guards.check(*tensors))
        return are_equal(_OTHERS, tensors, self._others)


def listed(properties: Iterable[Property], tensors: list[Any]) -> list[list[Any]]:
    return [[*of(tensors)] for of in properties]


def are_equal(properties: Iterable[Property], tensors: list[Any], to: list[list[Any]]) -> bool:
    return all(map(list.__eq__, ([*of(tensors)] for of in properties), to))


def _guards_of(tensors: list[Any]) -> Any:
    """None if they do not know the tensors themselves again, as where one is there twice."""
    of: Any = torch._C._dynamo.guards.TensorGuards
    guards = of(
        *tensors,
        dynamic_dims_sizes=[[*tensor.shape] for tensor in tensors],
        dynamic_dims_strides=[[*tensor.stride()] for tensor in tensors],
    )
    return guards if guards.check(*tensors) else None


@functools.cache
def can_use_guards() -> bool:
    """Whether the guards, which are no public part of torch, see in the installed one what they
    must see. Else properties are compared."""
    one = torch.zeros(3, 2, device="cpu", dtype=torch.float32)
    try:
        guards = _guards_of([one])
        is_same = guards is not None and guards.check(one.clone())
        return is_same and not any(map(guards.check, _different_ones(one)))
    except (AttributeError, TypeError, SystemError, RuntimeError):
        return False


def _different_ones(one: Tensor) -> Iterator[Tensor]:
    """Tensors that differ from a matrix of float32 in one respect each."""
    yield torch.nn.Parameter(one, requires_grad=False)
    yield from (one.double(), one.half(), one.bfloat16(), one.to("meta"), one.to_sparse())
    yield from (one.t(), one.reshape(-1), one[:1], one.t().contiguous().t())
    yield from (torch._neg_view(one), torch._efficientzerotensor(one.shape))
