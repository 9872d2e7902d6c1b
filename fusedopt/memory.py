"""Whether the memory of a tensor is there: all of it, and where the kernels would look for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dtensor


def is_plain(tensor: Any) -> bool:
    """Whether it is of torch's own two classes, with nothing between it and its memory."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def is_zero(tensor: Any) -> bool:
    """Whether it is one of autograd's zeros without memory, which can be read and not written."""
    return is_plain(tensor) and tensor._is_zerotensor()


def reading_problem(tensor: Any) -> str | None:
    """Why not all of a tensor can be read; None if it can."""
    return None if is_zero(tensor) else problem(tensor)


def problem(tensor: Any) -> str | None:
    """Why a tensor cannot be written, or not even all of it be read; None if it is whole."""
    tensor = dtensor.local(tensor)
    if is_plain(tensor) and tensor.layout is torch.sparse_coo:
        return problem(tensor._indices()) or problem(tensor._values())
    if not is_plain(tensor) or tensor.layout is not torch.strided or tensor.numel() == 0:
        return None
    if is_zero(tensor):
        return "is a ZeroTensor, which has no memory to write to; clone() it"
    if torch._is_functional_tensor(tensor) or not has_storage(tensor):
        return None
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + reach + 1) * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    if tensor.is_meta or needed <= held:
        return None
    return (
        f"has a storage of {held} bytes, but its elements need {needed}; resize the storage back "
        "before step()"
    )


def has_storage(tensor: Tensor) -> bool:
    """Whether it has memory of its own: inside of torch.func's transforms it is a wrapper."""
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def parts_of(tensor: Any) -> list[Tensor]:
    """The plain tensors that hold what a tensor of another kind consists of."""
    if isinstance(tensor, Tensor) and tensor.layout is torch.sparse_coo:
        return [tensor._values()] if is_plain(tensor) else []
    if hasattr(type(tensor), "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [getattr(tensor, name) for name in names]
    return []
