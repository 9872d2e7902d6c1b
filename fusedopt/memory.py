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
    tensor = dtensor.local(tensor)
    return is_plain(tensor) and tensor._is_zerotensor()


def materialized(tensor: Tensor) -> Tensor:
    """A tensor to read from, with the value that one without memory has: one of autograd's zeros,
    or one that ``torch.func.functionalize`` has wrapped, beside which no other can be written."""
    if torch._is_functional_tensor(tensor):
        torch._sync(tensor)  # type: ignore[attr-defined, no-untyped-call]
        tensor = torch._from_functional_tensor(tensor)
    return tensor.clone() if tensor._is_zerotensor() else tensor


def problem(tensor: Any, *, written: bool = True) -> str | None:
    """Why not all of a tensor can be read, or written too; None if it is whole."""
    tensor = dtensor.local(tensor)
    if not is_plain(tensor) or tensor.layout is not torch.strided or tensor.is_nested:
        problems = (problem(part, written=written) for part in parts_of(tensor))
        return next(filter(None, problems), None)
    if tensor.numel() == 0:
        return None
    if is_zero(tensor):
        return "is a ZeroTensor, which has no memory to write to; clone() it" if written else None
    if torch._is_functional_tensor(tensor) or not has_storage(tensor):
        return None
    if tensor.is_meta and not written:
        return "is on the meta device, without data"
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + reach + 1) * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    if tensor.is_meta or needed <= held:
        return None
    return (
        f"has a storage of {held} bytes, but its elements need {needed}; resize the storage back "
        "before step()"
    )


def reading_problem(tensor: Any) -> str | None:
    """Why not all of a tensor can be read; None if it can, or is no tensor."""
    return problem(tensor, written=False)


def has_storage(tensor: Tensor) -> bool:
    """Whether it has memory of its own: inside of torch.func's transforms it is a wrapper."""
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def parts_of(tensor: Any) -> list[Tensor]:
    """The tensors that hold what a tensor of another kind consists of."""
    if is_plain(tensor) and tensor.is_nested:
        return [tensor.detach().values()]
    if is_plain(tensor) and tensor.layout is not torch.strided:
        tensor = tensor.detach()
        if tensor.layout is torch.sparse_coo:
            return [tensor._values(), tensor._indices()]
        if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
            return [tensor.values(), tensor.col_indices(), tensor.crow_indices()]
        if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
            return [tensor.values(), tensor.row_indices(), tensor.ccol_indices()]
        return []
    if hasattr(type(tensor), "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [getattr(tensor, name) for name in names]
    return []
