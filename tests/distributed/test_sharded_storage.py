"""Other storage of sharded parameters: codes, scales, remainders, seeds and averages of shards."""

from __future__ import annotations

import contextlib
import copy
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import RICHEST, bits, richest
from seam import formats
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from training import (
    LAYOUTS,
    assert_ranks_agree,
    draw_batches,
    fit,
    full,
    local,
    loss,
    net,
    sharded,
    snapshot,
    world_mesh,
)
from worlds import mesh, on_ranks, on_world

import fusedopt

WAYS = {
    "split, 8-bit state, ema": {"master_weights": "split", "state_dtype": "8bit", "ema": 0.9},
    "stochastic, 8-bit state": {"rounding": "stochastic", "state_dtype": "8bit"},
    "whole master, bf16 state": {"master_weights": "fp32", "state_dtype": torch.bfloat16},
}
ways = pytest.mark.parametrize("way", WAYS)
LAYOUT_NAMES = ["fsdp_3", "columns", "hybrid", "sharded_tensor_parallel", "mixed"]


@contextlib.contextmanager
def all_in_8_bits():
    """Also the small tensors of a small model."""
    before, formats.SMALLEST_8BIT = formats.SMALLEST_8BIT, 0
    try:
        yield
    finally:
        formats.SMALLEST_8BIT = before


def run(dtype=torch.bfloat16):
    return net(dtype=dtype), draw_batches(4, dtype=dtype)


def row(value):
    """Without the padding, a shard's row is what an ordinary tensor has."""
    return local(value).reshape(-1)


@on_ranks()
@pytest.mark.parametrize(
    ("backend", "layout", "way"),
    # Every layout, every way and every backend, but not all of them crossed.
    [
        (backend, LAYOUTS[name], way)
        for backend, name, way in product(("python", "native", "kernels"), LAYOUT_NAMES, WAYS)
        if name == "fsdp_3" or ("split" in way and backend == "native")
    ],
    indirect=["backend"],
    ids=str,
)
def test_shards_change_no_bit(layout, way, backend):
    """Each shard becomes what it would be as an ordinary tensor with the same seed."""
    start, batches = run()
    for case in RICHEST:
        model = layout.spread(start, "cpu")
        opt = case.ours(model.parameters(), **WAYS[way])
        plain = [local(p).clone().requires_grad_() for p in model.parameters()]
        expected = case.ours(plain, **WAYS[way])
        with all_in_8_bits():
            for inputs in map(layout.rows, batches[:3]):
                opt.zero_grad()
                loss(model, inputs).backward()
                for p, q in zip(model.parameters(), plain, strict=True):
                    q.grad = local(p.grad).clone()
                for each in (opt, expected):
                    torch.manual_seed(7)  # ranks that hold copies must seed alike
                    each.step()
        for p, q in zip(model.parameters(), plain, strict=True):
            assert bits(local(p)) == bits(q)
            assert opt.state[p].keys() == expected.state[q].keys()
            for key, there in expected.state[q].items():
                here = opt.state[p][key]
                if key.endswith("_scale") or key == "rounding_state":
                    assert isinstance(here, DTensor) == isinstance(p, DTensor)
                    assert not row(here)[there.numel() :].any()
                    here = row(here)[: there.numel()]
                assert bits(local(here)) == bits(there), (case, key)
        if "ema" in WAYS[way]:
            with opt.swap_ema(), expected.swap_ema():
                for p, q in zip(model.parameters(), plain, strict=True):
                    assert bits(local(p)) == bits(q)
        assert_ranks_agree(model.parameters())


