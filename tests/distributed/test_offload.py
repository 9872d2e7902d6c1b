"""The optimizer on the host, of shards (FSDP2, tensor parallel) and of replicas (DDP)."""

from __future__ import annotations

import copy
import random

import pytest
import seam
from cases import richest, same_bits
from offloaded import ADAMW, FaultyLink, offload
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import (
    LAYOUTS,
    assert_ranks_agree,
    draw_batches,
    fit,
    net,
    sharded,
    share,
    snapshot,
    world_mesh,
)
from worlds import on_ranks

import fusedopt

WAYS = [
    {"chunk": 100},
    {"overlap": "forward"},
    {"gradients": "device", "chunk": 100, "max_grad_norm": 0.1},
    {"max_grad_norm": 0.1},
]
# Every layout and every way, but not all of them crossed.
layouts_and_ways = [
    (layout, way)
    for at, layout in enumerate(LAYOUTS.values())
    for w, way in enumerate(WAYS)
    if at in (0, 4) or w == at % len(WAYS)
]


def slow(build, link=FaultyLink):
    """Copies are made in any order, late."""
    with pytest.MonkeyPatch.context() as patch:
        seam.make_links(patch, lambda device: link(device, random))
        return build()


@on_ranks()
@pytest.mark.parametrize(("layout", "way"), layouts_and_ways, ids=str)
def test_the_bits_of_the_shards_without_it(layout, way, device="cpu"):
    start = net(device)
    model, twin = (layout.spread(start, device) for _ in range(2))
    options = {name: way[name] for name in way if name == "max_grad_norm"}
    params = model if way.get("overlap") == "forward" else model.parameters()
    opt = slow(lambda: offload(ADAMW, params, **way))
    other = ADAMW.ours(twin.parameters(), **options)
    for inputs in map(layout.rows, draw_batches(4, device)):
        fit(model, opt, [inputs])
        fit(twin, other, [inputs])
    assert_same(opt, other)


def assert_same(opt, other):
    opt.synchronize()
    for each in (opt, other):
        each.zero_grad()
    assert snapshot(opt) == snapshot(other)


class Unjoined(FaultyLink):
    """For a stream that waits for nobody: that in which FSDP gathers parameters."""

    def join(self, event):
        if not event.is_upload:
            super().join(event)


@on_ranks(2)
def test_what_fsdp_gathers_is_there_for_all_streams(device="cpu"):
    start, (*batches, last) = net(device), draw_batches(4, device)
    model, twin = (sharded(copy.deepcopy(start), world_mesh(device)) for _ in range(2))
    opt = slow(lambda: offload(ADAMW, model, overlap="forward", chunk=100, keep_below=0), Unjoined)
    other = ADAMW.ours(twin.parameters())
    for each in ((model, opt), (twin, other)):
        fit(*each, map(share, batches))
    outputs = [each(share(last)) for each in (model, twin)]
    assert same_bits(*outputs)


@on_ranks(2)
@richest
def test_checkpoints_of_shards(case, device="cpu"):
    """To and from an optimizer that is not offloaded, with torch's functions for these."""
    start, (first, *batches) = net(device), draw_batches(4, device)
    model, twin = (sharded(copy.deepcopy(start), world_mesh(device)) for _ in range(2))
    opt, other = offload(case, model.parameters()), case.ours(twin.parameters())
    fit(model, opt, [share(first)])
    set_optimizer_state_dict(twin, other, copy.deepcopy(get_optimizer_state_dict(model, opt)))
    twin.load_state_dict(model.state_dict())
    again = sharded(copy.deepcopy(start), world_mesh(device))
    third = offload(case, again.parameters())
    fit(twin, other, [share(batches[0])])
    fit(model, opt, [share(batches[0])])
    set_optimizer_state_dict(again, third, copy.deepcopy(get_optimizer_state_dict(twin, other)))
    again.load_state_dict(twin.state_dict())
    for each in ((model, opt), (twin, other), (again, third)):
        fit(*each, map(share, batches[1:]))
    assert_same(opt, other)
    assert_same(third, other)


@on_ranks(2)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}], ids=str)
def test_replicas(options, device="cpu"):
    """DistributedDataParallel reduces gradients after they were accumulated, so they stay where
    they are until step()."""
    start, batches = net(device), draw_batches(4, device)
    model, twin = (DistributedDataParallel(copy.deepcopy(start)) for _ in range(2))
    with pytest.raises(ValueError, match='DistributedDataParallel.*gradients="device"'):
        offload(ADAMW, model)
    opt = slow(lambda: offload(ADAMW, model, gradients="device", chunk=100, **options))
    other = ADAMW.ours(twin.parameters(), **options)
    fit(model, opt, map(share, batches))
    fit(twin, other, map(share, batches))
    assert_same(opt, other)
    assert_ranks_agree(model.parameters())


@on_ranks(2)
def test_shards_that_are_on_the_host_already(device="cpu"):
    model = fully_shard(
        net(device), mesh=world_mesh(device), offload_policy=CPUOffloadPolicy(False)
    )
    for params in (model, model.parameters()):
        with pytest.raises(ValueError, match="steps them where they are.*CPUOffloadPolicy"):
            fusedopt.offload(params, fusedopt.AdamW)
