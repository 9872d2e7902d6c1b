"""How many launches, on which stream and device, and that nobody waits."""

from __future__ import annotations

import gc

import pytest
import seam
import torch
from cases import draw, leaf, richest, snapshot

import fusedopt
from on_gpu import (
    DEVICE,
    HOST,
    LONG,
    PLAIN,
    assert_all_near,
    assert_same_bits,
    clip_and_step,
    limit_for,
    no_synchronization,
    norm_of,
    num_launches,
    plain,
    put,
    set_grads,
    step_through,
    train_on,
    two_gpus,
)

# Launches -------------------------------------------------------------------------------------


def many_groups(count, dtype=torch.float32):
    """Small tensors of many sizes, one large one; and the groups they are in."""
    values = [torch.randn(1 + i * 37 % 500).to(dtype) for i in range(count - 1)]
    values.append(torch.randn(70_001).to(dtype))
    return values, [(0, 200, {}), (200, 201, {"lr": 0.3}), (201, count, {"weight_decay": 0.1})]


def grouped(case, params, groups, **more):
    return case.ours([{"params": params[a:b], **g} for a, b, g in groups], **more)


@plain
@pytest.mark.parametrize(
    "more",
    [{}, {"capturable": True}, {"max_grad_norm": 1.0}],
    ids=lambda more: next(iter(more), ""),
)
def test_one_launch_for_600_tensors(case, more):
    """And one more for the norm. A step has its count as one more pointer if it is on the device,
    and NAdam's has two, so 500 of those."""
    count = 500 if "capturable" in more else 600
    values, groups = many_groups(count)
    params = [leaf(put(v)) for v in values]
    opt = grouped(case, params, groups, **more)
    for at in range(3):
        grads = [torch.randn_like(p) for p in params]
        if at == 0:
            grads[5] = None  # it comes late: its step counts are others
        set_grads(params, grads)
        before = num_launches()
        opt.step()
        assert num_launches() - before == 1 + ("max_grad_norm" in more)


def test_half_and_float32_parameters_share_a_launch():
    kinds = [torch.float32, torch.bfloat16, torch.float16] * 20
    values = [torch.randn(300 + i).to(kind) for i, kind in enumerate(kinds)]
    for case in PLAIN:
        params = [leaf(put(v)) for v in values]
        opt = case.ours(params)
        for _ in range(2):
            set_grads(params, [torch.randn_like(p) for p in params])
            before = num_launches()
            opt.step()
            assert num_launches() - before == 1


@richest
def test_more_tensors_than_a_launch_holds(case):
    values, groups = many_groups(2500)
    grads = [[torch.randn_like(v) for v in values] for _ in range(2)]
    runs = []
    for device in (DEVICE, HOST):
        params = [leaf(put(v, device)) for v in values]
        opt = grouped(case, params, groups)
        for now in grads:
            set_grads(params, now)
            opt.step()
        runs.append((opt, params))
    assert_same_bits(*runs[0], *runs[1])


@plain
@pytest.mark.parametrize("amp", [False, True], ids=["plain", "amp and clip"])
def test_a_step_allocates_nothing(case, amp):
    values, grads = draw([(1000,), (33,), (70_001,)], 4)
    more = {"amp_fused": True, "max_grad_norm": 1.0} if amp else {}
    params, opt = train_on(DEVICE, case.ours, values, grads[:2], **more)
    if amp:
        opt.grad_scale = torch.tensor(8.0, device=DEVICE)
        opt.found_inf = torch.tensor(0.0, device=DEVICE)
        opt.step()
    set_grads(params, grads[2])
    torch.cuda.synchronize()

    def counts():
        stats = torch.cuda.memory_stats()
        return torch.cuda.memory_allocated(), stats["allocation.all.allocated"]

    before = counts()
    opt.step()
    assert counts() == before
    if torch.cuda.memory_stats()["allocation.all.allocated"] == 0:
        pytest.skip("this allocator does not count")


# Streams --------------------------------------------------------------------------------------


@plain
@pytest.mark.parametrize(
    "more", [{}, {"max_grad_norm": 2.0, "amp_fused": True}, {"capturable": True}], ids=str
)
def test_the_current_stream_and_no_waiting(case, more):
    """Gradients are made after a long kernel on a side stream. A step on any other stream would
    read what was there before, and one that waits for the device would outlast the kernel."""
    values, grads = draw([(1000,), (33,), (70_001,)], 3)
    params, opt = train_on(DEVICE, case.ours, values, grads[:1], **more)
    sources = [[put(g) for g in now] for now in grads[1:]]
    set_grads(params, [torch.full_like(p, 1e4) for p in params])
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for cycles, now in zip((1000, LONG), sources, strict=True):  # the first loads all kernels
            torch.cuda.synchronize()
            done = torch.cuda.Event()
            torch.cuda._sleep(cycles)
            for p, g in zip(params, now, strict=True):
                p.grad.copy_(g)
            with no_synchronization():
                opt.step()
            done.record()
            waited = done.query()
    torch.cuda.synchronize()
    assert not waited
    exact = [leaf(put(v), torch.float64) for v in values]
    stock = case.exact(exact)
    if "max_grad_norm" in more:
        clip_and_step(stock, exact, grads, 2.0)
    else:
        step_through(stock, exact, grads)
    assert_all_near(params, exact)


