"""The norm of all gradients where a process has some of them only: all communicate alike."""

from __future__ import annotations

import functools
import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import RICHEST_OF, each_class_or_backend
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.overrides import TorchFunctionMode
from training import draw_batches, fit, local, net, sharded, square_mesh, world_mesh
from worlds import mesh, on_ranks

import fusedopt


def parameter(values, on, placements):
    return distribute_tensor(values, on, placements).detach().requires_grad_()


def agreed(value):
    """Asserts that all ranks have the same bits, and returns them."""
    values = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value)
    assert all(torch.equal(v, value) for v in values), values
    return value


def measured(params, *, case=RICHEST_OF["SGD"]):
    """The norm by clip_grad_norm_ and by a step, which all ranks agree on."""
    opt = case.ours(params, max_grad_norm=0.5)
    opt.step()
    norm = agreed(opt.grad_norm)
    by_function = agreed(fusedopt.clip_grad_norm_(params, 1e9).double())
    torch.testing.assert_close(by_function, norm)
    return norm


def two_meshes():
    """Of the same ranks, with process groups of their own."""
    return mesh("cpu", (dist.get_world_size(),), ("one",)), mesh(
        "cpu", (dist.get_world_size(),), ("another",)
    )


def shards(size=3):
    """A parameter on each mesh, and of one rank what it holds."""
    world = dist.get_world_size()
    values = [torch.randn(world * size, dtype=torch.float64) for _ in range(2)]
    params = [parameter(v, on, [Shard(0)]) for v, on in zip(values, two_meshes(), strict=True)]
    return params, [torch.randn_like(v) for v in values]


def set_grads(params, grads, missing):
    """Returns the norm of what is there: what is missing on a rank is as zero."""
    rank, total = dist.get_rank(), 0.0
    for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
        parts = grad.chunk(dist.get_world_size())
        there = [part for r, part in enumerate(parts) if (r, i) not in missing]
        total += sum(part.square().sum().item() for part in there)
        has = (rank, i) not in missing
        p.grad = DTensor.from_local(parts[rank].clone(), p.device_mesh, [Shard(0)]) if has else None
    return math.sqrt(total)


MISSING = [
    {(0, 0)},
    {(0, 1)},
    {(1, 0)},
    {(0, 1), (1, 0)},
    {(0, 0), (1, 0)},
    {(0, 0), (0, 1)},
    {(0, 0), (0, 1), (1, 1)},
    {(0, 0), (0, 1), (1, 0), (1, 1)},
]


@on_ranks(2)
@each_class_or_backend
@pytest.mark.parametrize("missing", MISSING, ids=str)
def test_gradients_that_are_missing_on_a_rank(case, missing, backend):
    """Of two process groups. A rank without any gradient takes part, too."""
    params, grads = shards()
    expected = set_grads(params, grads, missing)
    norm = measured(params, case=case)
    torch.testing.assert_close(norm.item(), expected)


@on_ranks(2)
@pytest.mark.parametrize("missing", MISSING[:6], ids=str)
def test_steps_with_gradients_that_are_missing(missing, backend):
    """Every rank clips by the same factor, whichever of the groups it hears of first."""
    params, grads = shards()
    norm = set_grads(params, grads, missing)
    before = [local(p).clone() for p in params]
    opt = fusedopt.SGD(params, lr=1.0, max_grad_norm=norm / 2)
    for _ in range(3):
        opt.step()
    factor = norm / 2 / (norm + 1e-6)
    for p, was in zip(params, before, strict=True):
        expected = was if p.grad is None else was - 3 * factor * local(p.grad)
        torch.testing.assert_close(local(p), expected)


@on_ranks(2)
@pytest.mark.parametrize("frozen", ["first", "last", "on one rank"])
def test_frozen_parameters(frozen, backend):
    params, grads = shards()
    at = {"first": 0, "last": 1}.get(frozen, dist.get_rank())
    params[at].requires_grad_(False)
    missing = {(0, 0), (1, 1)} if frozen == "on one rank" else {(0, at), (1, at)}
    expected = set_grads(params, grads, missing)
    torch.testing.assert_close(measured(params).item(), expected)


