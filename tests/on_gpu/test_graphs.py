"""CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import seam
import torch
from cases import RICHEST, Case, draw, every_dtype, leaf, richest, snapshot

import fusedopt
from on_gpu import (
    DEVICE,
    HOST,
    PLAIN,
    SHAPES,
    assert_all_near,
    assert_same_bits,
    captured,
    clip_and_step,
    limit_for,
    norm_of,
    plain,
    put,
    refuses_capture,
    set_grads,
    step_through,
    train_on,
)


def graph_case(case):
    """With the options that may be tensors on the device as such."""
    options = {**case.options, "lr": torch.tensor(0.1, device=DEVICE)}
    if "betas" in case.table.numbers:
        options["betas"] = tuple(torch.tensor(b, device=DEVICE) for b in (0.9, 0.99))
    return Case(case.name, options)


@pytest.mark.parametrize("case", [*RICHEST, *PLAIN], ids=str)
@pytest.mark.parametrize("clip", [False, True], ids=["", "clip"])
def test_graph_replay(case, clip):
    """lr and, for Adam, betas change between replays."""
    lrs, betas = [0.1, 0.1, 0.02, 0.3, 0.05], [(0.9, 0.99)] * 3 + [(0.5, 0.9)] * 2
    values, grads = draw([(1000,), (33,), (0,), (16_390,)], 5)
    limit = limit_for(grads) if clip else float("inf")
    more = {"max_grad_norm": limit} if clip else {}
    params = [leaf(put(v)) for v in values]
    opt = graph_case(case).ours(params, capturable=True, **more)
    (group,) = opt.param_groups
    set_grads(params, grads[0])
    opt.step()  # creates state
    graph = captured(opt)
    for now, lr, beta in zip(grads[1:], lrs[1:], betas[1:], strict=True):
        for p, g in zip(params, now, strict=True):
            p.grad.copy_(g)
        group["lr"].fill_(lr)
        if "betas" in group:
            for tensor, value in zip(group["betas"], beta, strict=True):
                tensor.fill_(value)
        graph.replay()
        if clip:
            expected = norm_of(now)
            torch.testing.assert_close(opt.grad_norm.item(), expected, rtol=1e-5, atol=0)
    torch.cuda.synchronize()
    exact = [leaf(put(v), torch.float64) for v in values]
    stock = case.exact(exact)
    for now, lr, beta in zip(grads, lrs, betas, strict=True):
        stock.param_groups[0]["lr"] = lr
        if "betas" in group:
            stock.param_groups[0]["betas"] = beta
        clip_and_step(stock, exact, [now], limit)
    assert_all_near(params, exact)
    for p in params:
        if "step" in opt.state[p]:
            assert opt.state[p]["step"].item() == 5 and opt.state[p]["step"].device.type == DEVICE
    step_through(opt, params, grads[:1])  # the optimizer goes on without the graph
    stock.param_groups[0]["lr"] = group["lr"].item()
    clip_and_step(stock, exact, grads[:1], limit)
    assert_all_near(params, exact)


@plain
def test_graph_replay_skips_an_overflow(case):
    values, grads = draw([(1000,), (33,)], 4)
    params = [leaf(put(v)) for v in values]
    opt = case.ours(params, capturable=True, amp_fused=True)
    step_through(opt, params, grads[:1])
    opt.grad_scale = torch.tensor(4.0, device=DEVICE)
    opt.found_inf = torch.tensor(0.0, device=DEVICE)
    graph = captured(opt)
    for now in grads[1:]:
        for p, g in zip(params, now, strict=True):
            p.grad.copy_(g).mul_(4)
        before = snapshot(opt)
        opt.found_inf.fill_(2.0)
        graph.replay()
        assert snapshot(opt) == before
        opt.found_inf.fill_(0.0)
        graph.replay()
    exact, _ = train_on(DEVICE, case.exact, values, grads, torch.float64)
    assert_all_near(params, exact)


@plain
def test_capture_of_a_whole_iteration(case):
    """Backward and all, after eager iterations on another stream than that of the capture."""

    def iterate(params, opt):
        for p in params:
            p.grad = None
        sum((p * p).sum() for p in params).backward()
        opt.step()

    values, _ = draw([(100,), (33,)], 1)
    results = []
    for captures in (False, True):
        params = [leaf(put(v)) for v in values]
        opt = case.ours(params, capturable=True)
        for _ in range(2 if captures else 5):
            iterate(params, opt)
        if captures:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                iterate(params, opt)
            for _ in range(3):
                graph.replay()
        torch.cuda.synchronize()
        results.append([p.detach().clone() for p in params])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def counts_steps(case):
    return seam.rule_of(getattr(fusedopt, case.name)).counts_steps


COUNTING = [case for case in PLAIN if counts_steps(case)]
OTHERS = [case for case in [*RICHEST, *PLAIN] if not counts_steps(case)]


@pytest.mark.parametrize("case", COUNTING, ids=str)
def test_capture_without_capturable(case):
    values, grads = draw([(100,), (33,)], 3)
    params, opt = train_on(DEVICE, case.ours, values, grads[:1])
    refuses_capture(opt, params, grads[1], "capturable")
    step_through(opt, params, grads[2:])
    assert_same_bits(opt, params, *reversed(train_on(HOST, case.ours, values, grads)))


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_what_counts_no_steps_needs_no_capturable(case):
    """Replays have the bits of the CPU's steps, and are what stock's are."""
    values, grads = draw([(100,), (33,), (16_390,)], 5)

    def run(build):
        params, opt = train_on(DEVICE, build, values, grads[:1])
        graph = captured(opt)
        for now in grads[1:4]:
            for p, g in zip(params, now, strict=True):
                p.grad.copy_(g)
            graph.replay()
        step_through(opt, params, grads[4:])
        return opt, params

    opt, params = run(case.ours)
    assert_same_bits(opt, params, *reversed(train_on(HOST, case.ours, values, grads)))
    if seam.has_stock(type(opt)):
        assert_all_near(params, run(case.stock)[1])


@plain
@pytest.mark.parametrize("capturable", [False, True])
def test_the_first_step_cannot_be_captured(case, capturable):
    values, grads = draw([(100,), (33,)], 3)
    params = [leaf(put(v)) for v in values]
    opt = case.ours(params, capturable=capturable)
    set_grads(params, grads[0])
    may = capturable or not counts_steps(case)
    with pytest.raises(RuntimeError, match="before the capture" if may else "capturable"):
        captured(opt)
    torch.cuda.synchronize()
    step_through(opt, params, grads)
    exact, _ = train_on(DEVICE, case.exact, values, grads, torch.float64)
    assert_all_near(params, exact)


@plain
def test_capture_right_after_loading(case):
    """State is there, but no memory for norm and counts: an error, and a step mends it."""
    more = {"capturable": True, "max_grad_norm": 1e9}
    values, grads = draw([(100,), (33,), (16_390,)], 4)
    past, saved = train_on(DEVICE, case.ours, values, grads[:1], **more)
    params = [leaf(put(p)) for p in past]
    opt = case.ours(params, **more)
    opt.load_state_dict(copy.deepcopy(saved.state_dict()))
    refuses_capture(opt, params, grads[1], "before the capture")
    graph = captured(opt)
    for now in grads[2:]:
        for p, g in zip(params, now, strict=True):
            p.grad.copy_(g)
        graph.replay()
    exact, _ = train_on(DEVICE, case.exact, values, grads, torch.float64)
    assert_all_near(params, exact)


@richest
@every_dtype
def test_capturable_without_a_graph(case, dtype):
    """Step counts and coefficients on the device."""
    values, grads = draw(SHAPES, 4, dtype)
    grads[1][1] = grads[2][0] = None
    params, opt = train_on(DEVICE, case.ours, values, grads, capturable=True)
    exact, stock = train_on(DEVICE, case.exact, values, grads, torch.float64)
    assert_all_near(params, exact)
    for p, q in zip(params, exact, strict=True):
        if "step" in opt.state[p]:
            assert opt.state[p]["step"].device.type == DEVICE
            assert opt.state[p]["step"].item() == stock.state[q]["step"].item()