@plain
def test_new_gradients_and_no_waiting(case):
    """As after zero_grad and backward: the gradients are other tensors at every step."""
    values, grads = draw([(1000,), (33,), (70_001,)], 4)
    for more in ({}, {"max_grad_norm": 2.0, "amp_fused": True}, {"capturable": True}):
        params, opt = train_on(DEVICE, case.ours, values, grads[:1], **more)
        for now in grads[1:]:
            set_grads(params, now)
            with no_synchronization():
                opt.step()
                norm = opt.grad_norm
        assert (norm is not None) == ("max_grad_norm" in more)


def test_counts_outlive_their_optimizer():
    """What a kernel counts in is not given to others before it has run."""
    values, grads = draw([(1000,), (33,)], 2)
    params, opt = train_on(DEVICE, fusedopt.Adam, values, grads[:1], capturable=True, lr=0.1)
    set_grads(params, grads[1])
    (tickets,) = seam.tickets(opt)
    size, dtype = tickets.numel(), tickets.dtype
    del tickets
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(LONG)
        opt.step()
    del opt
    gc.collect()
    others = [torch.full((size,), 7.0, dtype=dtype, device=DEVICE) for _ in range(20)]
    torch.cuda.synchronize()
    assert all((other == 7).all() for other in others)
    assert_all_near(params, train_on(HOST, fusedopt.Adam, values, grads, lr=0.1)[0])


class LateGradient(torch.autograd.Function):
    """The identity, whose backward takes its time."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        torch.cuda._sleep(LONG // 10)
        return grad * 2


def test_attached_to_a_forward_on_two_streams():
    """A bucket is stepped on one of them, and its gradients are of both."""
    values = [torch.randn(70_001) for _ in range(2)]
    runs, side = [], torch.cuda.Stream()
    for build in (fusedopt.attach, lambda params, cls, **options: cls(params, **options)):
        params = [leaf(put(v)) for v in values]
        opt = build(params, fusedopt.AdamW, lr=0.1)
        for _ in range(3):
            opt.zero_grad()
            main = torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                late = LateGradient.apply(params[0]).square().sum()
            main.wait_stream(side)
            (late + params[1].square().sum()).backward()
            opt.step()
        runs.append(snapshot(opt))
    assert runs[0] == runs[1]


# Devices --------------------------------------------------------------------------------------


@richest
@pytest.mark.parametrize("places", [(HOST, DEVICE), (DEVICE, HOST)], ids=str)
def test_cpu_and_gpu_in_one_optimizer(case, places):
    values, grads = draw([(100,), (33,), (70_001,), (5,)], 3)
    params = [leaf(put(v, places[i % 2])) for i, v in enumerate(values)]
    opt = case.ours(params)
    step_through(opt, params, grads)
    assert_same_bits(opt, params, *reversed(train_on(HOST, case.ours, values, grads)))


@plain
@pytest.mark.parametrize("places", [(HOST, DEVICE), (DEVICE, HOST)], ids=str)
def test_one_norm_over_cpu_and_gpu(case, places):
    """Also where the GPU is still busy."""
    values, grads = draw([(100,), (70_001,)], 3)
    params = [leaf(put(v, place)) for v, place in zip(values, places, strict=True)]
    opt = case.ours(params, max_grad_norm=2.0, amp_fused=True)
    for now in grads:
        set_grads(params, now)
        sources = [p.grad.clone() for p in params]
        for p in params:
            p.grad.zero_()
        torch.cuda._sleep(LONG // 10)
        for p, g in zip(params, sources, strict=True):
            p.grad.copy_(g)
        opt.step()
        expected = norm_of(now)
        torch.testing.assert_close(opt.grad_norm.item(), expected, rtol=1e-5, atol=0)
    exact = [leaf(v, torch.float64) for v in values]
    clip_and_step(case.exact(exact), exact, grads, 2.0)
    assert_all_near(params, exact)
    set_grads(params, [grads[0][0], grads[0][1] * float("inf")])
    before = snapshot(opt)
    opt.step()
    assert snapshot(opt) == before


@two_gpus
@richest
def test_another_device_than_the_current_one(case):
    values, grads = draw([(100,), (33,), (70_001,)], 3)
    limit = limit_for(grads)
    reference = train_on(HOST, case.ours, values, grads)
    for places in (["cuda:1"] * 3, ["cuda:1", "cuda:0", "cuda:1"]):
        with torch.cuda.device(0):
            params = [leaf(put(v, place)) for v, place in zip(values, places, strict=True)]
            opt = case.ours(params)
            step_through(opt, params, grads)
            assert torch.cuda.current_device() == 0
        assert_same_bits(opt, params, *reversed(reference))
        clipped = [leaf(put(v, place)) for v, place in zip(values, places, strict=True)]
        step_through(case.ours(clipped, max_grad_norm=limit), clipped, grads)
        exact = [leaf(v, torch.float64) for v in values]
        clip_and_step(case.exact(exact), exact, grads, limit)
        assert_all_near(clipped, exact)