@on_ranks(2)
@each_class_or_backend
def test_plain_tensors_beside_them(case, backend):
    params, grads = shards()
    plain = nn.Parameter(torch.randn(5, dtype=torch.float64))
    plain.grad = torch.full_like(plain, 2.0)
    for order in ([plain, *params], [*params, plain], [params[0], plain, params[1]]):
        expected = set_grads(params, grads, {(0, 0), (1, 1)})
        opt = case.ours(order, max_grad_norm=0.5)
        opt.step()
        torch.testing.assert_close(agreed(opt.grad_norm).item(), math.hypot(expected, 20**0.5))
    plain.grad = torch.full_like(plain, 2.0) if dist.get_rank() == 0 else None
    set_grads(params, grads, {(0, 0), (0, 1)})
    assert measured([plain, *params]) > 0


@on_ranks(2)
def test_replicated_parameters_that_differ(backend):
    """Ranks that hold the same parameter and have a gradient or none agree on a norm."""
    on = world_mesh("cpu")
    one = parameter(torch.randn(4), on, [Replicate()])
    other = parameter(torch.randn(4), on, [Shard(0)])
    grad = torch.randn(4)
    if dist.get_rank() == 0:
        one.grad = distribute_tensor(grad, on, [Replicate()], src_data_rank=None)
    else:
        other.grad = DTensor.from_local(torch.full((2,), 3.0), on, [Shard(0)])
    norm = measured([one, other])
    torch.testing.assert_close(norm.item() ** 2, grad.double().square().sum().item() / 2 + 18)


@on_ranks(4)
@each_class_or_backend
def test_meshes_within_meshes(case, backend):
    """Parameters on both dimensions, on one of them, replicated, and on none."""
    on = square_mesh("cpu")
    kinds = [
        (on, [Shard(0), Shard(0)]),
        (on, [Replicate(), Shard(0)]),
        (on, [Replicate(), Replicate()]),
        (on["outer"], [Shard(0)]),
        (on["inner"], [Shard(0)]),
    ]
    values = [torch.randn(8, dtype=torch.float64) for _ in kinds]
    grads = [torch.randn_like(v) for v in values]
    params = [parameter(v, *kind) for v, kind in zip(values, kinds, strict=True)]
    for p, grad, kind in zip(params, grads, kinds, strict=True):
        p.grad = distribute_tensor(grad, *kind)
    expected = math.sqrt(sum(grad.square().sum().item() for grad in grads))
    torch.testing.assert_close(measured(params, case=case).item(), expected)
    if dist.get_rank() in (1, 2):
        params[dist.get_rank()].grad = params[4].grad = None
    measured(params)


@on_ranks(2)
@each_class_or_backend
def test_ranks_that_hold_nothing(case, backend):
    """(1, 3) in two shards: the second is empty."""
    on, other = two_meshes()
    values = [torch.randn(1, 3), torch.randn(1, 2)]
    params = [parameter(v, m, [Shard(0)]) for v, m in zip(values, (on, other), strict=True)]
    grads = [torch.randn_like(v) for v in values]
    for p, grad in zip(params, grads, strict=True):
        p.grad = distribute_tensor(grad, p.device_mesh, [Shard(0)])
    if dist.get_rank() == 1:
        params[0].grad = None
    expected = math.sqrt(sum(grad.double().square().sum().item() for grad in grads))
    torch.testing.assert_close(measured(params, case=case).item(), expected)


@on_ranks(2)
def test_partial_gradients_among_missing_ones(backend):
    """They are summed by all ranks, which all have them; other gradients may be missing."""
    on, other = two_meshes()
    params = [
        parameter(torch.randn(4), on, [Replicate()]),
        parameter(torch.randn(4), other, [Shard(0)]),
    ]
    params[0].grad = DTensor.from_local(torch.full((4,), 1.5), on, [Partial()])
    if dist.get_rank() == 0:
        params[1].grad = DTensor.from_local(torch.full((2,), 4.0), other, [Shard(0)])
    torch.testing.assert_close(measured(params).item(), math.sqrt(4 * 9 + 2 * 16))


