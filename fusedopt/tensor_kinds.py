"""Tensors that are not memory with strides: sparse, nested and MKL-DNN layouts, subclasses that say
themselves what an operator does, tensors without data, and those inside ``torch.func``."""

from __future__ import annotations

import contextlib
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from . import dtensor

_ORDINARY_TYPES = (Tensor, torch.nn.Parameter)
_ORDINARY_FUNCTIONS = (
    Tensor.__torch_function__.__func__,  # type: ignore[attr-defined]
    torch._C._disabled_torch_function_impl,
)


def is_unusual(tensor: Any) -> bool:
    """Whether only torch's operators can read and write it. Of DTensors, what this process holds
    counts."""
    if type(tensor) not in _ORDINARY_TYPES:
        tensor = dtensor.local(tensor)
        if has_own_operators(tensor):
            return True
    return (
        tensor.layout is not torch.strided
        or tensor.is_nested
        or torch._is_functional_tensor(tensor)
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def is_traced() -> bool:
    """Whether ``make_fx`` records operators: a native step would not be in its graph."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def is_transforming() -> bool:
    """Whether a transformation of ``torch.func`` runs, which also takes the tensors that are made
    meanwhile."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def shape(tensor: Tensor) -> tuple[Any, ...]:
    """Its sizes; those of each component if they differ (nested tensors of strided layout)."""
    if tensor.is_nested and tensor.layout is torch.strided:
        return tuple(map(tuple, tensor._nested_tensor_size().tolist()))
    return tuple(tensor.shape)


def is_virtual(tensor: Any) -> bool:
    """Whether it has no memory of its own: fake, or what ``torch.func`` puts in the place of a
    tensor."""
    if type(tensor) not in _ORDINARY_TYPES:
        tensor = dtensor.local(tensor)
    return (
        torch._is_functional_tensor(tensor)
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or isinstance(tensor, FakeTensor)
    )


def has_own_operators(tensor: Any) -> bool:
    """Whether its class replaces operators or functions of torch."""
    cls = type(dtensor.local(tensor))
    if cls in _ORDINARY_TYPES or hasattr(cls, "wait"):
        return False  # wait: the result of a collective, which becomes an ordinary tensor when read
    function: Any = cls.__torch_function__
    return (
        cls.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl
        or getattr(function, "__func__", function) not in _ORDINARY_FUNCTIONS
    )


def is_coo(tensor: Any) -> bool:
    """Whether it is sparse and otherwise ordinary: what the sparse updates take as gradient."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.sparse_coo
        and not has_own_operators(tensor)
    )


def is_fake(tensor: Any) -> TypeGuard[FakeTensor]:
    """Whether it has shape, dtype and device, but no data (``FakeTensorMode``)."""
    return isinstance(dtensor.local(tensor), FakeTensor)


def inactive_mode(tensor: Any) -> contextlib.AbstractContextManager[Any] | None:
    """The mode of a fake tensor, unless it is active: what is made beside it must be fake too."""
    if not is_fake(tensor):
        return None
    mode: Any = dtensor.local(tensor).fake_mode
    return None if _active_mode() is mode else mode


def _active_mode() -> Any:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def number(tensor: Tensor) -> float | None:
    """The value of a tensor of one number; None if it is a fake one that has no value.

    Fake are also tensors that were computed on the CPU from numbers alone, and those know theirs.
    """
    if not is_fake(tensor):
        if _active_mode() is None:
            return tensor.item()
        with unset_fake_temporarily():
            return tensor.item()
    constant: Tensor | None = tensor.constant
    if constant is None:
        return None
    with unset_fake_temporarily():
        return constant.item()


def check_number(tensor: Tensor) -> None:
    """Raises what ``float`` raises if it is not one number."""
    if is_fake(tensor):
        tensor.reshape(())
        return
    with unset_fake_temporarily():
        float(tensor.detach())


def copy(tensor: Tensor) -> Tensor | None:
    """A copy to restore it from; None if there is none to have."""
    if tensor.dim() if is_fake(tensor) else _active_mode() is not None:
        # Without values; an estimate of memory would count the copy. While there are fake tensors,
        # torch writes no others.
        return None
    if not has_own_operators(tensor):
        return tensor.clone()
    try:
        return tensor.clone()
    except Exception:  # whatever a class raises that has no clone
        return None


def first_unusual(*tensors: Any) -> str | None:
    """For messages: what is unusual about the first of them that is not ordinary."""
    names = (name(t) for t in tensors if isinstance(t, Tensor) and is_unusual(t))
    return next(names, "traced by make_fx" if is_traced() else None)


def name(tensor: Tensor) -> str:
    """For messages: what is unusual about it."""
    held = dtensor.local(tensor)
    if has_own_operators(held):
        return f"of type {type(held).__name__}"
    if held.layout is not torch.strided:
        return f"of layout {held.layout}"
    if held.is_nested:
        return "a nested tensor"
    return "inside a transformation of torch.func"


def is_lazy_view(tensor: Tensor) -> bool:
    """Whether its elements are those in memory negated or conjugated: torch writes such a tensor
    only alone."""
    return tensor.is_neg() or tensor.is_conj()


def write(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Copies values into tensors, in one call where they are ordinary."""
    if not any(is_unusual(tensor) or is_lazy_view(tensor) for tensor in tensors):
        torch._foreach_copy_(tensors, values)
        return
    for tensor, value in zip(tensors, values, strict=True):
        if tensor.layout in _COMPRESSED and tensor._nnz() != value._nnz():
            tensor.resize_as_sparse_(value)
        tensor.copy_(value)


_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
