"""DTensors (FSDP2, tensor parallel): every update rule works element by element, so each process
updates the shards that it holds, if parameter, gradient and state are cut and placed alike."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

# The dimensions of a mesh over which the elements of a tensor are spread.
Spread = tuple["DeviceMesh", tuple[int, ...]]


def dtensor_type() -> type[DTensor] | None:
    """The class; None while nobody has imported it, for then there are no DTensors."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def is_dtensor(tensor: Any) -> TypeGuard[DTensor]:
    cls = dtensor_type()
    return cls is not None and isinstance(tensor, cls)


def local(tensor: Any) -> Any:
    """What this process holds of a tensor: of a DTensor its shard, else the tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    shard = tensor._local_tensor
    # The gradient of a collective that still runs.
    return shard.wait() if hasattr(shard, "wait") else shard


def check(
    param: Any, grad: Any, state: dict[str, Any], fail: Callable[[type[Exception], str], None]
) -> None:
    """Calls ``fail`` if the shards of a parameter cannot be updated one by one."""
    if is_dtensor(param) and any(p.is_partial() for p in param.placements):
        fail(
            ValueError,
            f"it is {placed(param)}, a sum over processes, which cannot be updated shard by shard; "
            "redistribute() it to Shard or Replicate",
        )
    # A gradient in other placements is redistributed; that does not lead to another mesh.
    if is_dtensor(grad) != is_dtensor(param) or (
        is_dtensor(param) and grad.device_mesh != param.device_mesh
    ):
        fail(ValueError, f"it is {placed(param)}, but its grad is {placed(grad)}")
    for name, value in state.items():
        if not placed_alike(value, param):
            fail(
                ValueError,
                f"it is {placed(param)}, but state[{name!r}] is {placed(value)}; make the "
                "optimizer after the model is sharded, and load its state with "
                "torch.distributed.checkpoint.state_dict",
            )


def placed(tensor: Any) -> str:
    """For messages: where the elements of a tensor are."""
    if not is_dtensor(tensor):
        return "no DTensor"
    return f"a DTensor with placements {tensor.placements} on {tensor.device_mesh}"


def placed_alike(one: Any, other: Any) -> bool:
    """Whether each process holds the same elements of both."""
    if not is_dtensor(one) or not is_dtensor(other):
        return is_dtensor(one) == is_dtensor(other)
    return one.device_mesh == other.device_mesh and all(
        getattr(one._spec, name, None) == getattr(other._spec, name, None)
        for name in ("placements", "shard_order")
    )


def row_per_shard(row: Tensor, param: Any) -> Tensor:
    """What belongs to a shard of a parameter but not to its elements, one by one. The rows of all
    shards are one DTensor, so that a sharded checkpoint has them; for other tensors, the row."""
    shape, placements = rows(row.numel(), param)
    if placements is None:
        return row
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, dtype=row.dtype, device="meta").stride()
    mine = row.view(*[1] * (len(shape) - 1), -1)
    return DTensor.from_local(mine, param.device_mesh, placements, shape=shape, stride=stride)


def rows(length: int, param: Any) -> tuple[torch.Size, list[Any] | None]:
    """The shape and the placements of rows of this length for each shard of a parameter."""
    if not is_dtensor(param):
        return torch.Size([length]), None
    from torch.distributed.tensor import Replicate, Shard

    mesh = param.device_mesh
    spread = [dim for dim, placement in enumerate(param.placements) if not placement.is_replicate()]
    shape = torch.Size([*(mesh.size(dim) for dim in spread), length])
    return shape, [
        Shard(spread.index(dim)) if dim in spread else Replicate() for dim in range(mesh.ndim)
    ]


def is_placed(tensor: Any, param: Any, placements: list[Any] | None) -> bool:
    """Whether it has these placements on the mesh of the parameter; without, no DTensor."""
    if placements is None or not is_dtensor(tensor):
        return placements is None and not is_dtensor(tensor)
    return tensor.device_mesh == param.device_mesh and list(tensor.placements) == placements


def longest_shard(param: Tensor) -> int:
    """Elements of the largest of all shards."""
    sizes = list(param.shape)
    if is_dtensor(param):
        placement: Any  # those of shards have a dimension
        for dim, placement in enumerate(param.placements):
            if not placement.is_replicate():
                sizes[placement.dim] = -(-sizes[placement.dim] // param.device_mesh.size(dim))
    return math.prod(sizes)


def placed_like(grad: Any, param: Any) -> Any:
    """The gradient, redistributed to the placements of its parameter where it has others."""
    if placed_alike(grad, param):
        return grad
    return grad.redistribute(param.device_mesh, param.placements)


def measurable(grad: Tensor) -> tuple[Tensor, Spread | None]:
    """What this process holds of a gradient, and where the rest of it is: a sum of squares over
    these dimensions of the mesh counts every element once."""
    if not is_dtensor(grad):
        return grad, None
    if any(placement.is_partial() for placement in grad.placements):
        from torch.distributed.tensor import Replicate

        whole = [Replicate() if p.is_partial() else p for p in grad.placements]
        grad = grad.redistribute(grad.device_mesh, whole)
    dims = tuple(d for d, p in enumerate(grad.placements) if not p.is_replicate())
    return local(grad), (grad.device_mesh, dims) if dims else None


def sum_over(value: Tensor, spread: Spread) -> Tensor:
    """The sum of the value over all processes that hold parts of a tensor."""
    import torch.distributed as dist

    mesh, dims = spread
    value = value.clone()
    for dim in dims:
        dist.all_reduce(value, group=mesh.get_group(dim))
    return value