@on_ranks(2)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_all_ranks_skip(value, backend):
    """The norm is not finite on any rank if it is not on one."""
    params, grads = shards()
    set_grads(params, grads, {(1, 0)})
    opt = fusedopt.SGD(params, lr=1.0, max_grad_norm=1.0, amp_fused=True)
    if dist.get_rank() == 0:
        local(params[0].grad)[0] = value
    before = [local(p).clone() for p in params]
    opt.step()
    assert not opt.grad_norm.isfinite()
    assert all(torch.equal(local(p), was) for p, was in zip(params, before, strict=True))
    if math.isinf(value):
        agreed(opt.grad_norm)
    with pytest.raises(RuntimeError, match="non-finite"):
        fusedopt.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)


@on_ranks(2)
def test_a_layer_that_a_rank_does_not_use(backend):
    """As a user gets there: gradients set to None on one rank after the backward."""
    model = sharded(net(), world_mesh("cpu"))
    opt = fusedopt.AdamW(model.parameters(), max_grad_norm=0.1)
    fit(model, opt, draw_batches(2))
    if dist.get_rank() == 0:
        model.second.zero_grad()
    opt.step()
    agreed(opt.grad_norm)


# On which device ---------------------------------------------------------------------------------


class CopiesToGpus(TorchFunctionMode):
    """What is copied to a GPU, which this machine may not have, stays on the CPU; ``targets`` says
    where it should have gone."""

    def __init__(self):
        super().__init__()
        self.targets = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and isinstance(args[1], torch.device):
            self.targets.append(args[1].type)
            args = (args[0], torch.device("cpu"), *args[2:])
        return func(*args, **(kwargs or {}))


def offloaded(values, on):
    """Shards on the CPU, on a mesh of GPUs: what FSDP2 makes with CPUOffloadPolicy."""
    shape = torch.Size([len(values) * on.size()])
    meta = TensorMeta(shape, (1,), values.dtype)
    return DTensor(values, DTensorSpec(on, (Shard(0),), tensor_meta=meta), requires_grad=False)


@on_ranks(2)
@pytest.mark.parametrize("call", ["step", "clip_grad_norm_"])
def test_shards_on_the_cpu_of_a_mesh_of_gpus(call, backend):
    """Of a group without a backend for the CPU, as NCCL's. Its sum is of a tensor on the mesh's
    device; where that is none of this machine's, the group of all ranks takes its place."""
    group, on = _group_of_gpus()
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        dist.all_reduce(torch.zeros(1), group=group)
    p = offloaded(torch.randn(3), on).requires_grad_()
    p.grad = offloaded(torch.randn(3), on)
    act = {
        "step": fusedopt.SGD([p], lr=0.1, max_grad_norm=1.0).step,
        "clip_grad_norm_": lambda: fusedopt.clip_grad_norm_([p], 1.0),
    }[call]
    expected = [torch.zeros(3) for _ in range(2)]
    dist.all_gather(expected, local(p.grad))
    norm = torch.cat(expected).double().norm()
    factor = min(1.0, 1.0 / (norm.item() + 1e-6))
    before, grad = local(p).clone(), local(p.grad).clone()
    all_reduce, groups = dist.all_reduce, []

    def among_all(value, group=None):
        groups.append((group, [*copies.targets]))
        all_reduce(value)

    with CopiesToGpus() as copies, mock.patch.object(dist, "all_reduce", among_all):
        act()
    [(reduced_on, targets)] = groups
    assert reduced_on is group and targets[-1] == "cuda"
    assert copies.targets[len(targets)] == "cpu"
    if call == "step":
        torch.testing.assert_close(local(p), before - 0.1 * factor * grad)
    else:
        torch.testing.assert_close(local(p.grad), factor * grad)


@functools.cache
def _group_of_gpus():
    """One of a kind, and a mesh with it."""
    group = dist.new_group(backend="cuda:gloo")
    assert {device.type for device in group._device_types} == {"cuda"}
    return group, DeviceMesh.from_group(group, "cuda")
