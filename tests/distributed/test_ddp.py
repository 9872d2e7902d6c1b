"""DistributedDataParallel: what stock would do, and the same bits on all ranks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from cases import each_class_or_backend
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import (
    assert_close,
    assert_ranks_agree,
    assert_trained_alike,
    draw_batches,
    fit,
    loss,
    net,
    share,
    snapshot,
)
from worlds import on_ranks

import fusedopt


def parallel(model, **options):
    ids = [dist.get_rank()] if next(model.parameters()).is_cuda else None
    return DistributedDataParallel(copy.deepcopy(model), device_ids=ids, **options)


def assert_like_stock(case, start, train, **options):
    """``train(model, optimizer)`` ends where it does with stock, on all ranks; returns ours."""
    model, expected = parallel(start, **options), parallel(start, **options)
    opt, stock = case.ours(model.parameters()), case.stock(expected.parameters())
    train(model, opt)
    train(expected, stock)
    assert_trained_alike(model, opt, expected, stock)
    assert_ranks_agree(model.parameters())
    return model, opt


@on_ranks(2)
@each_class_or_backend
@pytest.mark.parametrize("bucket_view", [False, True])
def test_is_stock_and_one_process(case, bucket_view, backend, device="cpu"):
    """With gradient_as_bucket_view, gradients are views into a buffer of all of them."""
    start, batches = net(device), draw_batches(4, device)
    model, opt = assert_like_stock(
        case,
        start,
        lambda model, opt: fit(model, opt, map(share, batches)),
        gradient_as_bucket_view=bucket_view,
        bucket_cap_mb=0.0001,  # several buckets
    )
    assert (model.module.second.weight.grad._base is not None) == bucket_view
    alone = copy.deepcopy(start)
    fit(alone, stock := case.stock(alone.parameters()), batches)
    assert_trained_alike(model.module, opt, alone, stock)


@on_ranks(2)
@each_class_or_backend
def test_channels_last(case, backend):
    start = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Conv2d(4, 2, 2)).double()
    start = start.to(memory_format=torch.channels_last)
    batches = [torch.randn(4, 3, 5, 5, dtype=torch.float64) for _ in range(3)]

    def train(model, opt):
        for inputs in map(share, batches):
            opt.zero_grad()
            model(inputs.to(memory_format=torch.channels_last)).square().sum().backward()
            opt.step()

    assert_like_stock(case, start, train, gradient_as_bucket_view=True)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()
        self.body.last = nn.Identity()
        self.heads = nn.ModuleList(nn.Linear(4, 1).double() for _ in range(3))
        self.head = 0

    def forward(self, inputs):
        return self.heads[self.head](self.body(inputs))


@on_ranks(2)
@each_class_or_backend
@pytest.mark.parametrize("set_to_none", [True, False])
def test_unused_parameters(case, set_to_none, backend):
    """A head that only one rank uses, one that all use in turn, one that none does."""
    batches = draw_batches(4)

    def train(model, opt):
        for at, inputs in enumerate(map(share, batches)):
            model.module.head = 0 if at % 2 else dist.get_rank()
            opt.zero_grad(set_to_none)
            loss(model, inputs).backward()
            opt.step()

    model, opt = assert_like_stock(case, TwoHeads(), train, find_unused_parameters=True)
    assert model.module.heads[2].weight.grad is None


@on_ranks(2)
@each_class_or_backend
def test_accumulation_without_sync(case, backend):
    start, batches = net(), draw_batches(6)

    def train(model, opt):
        for at in range(0, 6, 3):
            opt.zero_grad()
            with model.no_sync():
                for inputs in batches[at : at + 2]:
                    (loss(model, share(inputs)) / 3).backward()
            (loss(model, share(batches[at + 2])) / 3).backward()
            opt.step()

    model, opt = assert_like_stock(case, start, train, gradient_as_bucket_view=True)
    alone = copy.deepcopy(start)
    stock = case.stock(alone.parameters())
    for at in range(0, 6, 3):
        fit(alone, stock, [torch.cat(batches[at : at + 3])])
    assert_trained_alike(model.module, opt, alone, stock)


@on_ranks(2)
@each_class_or_backend
def test_resuming(case, tmp_path, backend):
    """What rank 0 saves goes on on all ranks, in a new model; from stock, to stock, and ours."""
    start, batches = net(), draw_batches(5)
    whole = parallel(start)
    fit(whole, stock := case.stock(whole.parameters()), map(share, batches))
    for at, (saver, loader) in enumerate(
        [(case.ours, case.stock), (case.stock, case.ours), (case.ours, case.ours)]
    ):
        model = parallel(start)
        fit(model, opt := saver(model.parameters()), map(share, batches[:3]))
        file = tmp_path / f"{at}.pt"
        if dist.get_rank() == 0:
            torch.save((model.state_dict(), opt.state_dict()), file)
        dist.barrier()
        weights, state = torch.load(file, weights_only=True)
        model = parallel(net())
        opt = loader(model.parameters())
        model.load_state_dict(weights)
        opt.load_state_dict(state)
        fit(model, opt, map(share, batches[3:]))
        assert_trained_alike(model, opt, whole, stock)
        assert_ranks_agree(model.parameters())


@on_ranks(2)
@each_class_or_backend
def test_clipping(case, backend, device="cpu"):
    """All ranks have all gradients: each measures the whole norm without asking the others."""
    start, batches = net(device), draw_batches(4, device)
    runs = []
    for clip in (torch.nn.utils.clip_grad_norm_, fusedopt.clip_grad_norm_, None):
        model, norms = parallel(start), []
        build = case.stock if clip is torch.nn.utils.clip_grad_norm_ else case.ours
        opt = build(model.parameters(), **({} if clip else {"max_grad_norm": 0.7}))
        for inputs in map(share, batches):
            opt.zero_grad()
            loss(model, inputs).backward()
            norms.append(clip(model.parameters(), 0.7) if clip else None)
            opt.step()
            norms[-1] = opt.grad_norm if clip is None else norms[-1]
        runs.append((model, opt, norms))
        assert_ranks_agree([*model.parameters(), *norms])
    (expected, stock, norms), *ours = runs
    assert max(norms) > 0.7
    for model, opt, measured in ours:
        assert_close(torch.stack(measured), torch.stack(norms), "norms")
        assert_trained_alike(model, opt, expected, stock)


@on_ranks(2)
@each_class_or_backend
@pytest.mark.parametrize("amp_fused", [False, True])
def test_grad_scaler(case, amp_fused, backend, device="cpu"):
    """An overflow on one rank is one on all after the gradients are summed."""
    start, batches = net(device), draw_batches(5, device)
    runs = []
    for build in (lambda p: case.ours(p, amp_fused=amp_fused), case.stock):
        model = parallel(start)
        opt, scaler = build(model.parameters()), torch.amp.GradScaler(device, init_scale=64.0)
        for at, inputs in enumerate(map(share, batches)):
            opt.zero_grad()
            value = loss(model, inputs)
            if at == 2 and dist.get_rank() == 1:
                value = value * float("inf")
            scaler.scale(value).backward()
            before = [p.detach().clone() for p in model.parameters()]
            scaler.step(opt)
            same = [*map(torch.equal, before, model.parameters())]
            assert all(same) if at == 2 else not any(same)
            scaler.update()
        assert_ranks_agree(model.parameters())
        runs += [(model, opt), scaler.state_dict()]
    (model, opt), scale, (expected, stock), stock_scale = runs
    assert scale == stock_scale
    assert_trained_alike(model, opt, expected, stock)


@on_ranks(2)
def test_attach_refuses():
    """DDP sums gradients up after the hooks of their parameters."""
    model = parallel(net())
    before = snapshot(torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        fusedopt.attach(model, fusedopt.AdamW, lr=0.1)
    loss(model, draw_batches(1)[0]).backward()
    model.zero_grad()
    assert snapshot(torch.optim.AdamW(model.parameters())) == before
