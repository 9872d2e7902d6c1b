"""GradScaler leaves it to the step to unscale and to skip."""

from __future__ import annotations

import pytest
import torch
from cases import (
    FLOWS,
    RICHEST,
    SPARSE,
    Amp,
    Case,
    assert_near,
    assert_trained_alike,
    draw,
    every_case_or_dtype,
    leaf,
    richest,
    snapshot,
    step_through,
    train,
)
from torch import nn

import fusedopt
from scaling import INF, NAN, SHAPES, norm_of

MOMENTUM = [
    Case("SGD", {"lr": 0.01, "momentum": 0.9, "dampening": 0.5}),
    Case("SGD", {"lr": 0.01, "momentum": 0.9, "dampening": 0.5, "maximize": True, "l1": 0.01}),
]
every_amp_case = pytest.mark.parametrize(
    "case", [*[Case(c.name, {**c.options, "lr": 0.01}) for c in RICHEST], *MOMENTUM], ids=str
)


@every_amp_case
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "default"])
def test_grad_scaler(case, flow, fused, backend):
    ours = Amp(case.ours, amp_fused=fused).run(flow)
    stock = Amp(case.stock).run(flow)
    assert ours.log == stock.log
    assert_trained_alike(ours.opt, ours.params, stock.opt, stock.params)


@every_amp_case
def test_grad_scaler_with_several_optimizers(case, backend):
    """Each is skipped for its own gradients."""
    runs = []
    for build, more in ((case.ours, {"amp_fused": True}), (case.stock, {})):
        a = Amp(build, **more)
        b, c = Amp(build, a.scaler, **more), Amp(case.stock, a.scaler)
        for at, kinds in enumerate(
            [("o", ".", "."), (".", "o", "u"), ("u", ".", "o"), ("a", "c", ".")]
        ):
            for run, kind in zip((a, b, c), kinds, strict=True):
                run.step(kind, at)
            a.scaler.update()
        runs.append((a, b, c))
    assert runs[0][0].scaler.state_dict() == runs[1][0].scaler.state_dict()
    for ours, stock in zip(*runs, strict=True):
        assert_trained_alike(ours.opt, ours.params, stock.opt, stock.params)


@every_amp_case
@pytest.mark.parametrize("flow", FLOWS)
def test_grad_scaler_and_clipping_in_the_step(case, flow, backend):
    """The norm is that of the unscaled gradients."""
    ours = Amp(case.ours, amp_fused=True, max_grad_norm=1.5)
    stock = Amp(case.stock)
    for at, kind in enumerate(flow.split()):
        ours.step(kind.replace("c", "u"), at)
        stock.step(kind.replace("u", "").replace(".", "") + "c", at)
        if "o" in kind:
            assert not ours.opt.grad_norm.isfinite()
        else:
            scale = 1.0 if "u" in kind or "c" in kind else ours.scaler.get_scale()
            expected = norm_of([p.grad for p in ours.params]) / scale
            torch.testing.assert_close(ours.opt.grad_norm, expected, rtol=1e-5, atol=0)
        ours.scaler.update()
        stock.scaler.update()
    assert ours.scaler.state_dict() == stock.scaler.state_dict()
    assert_trained_alike(ours.opt, ours.params, stock.opt, stock.params)


def scaled_step(opt, params, grads, scale, found_inf):
    """A step as a GradScaler does it, with any found_inf."""
    opt.grad_scale, opt.found_inf = scale, found_inf
    step_through(opt, params, [[None if g is None else g * 8 for g in grads]])
    del opt.grad_scale, opt.found_inf


@every_case_or_dtype
def test_unscaling_by_a_power_of_two_changes_no_bit(case, dtype, backend):
    values, grads = draw(SHAPES, 3, dtype)
    grads[1][0] = None
    plain, without = train(case.ours, values, grads)
    params = [leaf(v) for v in values]
    opt = case.ours(params, amp_fused=True)
    for now in grads:
        scaled_step(opt, params, now, torch.tensor(8.0), torch.tensor(0.0))
    assert snapshot(opt) == snapshot(without)


@richest
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("found_inf", [1.0, 2.0, 7.0])
def test_found_inf_summed_over_devices(case, found_inf, shape, backend):
    values, grads = draw([(33,), (2, 3)], 3)
    params = [leaf(v) for v in values]
    opt = case.ours(params, amp_fused=True)
    scale = torch.full(shape, 8.0)
    for now in grads:
        begun, before = bool(opt.state.get(params[0])), snapshot(opt)
        scaled_step(opt, params, now, scale, torch.full(shape, found_inf))
        assert snapshot(opt)[0] == before[0] and (not begun or snapshot(opt) == before)
        scaled_step(opt, params, now, scale, torch.full(shape, 0.0))
    _, without = train(case.ours, values, grads)
    assert snapshot(opt) == snapshot(without)


@every_amp_case
def test_gradients_that_come_late_in_a_skipped_step(case, backend):
    """A parameter whose first step is skipped begins at the next one."""
    values, grads = draw([(5,), (2, 3), (4,)], 4)
    grads[0][1] = grads[0][2] = grads[1][2] = None
    params = [leaf(v) for v in values]
    opt = case.ours(params, amp_fused=True)
    for now in grads:
        scaled_step(opt, params, now, torch.tensor(8.0), torch.tensor(1.0))
        scaled_step(opt, params, now, torch.tensor(8.0), torch.tensor(0.0))
    exact, stock = train(case.stock, values, grads)
    assert_trained_alike(opt, params, stock, exact)


@richest
def test_a_norm_that_is_not_finite_skips(case, backend):
    """Also of finite gradients whose squares overflow, and without a GradScaler. Without
    amp_fused nothing is skipped."""
    values, grads = draw([(33,), (2, 3)], 3, torch.float64)
    huge = [torch.full_like(v, 1e200) for v in values]
    params, opt = train(case.ours, values, grads, max_grad_norm=3.0, amp_fused=True)
    for bad in (huge, [torch.full_like(v, NAN) for v in values], [huge[0], huge[1] * INF]):
        before = snapshot(opt)
        step_through(opt, params, [bad])
        assert snapshot(opt) == before and not opt.grad_norm.isfinite()
    opt.amp_fused = False
    step_through(opt, params, [[torch.full_like(v, NAN) for v in values]])
    assert params[0].isnan().all()


def test_sparse_gradients_and_grad_scaler(backend):
    for name in SPARSE:
        runs = []
        for module in (fusedopt, torch.optim):
            p, q = leaf(torch.linspace(0, 1, 12).view(6, 2)), leaf(torch.ones(3))
            more = {"amp_fused": True} if module is fusedopt else {"foreach": False}
            opt = getattr(module, name)([p, q], lr=0.1, **more)
            scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
            for at in range(4):
                rows = nn.functional.embedding(torch.tensor([0, at, 5]), p, sparse=True)
                opt.zero_grad()
                scaler.scale((rows**2).sum() + (q**2).sum()).backward()
                if at in (0, 2):
                    q.grad[0] = INF
                scaler.step(opt)
                scaler.update()
            runs.append((scaler.state_dict(), p, q))
        assert runs[0][0] == runs[1][0]
        assert_near(runs[0][1], runs[1][1])
        assert_near(runs[0][2], runs[1][2])
