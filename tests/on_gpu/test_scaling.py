"""GradScaler and clipping."""

from __future__ import annotations

import pytest
import torch
from cases import (
    DTYPES,
    FLOWS,
    Amp,
    Case,
    bits,
    draw,
    every_dtype,
    gradient_like,
    leaf,
    richest,
    snapshot,
    states,
)
from torch import nn

import fusedopt
from on_gpu import (
    DEVICE,
    HOST,
    SHAPES,
    SIZES,
    assert_all_near,
    assert_near,
    clip_and_step,
    limit_for,
    no_synchronization,
    norm_of,
    off_by,
    plain,
    put,
    set_grads,
    train_on,
)

# GradScaler -----------------------------------------------------------------------------------


@richest
@pytest.mark.parametrize("fused", [False, True], ids=["default", "amp_fused"])
def test_grad_scaler(case, fused):
    case = Case(case.name, {**case.options, "lr": 0.01})
    for flow in FLOWS:
        ours = Amp(case.ours, device=DEVICE, amp_fused=fused).run(flow)
        stock = Amp(case.stock, device=DEVICE).run(flow)
        assert ours.log == stock.log
        assert_all_near(ours.params, stock.params)


def test_an_overflow_before_the_first_momentum():
    case = Case("SGD", {"lr": 0.01, "momentum": 0.9, "dampening": 0.5})
    for flow in ("o . .", "o o . . .", ". o ."):
        ours = Amp(case.ours, device=DEVICE, amp_fused=True).run(flow)
        stock = Amp(case.stock, device=DEVICE).run(flow)
        assert ours.log == stock.log
        assert_all_near(ours.params, stock.params)


@richest
def test_grad_scaler_with_clipping_in_the_step(case):
    case = Case(case.name, {**case.options, "lr": 0.01})
    ours = Amp(case.ours, device=DEVICE, amp_fused=True, max_grad_norm=1.5).run(". . o u . uo .")
    stock = Amp(case.stock, device=DEVICE).run("c c co c c co c")
    assert [scale for _, scale, _ in ours.log] == [scale for _, scale, _ in stock.log]
    assert_all_near(ours.params, stock.params)


@richest
@pytest.mark.parametrize("more", [{}, {"capturable": True}], ids=["", "capturable"])
def test_found_inf_summed_over_devices(case, more):
    values, grads = draw([(100,), (33,), (16_390,)], 3)
    params = [leaf(put(v)) for v in values]
    opt = case.ours(params, amp_fused=True, **more)
    opt.grad_scale = torch.tensor(8.0, device=DEVICE)
    for now in grads:
        set_grads(params, [g * 8 for g in now])
        begun, before = any(states(opt, params)), snapshot(opt)
        opt.found_inf = torch.tensor(2.0, device=DEVICE)
        opt.step()
        assert snapshot(opt)[0] == before[0] and (not begun or snapshot(opt) == before)
        opt.found_inf = torch.tensor(0.0, device=DEVICE)
        opt.step()
    exact, stock = train_on(DEVICE, case.exact, values, grads, torch.float64)
    assert_all_near(params, exact)
    for p, q in zip(params, exact, strict=True):
        if "step" in opt.state[p]:
            assert opt.state[p]["step"].item() == stock.state[q]["step"].item() == 3


@plain
def test_amp_fused_does_not_wait(case):
    run = Amp(case.ours, device=DEVICE, amp_fused=True, max_grad_norm=1.0).run(". .")
    loss = run.model(torch.ones(2, 4, device=DEVICE)).square().sum()
    run.opt.zero_grad()
    run.scaler.scale(loss).backward()
    with no_synchronization():
        run.scaler.step(run.opt)
    run.scaler.update()


# Clipping -------------------------------------------------------------------------------------


@every_dtype
@richest
def test_clipping(case, dtype):
    values, grads = draw([*SHAPES, (70_001,)], 3, dtype)
    limit = limit_for(grads)
    params, opt = train_on(DEVICE, case.ours, values, grads, max_grad_norm=limit)
    assert opt.grad_norm.device.type == DEVICE and opt.grad_norm.dtype == torch.float64
    torch.testing.assert_close(opt.grad_norm.item(), norm_of(grads[-1]), rtol=1e-5, atol=0)
    exact = [leaf(put(v), torch.float64) for v in values]
    clip_and_step(case.exact(exact), exact, grads, limit)
    assert_all_near(params, exact)


def test_the_norm_has_the_same_bits_always_and_on_the_cpu():
    for kinds in ([torch.float32], [torch.float64], [torch.bfloat16, torch.float32, torch.float16]):
        sizes = [*SIZES, 65_535, 65_536, 65_537, 400_001]
        drawn = [
            gradient_like(torch.randn(n, dtype=torch.float64)).to(kinds[i % len(kinds)])
            for i, n in enumerate(sizes)
        ]
        norms = []
        for device, offset in [(DEVICE, 0)] * 8 + [(DEVICE, 1), (HOST, 0)]:
            params = [leaf(put(torch.zeros_like(g), device)) for g in drawn]
            for p, g in zip(params, drawn, strict=True):
                p.grad = off_by(offset, put(g, device))
            opt = fusedopt.SGD(params, max_grad_norm=1.0)
            opt.step()
            norms.append(opt.grad_norm.cpu())
        assert len({bits(norm) for norm in norms}) == 1, norms
        torch.testing.assert_close(norms[0].item(), norm_of(drawn), rtol=1e-5, atol=0)


def test_clip_grad_norm_():
    for dtype in DTYPES:
        _, (grads,) = draw([*SHAPES, (70_001,)], 1, dtype)
        runs = []
        for clip in (fusedopt.clip_grad_norm_, nn.utils.clip_grad_norm_):
            params = [torch.zeros_like(put(g)).requires_grad_() for g in grads]
            set_grads(params, grads)
            runs.append((clip(params, 2.0), [p.grad for p in params]))
        (ours, clipped), (norm, expected) = runs
        assert (ours.dtype, ours.device, ours.shape) == (norm.dtype, norm.device, norm.shape)
        assert_near(ours, norm, dtype=dtype)
        for g, h in zip(clipped, expected, strict=True):
            assert_near(g, h, dtype=dtype)