@on_ranks(2)
def test_the_whole_parameter_decides_what_is_small(backend):
    """All ranks store a tensor alike, also where their shards are of a few elements."""
    model = sharded(nn.Linear(formats.SMALLEST_8BIT // 3, 3).bfloat16(), world_mesh("cpu"))
    opt = fusedopt.AdamW(model.parameters(), state_dtype="8bit")
    model(torch.ones(1, formats.SMALLEST_8BIT // 3, dtype=torch.bfloat16)).sum().backward()
    opt.step()
    assert opt.state[model.weight]["exp_avg"].dtype == torch.float32  # 4,095 elements
    model = sharded(nn.Linear(formats.SMALLEST_8BIT, 1).bfloat16(), world_mesh("cpu"))
    opt = fusedopt.AdamW(model.parameters(), state_dtype="8bit")
    model(torch.ones(1, formats.SMALLEST_8BIT, dtype=torch.bfloat16)).sum().backward()
    opt.step()  # the only row is on one rank
    assert opt.state[model.weight]["exp_avg"].dtype == torch.int8
    assert opt.state[model.bias]["exp_avg"].dtype == torch.float32


def save(case, way, folder):
    """And load on as many ranks: training goes on bit for bit."""
    layout = LAYOUTS["fsdp_3"]
    start, batches = run()
    batches = list(map(layout.rows, batches))
    with all_in_8_bits():
        model = layout.spread(start, "cpu")
        fit(model, opt := case.ours(model.parameters(), **WAYS[way]), batches[:2])
        parts = dict(zip("mo", get_state_dict(model, opt), strict=True))
        dcp.save(parts, checkpoint_id=folder)
        gathered = [StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)]
        if WAYS[way].get("master_weights") == "split":  # neither gloo nor NCCL sends int16
            gathered.clear()
        whole = [copy.deepcopy(get_state_dict(model, opt, options=how)) for how in gathered]
        before = states(opt)
        fit(model, opt, batches[2:])

        def check(load):
            other = layout.spread(net(dtype=torch.bfloat16), "cpu")
            loaded = case.ours(other.parameters(), **WAYS[way])
            load(other, loaded)
            assert states(loaded) == before
            fit(other, loaded, batches[2:])
            assert states(loaded) == states(opt)
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                assert bits(local(p)) == bits(local(q))

        def load_parts(other, loaded):
            parts = dict(zip("mo", get_state_dict(other, loaded), strict=True))
            dcp.load(parts, checkpoint_id=folder)
            set_state_dict(other, loaded, model_state_dict=parts["m"], optim_state_dict=parts["o"])

        check(load_parts)
        for how, (weights, state) in zip(gathered, whole, strict=True):
            check(
                lambda other, loaded, how=how, weights=weights, state=state: set_state_dict(
                    other, loaded, model_state_dict=weights, optim_state_dict=state, options=how
                )
            )


def states(opt):
    return [state for _, _, state in snapshot(opt)]


def load_elsewhere(case, way, folder):
    """Rows of other shards are not taken for one's own."""
    layout = LAYOUTS["fsdp_2"]
    with all_in_8_bits():
        model = layout.spread(net(dtype=torch.bfloat16), "cpu")
        opt = case.ours(model.parameters(), **WAYS[way])
        fit(model, opt, map(layout.rows, draw_batches(1, dtype=torch.bfloat16)))
        before = states(opt)
        parts = dict(zip("mo", get_state_dict(model, opt), strict=True))
        with pytest.raises(CheckpointException) as refused:
            dcp.load(parts, checkpoint_id=folder)
        assert "Size mismatch" in str(refused.value.failures)
        assert states(opt) == before


@richest
@pytest.mark.parametrize("way", [way for way in WAYS if "8-bit" in way])
def test_checkpoints(case, way, tmp_path, native):
    arguments = {"case": case, "way": way, "folder": str(tmp_path)}
    on_world(3, save, arguments)
    on_world(2, load_elsewhere, arguments)


@on_ranks(2)
@richest
def test_stock_state_dict(case, native):
    """Has whole tensors of numbers, for stock on any other number of ranks."""
    start, batches = run()
    with all_in_8_bits():
        model = LAYOUTS["fsdp_2"].spread(start, "cpu")
        opt = case.ours(model.parameters(), master_weights="split", state_dtype="8bit")
        fit(model, opt, map(LAYOUTS["fsdp_2"].rows, batches))
        saved = opt.state_dict(stock=True)
    stock = case.stock(alone := [full(p).clone().requires_grad_() for p in model.parameters()])
    whole = copy.copy(saved)
    whole["state"] = {
        at: {key: full(value) if isinstance(value, DTensor) else value for key, value in s.items()}
        for at, s in saved["state"].items()
    }
    stock.load_state_dict(whole)
    for p, q in zip(model.parameters(), alone, strict=True):
        for key, value in stock.state[q].items():
            stored = opt.state[p][key]
            codes = local(stored)
            if not formats.is_code(codes):
                continue
            decoded = formats.decode(codes, row(opt.state[p][f"{key}_scale"]))
            assert torch.equal(decoded, local(saved["state"][_at(opt, p)][key]))
            assert value.shape == p.shape


def _at(opt, param):
    return next(i for i, p in enumerate(opt.param_groups[0]["params"]) if p is param)


@on_ranks(3)
@ways
def test_clipping_and_skipped_steps(way, backend):
    layout = LAYOUTS["fsdp_3"]
    start, batches = run()
    with all_in_8_bits():
        model = layout.spread(start, "cpu")
        opt = fusedopt.AdamW(model.parameters(), max_grad_norm=0.5, amp_fused=True, **WAYS[way])
        fit(model, opt, map(layout.rows, batches[:2]))
        norms = [full(p.grad).float().norm() for p in model.parameters()]
        assert float(opt.grad_norm) == pytest.approx(float(torch.stack(norms).norm()), rel=1e-3)
        grad = local(model.first.weight.grad)
        if dist.get_rank() == 0:
            grad.view(-1)[0] = torch.inf
        before = snapshot(opt)
        opt.step()
        assert snapshot(opt) == before


MOVES = {
    "double and back": lambda model: model.double().float(),
    "half, and it stays": lambda model: model.half(),
    "a forward": lambda model: model(draw_batches(1, dtype=torch.float32)[0]),
    "other shards": lambda model: [_replace_shard(p) for p in model.parameters()],
    "other placements": lambda model: [_replicate(p) for p in model.parameters()],
}


def _replace_shard(p):
    p._local_tensor = local(p).clone()


def _replicate(p):
    p.grad = None
    torch.utils.swap_tensors(p, nn.Parameter(p.detach().redistribute(placements=[Replicate()])))


@on_ranks(2)
@pytest.mark.parametrize("move", MOVES)
def test_a_sharded_model_that_moves_while_it_holds_averages(move, backend):
    model = sharded(net(dtype=torch.float32), world_mesh("cpu"))
    opt = fusedopt.AdamW(model.parameters(), lr=0.1, ema=0.5)
    fit(model, opt, draw_batches(3, dtype=torch.float32))
    expected = [full(p).clone() for p in model.parameters()]
    with opt.swap_ema():
        assert not torch.equal(full(next(model.parameters())), expected[0])
        MOVES[move](model)
    for p, e in zip(model.parameters(), expected, strict=True):
        assert isinstance(p, DTensor) and torch.equal(full(p), e.to(p.dtype))


@on_ranks(2)
def test_a_shard_that_cannot_take_its_weights(backend):
    """Every rank says so, and has what it held."""
    model = sharded(net(dtype=torch.float32), world_mesh("cpu"))
    opt = fusedopt.AdamW(model.parameters(), lr=0.1, ema=0.5)
    fit(model, opt, draw_batches(2, dtype=torch.float32))
    params = [*model.parameters()]
    expected = [full(p).clone() for p in params]
    on = mesh("cpu", (2,), ("elsewhere",))
    with pytest.raises(fusedopt.averages.WeightsNotRestoredError, match="elsewhere") as caught:
        with opt.swap_ema():
            opt.zero_grad()
            torch.utils.swap_tensors(
                params[1], nn.Parameter(distribute_tensor(torch.ones(5), on, [Shard(0)]))
            )
    assert [*caught.value.weights] == [params[1]]
    assert torch.equal(full(caught.value.weights[params[1]]), expected[1])
    assert all(torch.equal(full(p), e) for p, e in zip(params[2:], expected[2:], strict=True))
