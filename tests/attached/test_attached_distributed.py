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
from attached import ADAMW, attach, batches, gradients, loss, network, step


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


@pytest.mark.parametrize("static_graph", [False, True])
def test_a_model_that_is_wrapped_later(static_graph, process_group, backend):
    """Or whose inside is attached. Its gradients come too late, which is seen at once, or in the
    second backward if the first one learns the graph."""
    from torch.nn.parallel import DistributedDataParallel

    model = network()
    opt = attach(ADAMW, model)
    wrapped = DistributedDataParallel(model, static_graph=static_graph)
    first, second = batches(2)
    if static_graph:
        loss(wrapped, first).backward()
    with pytest.raises(RuntimeError, match="parameter 2.*DistributedDataParallel.*fully_shard"):
        loss(wrapped, second).backward()
    fusedopt.detach(opt)
    opt.zero_grad()
    loss(wrapped, second).backward()
    assert len(gradients(model)) == 3


@pytest.mark.usefixtures("only_by_the_rule")
@pytest.mark.parametrize("has_root", [True, False])
def test_fully_shard(has_root, process_group, backend):
    """Without a root, each layer has a callback at the end of the backward, where some of them
    bring their gradients: then, too, there is something to step."""
    from torch.distributed.fsdp import fully_shard

    model = network()
    twin = copy.deepcopy(model)
    for module in (model[2], model if has_root else model[0]):
        fully_shard(module)
    opt = attach(ADAMW, model)
    other = ADAMW.ours(twin.parameters())
    for inputs in batches(3):
        step(model, opt, inputs)
        step(twin, other, inputs)
    other.zero_grad()
    first, second = batches(2)
    with opt.accumulating():
        loss(model, first).backward()
    loss(model, second).backward()
    for inputs in (first, second):
        loss(twin, inputs).backward()
    other.step()
    for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert same_bits(param.full_tensor(), expected)
