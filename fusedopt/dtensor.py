"""DTensors (FSDP2, tensor parallel): every update rule works element by element, so each process
updates the shards that it holds, if parameter, gradient and state are cut and placed alike."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from .problem import Problem

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def dtensor_type() -> type[DTensor] | None:
    """The class; None while nobody has imported it, for then there are no DTensors."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def is_dtensor(tensor: Any) -> TypeGuard[DTensor]:
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    cls = dtensor_type()
    return cls is not None and isinstance(tensor, cls)


def local(tensor: Any) -> Any:
    """What this process holds of a tensor: of a DTensor its shard, else the tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    shard = tensor._local_tensor
    # The gradient of a collective that still runs.
    return shard.wait() if hasattr(shard, "wait") else shard


def with_local(param: Any, held: Tensor) -> Any:
    """As the parameter, with other memory for what this process holds of it, on any device."""
    if not is_dtensor(param):
        return held
    from torch.distributed.tensor import DTensor

    return DTensor(held, param._spec, requires_grad=False)


def check_param(param: Any) -> None:
    """Raises a Problem if its shards cannot be updated one by one."""
    if is_dtensor(param) and any(p.is_partial() for p in param.placements):
        raise Problem(
            ValueError,
            f"it is {placed(param)}, a sum over processes, which cannot be updated shard by shard; "
            "redistribute() it to Shard or Replicate",
        )


def check_grad(param: Any, grad: Any) -> None:
    # A gradient in other placements is redistributed; that does not lead to another mesh.
    if is_dtensor(grad) != is_dtensor(param) or (
        is_dtensor(param) and grad.device_mesh != param.device_mesh
    ):
        raise Problem(ValueError, f"it is {placed(param)}, but its grad is {placed(grad)}")


def check_state(param: Any, key: str, value: Any) -> None:
    if not placed_alike(value, param):
        raise Problem(
            ValueError,
            f"it is {placed(param)}, but state[{key!r}] is {placed(value)}; make the optimizer "
            "after the model is sharded, and load its state with torch.distributed.checkpoint."
            "state_dict.set_optimizer_state_dict",
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


def meshes(tensors: Iterable[Tensor]) -> list[DeviceMesh]:
    """On which meshes they are, in their order."""
    cls = dtensor_type()
    if cls is None:
        return []
    return [*dict.fromkeys(t.device_mesh for t in tensors if isinstance(t, cls))]


def measurable(grad: Tensor) -> tuple[Tensor, DeviceMesh | None, int]:
    """What this process holds of a gradient, on which mesh, and how many processes of it hold the
    same. Sums over processes are computed first, in which all of these must take part."""
    if not is_dtensor(grad):
        return grad, None, 1
    mesh = grad.device_mesh
    if any(placement.is_partial() for placement in grad.placements):
        from torch.distributed.tensor import Replicate

        whole = [Replicate() if p.is_partial() else p for p in grad.placements]
        grad = grad.redistribute(mesh, whole)
    return local(grad), *held_by(grad._spec)


def held_by(spec: Any) -> tuple[DeviceMesh, int]:
    """The mesh of a DTensor that is no sum over processes, and how many of these hold the same."""
    copies = [spec.mesh.size(dim) for dim, p in enumerate(spec.placements) if p.is_replicate()]
    return spec.mesh, math.prod(copies)


def sum_over(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of the values of all processes of a mesh: the same bits on each of them."""
    import torch.distributed as dist

    device = value.device
    value = value.clone()
    for dim in range(mesh.ndim):
        if mesh.size(dim) > 1:
            group = mesh.get_group(dim)
            value = value.to(_reducing_device(group, value.device, mesh))
            dist.all_reduce(value, group=group)
    return value.to(device)


def _reducing_device(group: ProcessGroup, device: torch.device, mesh: DeviceMesh) -> torch.device:
    """Where a process group can reduce what is on a device: NCCL has no backend for the shards that
    FSDP2 offloads to the CPU."""
    types = {supported.type for supported in group._device_types}
    return device if device.type in types else torch.device(mesh.device_type)
