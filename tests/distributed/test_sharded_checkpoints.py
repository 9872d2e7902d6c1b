"""torch.distributed.checkpoint: between world sizes, layouts, and stock and ours."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import RICHEST_OF, each_class_or_backend, richest
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from training import (
    LAYOUTS,
    assert_laid_out_as_parameters,
    assert_trained_alike,
    draw_batches,
    fit,
    loss,
    net,
    share,
    snapshot,
)
from worlds import on_ranks, on_world

import fusedopt


def groups(model):
    return [
        {"params": [*model.first.parameters(), *model.norm.parameters()]},
        {"params": [*model.second.parameters(), *model.last.parameters()], "lr": 0.02},
    ]


def spread(model, layout):
    return LAYOUTS[layout].spread(model, "cpu") if layout else copy.deepcopy(model)


def rows(batches, layout):
    return map(LAYOUTS[layout].rows, batches) if layout else batches


# State without a count of steps, with one, and from the start: the names mean nothing here.
kinds = pytest.mark.parametrize(
    "case", [RICHEST_OF[name] for name in ("SGD", "AdamW", "Adagrad")], ids=lambda case: case.name
)


# All worlds draw the same numbers.
def run():
    return net(), draw_batches(5)


def save(case, folder, layout, options):
    start, batches = run()
    for name in ("stock", "ours"):
        model = spread(start, layout)
        opt = getattr(case, name)(groups(model))
        fit(model, opt, rows(batches[:3], layout))
        weights, state = get_state_dict(model, opt, options=StateDictOptions(**options))
        if options.get("full_state_dict"):
            if dist.get_rank() == 0:
                torch.save((weights, state), Path(folder, name))
        else:
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=Path(folder, name))
    dist.barrier()


def go_on(case, folder, layout, options):
    """In a model of other values, to where an uninterrupted run in one process goes."""
    start, batches = run()
    fit(start, stock := case.stock(groups(start)), batches)
    other, full = net(), options.get("full_state_dict")
    for saver, loader in (("ours", "ours"), ("stock", "ours"), ("ours", "stock")):
        model = spread(other, layout)
        opt = getattr(case, loader)(groups(model))
        if full:
            weights, state = {}, {}
            if dist.get_rank() == 0:
                weights, state = torch.load(Path(folder, saver), weights_only=True)
            options = {"full_state_dict": True, "broadcast_from_rank0": dist.get_world_size() > 1}
        else:
            weights, state = get_state_dict(model, opt, options=StateDictOptions(**options))
            dcp.load({"model": weights, "optimizer": state}, checkpoint_id=Path(folder, saver))
        set_model_state_dict(model, weights, options=StateDictOptions(**options))
        set_optimizer_state_dict(model, opt, state, options=StateDictOptions(**options))
        assert [group["lr"] for group in opt.param_groups] == [
            group["lr"] for group in stock.param_groups
        ]
        assert_laid_out_as_parameters(opt)
        fit(model, opt, rows(batches[3:], layout))
        assert_trained_alike(model, opt, start, stock)


def travel(case, folder, options, *layouts):
    """Saved with the first layout, and loaded with each of the others; None is one process."""

    def call(function, layout):
        arguments = {"case": case, "folder": str(folder), "options": options, "layout": layout}
        size = LAYOUTS[layout].size if layout else 1
        on_world(size, function, arguments)

    first, *others = layouts
    call(save, first)
    for layout in others:
        call(go_on, layout)


@kinds
def test_resharding(case, tmp_path, native):
    travel(case, tmp_path, {}, "fsdp_2", "fsdp_3", None)


@kinds
@pytest.mark.parametrize(
    "options",
    [{"flatten_optimizer_state_dict": True}, {"full_state_dict": True, "cpu_offload": True}],
    ids=["flat", "full"],
)
def test_options(case, options, tmp_path, native):
    travel(case, tmp_path, options, "fsdp_3", "fsdp_2", None)


@pytest.mark.parametrize(
    "case", [RICHEST_OF["SGD"], RICHEST_OF["AdamW"]], ids=lambda case: case.name
)
def test_between_layouts(case, tmp_path, native):
    travel(case, tmp_path / "there", {}, None, "sharded_tensor_parallel", "hybrid")
    travel(case, tmp_path / "back", {}, "sharded_tensor_parallel", "fsdp_3", None)


@on_ranks(2)
@each_class_or_backend
@pytest.mark.parametrize("layout", ["fsdp_2", None])
def test_saving_before_the_first_step(case, layout, backend):
    """torch makes the state by a step with zeros as gradients and lr=0, which changes nothing
    else; what it makes is what stock would."""
    start = net()
    expected = spread(start, layout)
    get_optimizer_state_dict(expected, stock := case.stock(groups(expected)))
    for extra in ({}, {"max_grad_norm": 1.0}, {"amp_fused": True}, {"lr": torch.tensor(0.1)}):
        model = spread(start, layout)
        opt = case.ours(groups(model), **extra)
        before = snapshot(opt)
        saved = get_optimizer_state_dict(model, opt)
        after = snapshot(opt)
        assert [group[:2] for group in before] == [group[:2] for group in after]
        assert_trained_alike(model, opt, expected, stock)
        set_optimizer_state_dict(model, opt, saved)
        assert snapshot(opt) == after


@on_ranks(3)
@richest
def test_attached(case, tmp_path, native):
    """An optimizer in the backward is saved and loaded as any other."""
    start, batches = run()
    whole = copy.deepcopy(start)
    fit(whole, stock := case.stock(whole.parameters()), batches)

    def attached(model):
        return fusedopt.attach(model, getattr(fusedopt, case.name), **case.options)

    model = LAYOUTS["fsdp_3"].spread(start, "cpu")
    opt = attached(model)
    for inputs in map(share, batches[:3]):
        loss(model, inputs).backward()
    dcp.save(dict(zip("mo", get_state_dict(model, opt), strict=True)), checkpoint_id=tmp_path)
    for build in (attached, lambda model: case.stock(model.parameters())):
        model = LAYOUTS["fsdp_3"].spread(net(), "cpu")
        opt = build(model)
        saved = dict(zip("mo", get_state_dict(model, opt), strict=True))
        dcp.load(saved, checkpoint_id=tmp_path)
        set_state_dict(model, opt, model_state_dict=saved["m"], optim_state_dict=saved["o"])
        fit(model, opt, map(share, batches[3:]))
        assert_trained_alike(model, opt, whole, stock)


@on_ranks(2)
@richest
def test_checkpoint_of_another_model(case, native):
    """Is refused, and nothing has changed on any rank."""
    start, batches = run()
    other = net()
    other.second = torch.nn.Linear(5, 3).double()
    other.norm, other.last = torch.nn.LayerNorm(3).double(), torch.nn.Linear(3, 1).double()
    saved = []
    for values in (start, other):
        model = LAYOUTS["fsdp_2"].spread(values, "cpu")
        fit(model, opt := case.ours(model.parameters()), map(share, batches[:2]))
        saved.append((opt.state_dict(), get_optimizer_state_dict(model, opt)))
    (own, _), (plain, by_name) = saved
    model = LAYOUTS["fsdp_2"].spread(start, "cpu")
    fit(model, opt := case.ours(model.parameters()), map(share, batches[:2]))
    before = snapshot(opt)
    for load in (
        lambda: opt.load_state_dict(plain),
        lambda: set_optimizer_state_dict(model, opt, by_name),
    ):
        with pytest.raises(ValueError, match=r"another model"):
            load()
        assert snapshot(opt) == before
    opt.load_state_dict(own)
    assert snapshot(opt) == before
