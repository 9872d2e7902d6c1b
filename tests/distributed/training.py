"""What the ranks train, how it is spread over them, and how two runs are compared."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from cases import SCALARS, bits
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from worlds import mesh

# Of all ranks together; any world of up to four can share it out evenly.
BATCH = 12
# Runs are in float64, where ranks sum up the same numbers as one process does, in another order.
# What an adaptive rule makes of that is far below this, and any mistake is far above.
NEAR = {"rtol": 1e-8, "atol": 1e-9}


class Net(nn.Module):
    """5, 4 and 1 rows: two or three ranks get uneven shards, and some ranks get none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 4)
        self.norm = nn.LayerNorm(4)
        self.last = nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.norm(self.second(self.first(inputs).tanh())))


def net(device: str = "cpu", dtype: torch.dtype = torch.float64) -> Net:
    """Random parameters, the same on all ranks."""
    model = Net().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, dtype=dtype), alpha=0.3)
    return model.to(device)


def draw_batches(count: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> list:
    """Random inputs, the same on all ranks."""
    return [torch.randn(BATCH, 6, dtype=dtype).to(device) for _ in range(count)]


def share(batch: Tensor, ranks: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of this rank."""
    return batch.chunk(dist.get_world_size(ranks))[dist.get_rank(ranks)]


def loss(model: nn.Module, inputs: Tensor) -> Tensor:
    return (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()


def fit(model: nn.Module, opt: torch.optim.Optimizer, batches: Iterable[Tensor]) -> None:
    for inputs in batches:
        opt.zero_grad()
        loss(model, inputs).backward()
        opt.step()


# How a model is spread over the ranks -----------------------------------------------------------


def sharded(model: nn.Module, on: DeviceMesh, **options: Any) -> nn.Module:
    """FSDP2, each layer by itself."""
    for layer in model.children():
        fully_shard(layer, mesh=on, **options)
    return fully_shard(model, mesh=on, **options)


def world_mesh(device: str) -> DeviceMesh:
    return mesh(device, (dist.get_world_size(),), ("ranks",))


def square_mesh(device: str) -> DeviceMesh:
    return mesh(device, (2, 2), ("outer", "inner"))


def _columns(model: nn.Module, device: str) -> nn.Module:
    def placement(p: nn.Parameter) -> Shard:
        return Shard(p.ndim - 1 if p.shape[-1] % dist.get_world_size() == 0 else 0)

    return sharded(model, world_mesh(device), shard_placement_fn=placement)


def _tensor_parallel(model: nn.Module, on: DeviceMesh) -> nn.Module:
    # Not as a local tensor: torch would take the shards of the 5 columns to be even.
    plan = {"first": ColwiseParallel(use_local_output=False), "second": RowwiseParallel()}
    return parallelize_module(model, on, plan)


def _sequence_parallel(model: nn.Module, device: str) -> nn.Module:
    """The gradients of the norm are partial sums, and those of the last layer are replicated,
    while their parameters are replicated and sharded."""
    plan = {
        "first": ColwiseParallel(use_local_output=False),
        "second": RowwiseParallel(output_layouts=Shard(0)),
        "norm": SequenceParallel(sequence_dim=0),
        "last": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
    }
    return parallelize_module(model, world_mesh(device), plan)


def _sharded_tensor_parallel(model: nn.Module, device: str) -> nn.Module:
    """Some parameters on both dimensions of the mesh, some on one."""
    on = square_mesh(device)
    return sharded(_tensor_parallel(model, on["inner"]), on["outer"])


def _mixed(model: nn.Module, device: str) -> nn.Module:
    """Two layers on meshes of their own, the others as ordinary tensors."""
    fully_shard(model.first, mesh=square_mesh(device))
    fully_shard(model.second, mesh=world_mesh(device))

    def average(p: Tensor) -> None:
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()

    for p in [*model.norm.parameters(), *model.last.parameters()]:
        p.register_post_accumulate_grad_hook(average)
    return model


@dataclass(frozen=True)
class Layout:
    """A way to spread a model over so many ranks, and a batch with it."""

    name: str
    size: int
    parallel: Callable[[nn.Module, str], nn.Module]
    # The mesh dimension that shares the batch out; all ranks see all of it if there is none.
    data: Callable[[str], DeviceMesh] | None = world_mesh

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple:
        return _layout, (self.name,)

    def spread(self, model: nn.Module, device: str) -> nn.Module:
        """Makes a copy of the model, spread over the ranks."""
        return self.parallel(copy.deepcopy(model), device)

    def rows(self, batch: Tensor) -> Tensor:
        return share(batch, self.data(batch.device.type).get_group()) if self.data else batch


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("fsdp_2", 2, lambda model, device: sharded(model, world_mesh(device))),
        Layout("fsdp_3", 3, lambda model, device: sharded(model, world_mesh(device))),
        Layout("columns", 2, _columns),
        Layout("hybrid", 4, lambda model, device: sharded(model, square_mesh(device)), None),
        Layout("mixed", 4, _mixed),
        Layout(
            "tensor_parallel",
            2,
            lambda model, device: _tensor_parallel(model, world_mesh(device)),
            None,
        ),
        Layout("sequence_parallel", 2, _sequence_parallel, None),
        Layout(
            "sharded_tensor_parallel",
            4,
            _sharded_tensor_parallel,
            lambda device: square_mesh(device)["outer"],
        ),
    )
}


def _layout(name: str) -> Layout:
    return LAYOUTS[name]


# Comparing --------------------------------------------------------------------------------------


def full(tensor: Tensor) -> Tensor:
    """The values of all shards, on every rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def holds_first_element(tensor: Tensor) -> bool:
    """Whether [0, 0] of the whole tensor is on this rank."""
    if not isinstance(tensor, DTensor):
        return True
    coordinates = zip(tensor.device_mesh.get_coordinate(), tensor.placements, strict=True)
    return all(at == 0 or placement.is_replicate() for at, placement in coordinates)


def assert_close(ours: Any, expected: Any, what: str, **near: float) -> None:
    """Each rank compares what it holds, where torch can say what that is: gathering all of it takes
    a third of a test's time."""
    ours, expected = torch.as_tensor(ours).detach(), torch.as_tensor(expected).detach()
    assert ours.shape == expected.shape, what
    if isinstance(ours, DTensor) and all(type(p) in (Shard, Replicate) for p in ours.placements):
        placed = ours.device_mesh, ours.placements
        if not isinstance(expected, DTensor):
            expected = distribute_tensor(expected, *placed, src_data_rank=None)
        if (expected.device_mesh, expected.placements) == placed:
            ours, expected = local(ours), local(expected)
    ours, expected = (full(t).cpu().double() for t in (ours, expected))
    torch.testing.assert_close(ours, expected, **(near or NEAR), msg=lambda m: f"{what}: {m}")


def assert_trained_alike(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    expected: nn.Module,
    stock: torch.optim.Optimizer,
    **near: float,
) -> None:
    """Parameters and state have the same values, and state is laid out as its parameter."""
    names = [name for name, _ in model.named_parameters()]
    for name, p, q in zip(names, model.parameters(), expected.parameters(), strict=True):
        assert_close(p, q, name, **near)
        here, there = opt.state.get(p, {}), stock.state.get(q, {})
        assert here.keys() == there.keys(), (name, here.keys(), there.keys())
        for key in here:
            assert_close(here[key], there[key], f"{key} of {name}", **near)
    assert_laid_out_as_parameters(opt)


def assert_laid_out_as_parameters(opt: torch.optim.Optimizer) -> None:
    for p, state in opt.state.items():
        for key, value in state.items():
            if key in SCALARS:
                assert type(value) is Tensor
                continue
            assert isinstance(value, DTensor) == isinstance(p, DTensor), (key, type(value))
            assert value.shape == p.shape
            assert local(value).shape == local(p).shape
            assert local(value).stride() == local(p).stride()
            if isinstance(p, DTensor):
                assert (value.device_mesh, value.placements) == (p.device_mesh, p.placements)


def assert_ranks_agree(tensors: Iterable[Tensor]) -> None:
    """Bit for bit."""
    digest = hashlib.sha256(repr([bits(full(t)) for t in tensors]).encode()).hexdigest()
    digests = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    assert len(set(digests)) == 1, digests


def snapshot(opt: torch.optim.Optimizer) -> list:
    """Every bit on this rank that step() and load_state_dict() may write."""

    def freeze(value: Any) -> Any:
        if isinstance(value, DTensor):
            return (value.device_mesh, value.placements, value.shape, bits(local(value)))
        return bits(value) if isinstance(value, Tensor) else value

    return [
        (
            {key: freeze(value) for key, value in group.items() if key != "params"},
            [(freeze(p), freeze(p.grad)) for p in group["params"]],
            [{k: freeze(v) for k, v in opt.state.get(p, {}).items()} for p in group["params"]],
        )
        for group in opt.param_groups
    ]
