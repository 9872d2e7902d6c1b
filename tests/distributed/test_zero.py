"""ZeroRedundancyOptimizer: each rank has an optimizer of ours for its part of the parameters."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from cases import each_class_or_backend
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from training import assert_close, assert_ranks_agree, draw_batches, fit, net, share
from worlds import on_ranks

import fusedopt

views = pytest.mark.parametrize("bucket_view", [False, True])


def groups(model):
    return [
        {"params": [*model.first.parameters(), *model.norm.parameters()]},
        {"params": [*model.second.parameters(), *model.last.parameters()], "lr": 0.02},
    ]


def redundant(model, case, package, bucket_view):
    stock = {"foreach": False} if package is torch.optim else {}
    return ZeroRedundancyOptimizer(
        groups(model.module),
        optimizer_class=getattr(package, case.name),
        parameters_as_bucket_view=bucket_view,
        **case.options,
        **stock,
    )


def parallel(model):
    ids = [dist.get_rank()] if next(model.parameters()).is_cuda else None
    return DistributedDataParallel(copy.deepcopy(model), device_ids=ids)


def assert_same_state(saved, stock):
    """A consolidated state_dict, whose parameters are counted in the order of the groups."""
    expected = stock.state_dict()
    assert saved["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert saved["state"][index].keys() == state.keys()
        for key, value in state.items():
            assert_close(saved["state"][index][key], value, (index, key))


@on_ranks()
@pytest.mark.parametrize("size", [2, 3])
@views
@each_class_or_backend
def test_is_stock_and_one_process(size, bucket_view, case, backend, device="cpu"):
    start, batches = net(device), draw_batches(5, device)
    stock = case.stock(groups(start))
    model, expected = parallel(start), parallel(start)
    opt = redundant(model, case, fusedopt, bucket_view)
    zero = redundant(expected, case, torch.optim, bucket_view)
    assert type(opt.optim) is getattr(fusedopt, case.name)
    for m, o, rows in ((model, opt, share), (expected, zero, share), (start, stock, lambda b: b)):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(o, 0.8)
        for batch in batches:
            fit(m, o, [rows(batch)])
            scheduler.step()
    assert_ranks_agree(model.parameters())
    for p, q, r in zip(model.parameters(), expected.parameters(), start.parameters(), strict=True):
        assert_close(p, q, "parameter")
        assert_close(p, r, "parameter")
    opt.consolidate_state_dict(to=1)
    if dist.get_rank() == 1:
        assert_same_state(opt.state_dict(), stock)


@on_ranks(2)
@views
@each_class_or_backend
def test_resuming(bucket_view, case, tmp_path, backend):
    """A consolidated checkpoint goes on in ZeroRedundancyOptimizer over ours or stock's, and as
    that of an ordinary optimizer; and such a one goes on in ZeroRedundancyOptimizer."""
    start, batches = net(), draw_batches(5)
    whole = copy.deepcopy(start)
    fit(whole, stock := case.stock(groups(whole)), batches)

    def zero(package):
        return lambda model: redundant(model, case, package, bucket_view)

    def plain(build):
        return lambda model: build(groups(model.module))

    for at, (saver, loader) in enumerate(
        [
            (zero(fusedopt), zero(fusedopt)),
            (zero(torch.optim), zero(fusedopt)),
            (zero(fusedopt), zero(torch.optim)),
            (zero(fusedopt), plain(case.ours)),
            (plain(case.ours), zero(fusedopt)),
        ]
    ):
        model = parallel(start)
        fit(model, opt := saver(model), map(share, batches[:3]))
        file = tmp_path / f"{at}.pt"
        if isinstance(opt, ZeroRedundancyOptimizer):
            opt.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            torch.save((model.state_dict(), opt.state_dict()), file)
        dist.barrier()
        weights, state = torch.load(file, weights_only=True)
        model = parallel(net())
        opt = loader(model)
        model.load_state_dict(weights)
        opt.load_state_dict(state)
        fit(model, opt, map(share, batches[3:]))
        assert_ranks_agree(model.parameters())
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            assert_close(p, q, at)
        if isinstance(opt, ZeroRedundancyOptimizer):
            opt.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            assert_same_state(opt.state_dict(), stock)


@on_ranks(2)
@views
def test_added_groups_frozen_parameters_and_closures(bucket_view, backend):
    start, batches = net(), draw_batches(4)
    start.norm.requires_grad_(False)
    results = []
    for package in (fusedopt, torch.optim):
        model = parallel(start)
        opt = ZeroRedundancyOptimizer(
            model.module.first.parameters(),
            optimizer_class=package.AdamW,
            parameters_as_bucket_view=bucket_view,
            lr=0.1,
        )
        fit(model, opt, map(share, batches[:2]))
        rest = [*model.module.norm.parameters(), *model.module.last.parameters()]
        opt.add_param_group({"params": rest, "lr": 0.01})
        for batch in batches[2:]:

            def closure(model=model, opt=opt, batch=batch):
                opt.zero_grad()
                value = model(share(batch)).square().mean()
                value.backward()
                return value

            assert opt.step(closure) > 0
        assert_ranks_agree(model.parameters())
        results.append([*model.parameters()])
    for p, q in zip(*results, strict=True):
        assert_close(p, q, "parameter")


@on_ranks(2)
def test_overlap_with_ddp_needs_a_functional_optimizer():
    """torch's list of these is its own; what it says names our class."""
    model = net()
    with pytest.raises(ValueError, match="fusedopt.*AdamW"):
        ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=fusedopt.AdamW, overlap_with_ddp=True, lr=0.1
        )
