"""Shards and nested parameters whose memory is gone or cut short."""

from __future__ import annotations

import pytest
import torch
from cases import bits, leaf, richest_by_options
from torch import nn

import fusedopt
from memory import cut, zeros


@pytest.fixture
def one_rank(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@richest_by_options
@pytest.mark.usefixtures("only_by_the_rule")
def test_shards_without_memory(case, backend, one_rank):
    from torch.distributed.tensor import DTensor, Shard

    def shard(value):
        return DTensor.from_local(value, one_rank, [Shard(0)])

    value = torch.randn(8)
    param, twin = nn.Parameter(shard(value.clone())), leaf(value)
    opts = [case.ours([param]), case.ours([twin])]
    for step in range(4):
        grad = torch.randn(8)
        param.grad, twin.grad = shard(grad.clone()), grad.clone()
        if step in (0, 2):
            param.grad, twin.grad = shard(zeros(8)), torch.zeros(8)
        for opt in opts:
            opt.step()
    assert bits(param._local_tensor) == bits(twin)
    for tensor in (param, param.grad, *opts[0].state[param].values()):
        local = getattr(tensor, "_local_tensor", tensor)
        full, before = local.untyped_storage().nbytes(), bits(local)
        cut(local, full - 1)
        with pytest.raises(RuntimeError, match=f"has a storage of {full - 1} bytes"):
            opts[0].step()
        cut(local, full)
        assert bits(local)[:3] == before[:3]


def test_nested_parameters_whose_memory_is_cut_short(backend):
    param = nn.Parameter(torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]))
    opt = fusedopt.SGD([param], lr=0.1, momentum=0.9)
    for _ in range(2):
        opt.zero_grad()
        torch.nested.to_padded_tensor(param, 0.0).sum().backward()
        opt.step()
    for tensor in (param, param.grad, opt.state[param]["momentum_buffer"]):
        values = tensor.detach().values()
        kept = values.clone()
        cut(values, 71)
        with pytest.raises(RuntimeError, match="parameter 0 .*nested tensor"):  # torch sees it
            opt.step()
        cut(values, 72)
        values.copy_(kept)
    opt.step()
