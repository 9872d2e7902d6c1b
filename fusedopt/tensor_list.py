"""Many tensors as one value: an update rule computes on it as on a tensor, with one call of torch
for all of them."""

from __future__ import annotations

from typing import Any, Union

import torch
from torch import Tensor

Operand = Union["TensorList", float]


class TensorList:
    """Tensors of one dtype and device, in out-of-place operators that give each of them the bits
    that it would have alone. The other operand is as long a list, or a number."""

    __slots__ = ("tensors",)

    def __init__(self, tensors: tuple[Tensor, ...] | list[Tensor]) -> None:
        self.tensors = tensors

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    def __neg__(self) -> TensorList:
        return TensorList(torch._foreach_neg(self.tensors))

    def __add__(self, other: Operand) -> TensorList:
        return TensorList(torch._foreach_add(self.tensors, _plain(other)))

    def __sub__(self, other: Operand) -> TensorList:
        return TensorList(torch._foreach_sub(self.tensors, _plain(other)))

    def __mul__(self, other: Operand) -> TensorList:
        return TensorList(torch._foreach_mul(self.tensors, _plain(other)))

    def __truediv__(self, other: Operand) -> TensorList:
        return TensorList(torch._foreach_div(self.tensors, _plain(other)))

    __radd__, __rmul__ = __add__, __mul__

    def abs(self) -> TensorList:
        return TensorList(torch._foreach_abs(self.tensors))

    def sign(self) -> TensorList:
        return TensorList(torch._foreach_sign(self.tensors))

    def sqrt(self) -> TensorList:
        return TensorList(torch._foreach_sqrt(self.tensors))

    def lerp(self, end: TensorList, weight: float) -> TensorList:
        return TensorList(torch._foreach_lerp(self.tensors, end.tensors, weight))

    def clamp(self, *, max: float) -> TensorList:
        return TensorList(torch._foreach_clamp_max(self.tensors, max))

    def maximum(self, other: TensorList) -> TensorList:
        return TensorList(torch._foreach_maximum(self.tensors, other.tensors))

    def detach(self) -> TensorList:
        return self


def _plain(operand: Any) -> Any:
    return operand.tensors if isinstance(operand, TensorList) else operand
