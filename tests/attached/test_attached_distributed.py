"""Wrappers of torch.distributed around a model whose optimizer is attached."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from cases import same_bits
from conftest import skip_or_fail
from torch import nn

import fusedopt
from attached import ADAMW, attach, batches, network, step


@pytest.fixture
def process_group():
    if not dist.is_available():
        skip_or_fail("torch was built without torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_wrappers_that_reduce_gradients_later(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    class Wrapped(DistributedDataParallel):
        pass

    cpu = torch.device("cpu")

    for wrap, name in [
        (DistributedDataParallel, "DistributedDataParallel"),
        (Wrapped, "DistributedDataParallel"),
        (lambda model: nn.Sequential(Wrapped(model)), "DistributedDataParallel"),
        (lambda model: FullyShardedDataParallel(model, device_id=cpu), "FullyShardedDataParallel"),
    ]:
        model = wrap(network())
        with pytest.raises(ValueError, match=f"{name} reduces gradients after.*fully_shard"):
            fusedopt.attach(model, fusedopt.AdamW)
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.usefixtures("only_by_the_rule")
def test_fully_shard(process_group, backend):
    from torch.distributed.fsdp import fully_shard

    model = network()
    twin = copy.deepcopy(model)
    opt, other = attach(ADAMW, fully_shard(model)), ADAMW.ours(twin.parameters())
    for inputs in batches(3):
        step(model, opt, inputs)
        step(twin, other, inputs)
    for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert same_bits(param.full_tensor(), expected)
