"""``max_grad_norm``: the step clips as torch's clip_grad_norm_ before it would."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import (
    COMPLEX_CASES,
    GRAD_LAYOUTS,
    Case,
    assert_near,
    assert_trained_alike,
    bits,
    draw,
    every_case_or_dtype,
    gradient_like,
    leaf,
    richest,
    snapshot,
    step_through,
    train,
)
from torch import nn

from scaling import INF, NAN, SHAPES, assert_norm, norm_of


def limit_for(grads):
    """One that clips, but leaves so much that no gradient cancels with a penalty."""
    return 0.6 * norm_of(grads[0]).item()


def clipped_and_stepped(opt, params, grads, max_norms):
    """torch's clipping and then the step."""
    for now, max_norm in zip(grads, max_norms, strict=True):
        for param, grad in zip(params, now, strict=True):
            param.grad = None if grad is None else grad.to(param.dtype, copy=True)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(params, max_norm)
        opt.step()


@every_case_or_dtype
def test_clipping_is_that_of_torch(case, dtype, backend):
    if dtype.itemsize == 2 and "l1" in case.options:
        # Rounding may change the sign of a parameter, and so its gradient by 2 * l1.
        case = dataclasses.replace(case, options={**case.options, "l1": 0.002})
    values, grads = draw(SHAPES, 4, dtype)
    grads[1][1] = grads[2][0] = None
    limit = limit_for(grads)
    params, opt = train(case.ours, values, grads, max_grad_norm=limit)
    assert_norm(opt.grad_norm, grads[-1], dtype)
    exact = [leaf(v, torch.float64) for v in values]
    oracle = case.exact(exact)
    clipped_and_stepped(oracle, exact, grads, [limit] * 4)
    near = dtype
    if backend == "python" and any(isinstance(v, torch.Tensor) for v in case.options.values()):
        near = (
            torch.float32
        )  # with a tensor lr the Python rule computes in its dtype, as torch does
    if dtype.itemsize > 2:
        assert_trained_alike(opt, params, oracle, exact, near)
    for p, q in zip(params, exact, strict=True):
        assert_near(p, q, dtype=near if dtype.itemsize > 2 else dtype)


@richest
def test_clipping_over_groups_and_dtypes(case, backend):
    """One norm over all groups."""
    kinds = (torch.float32, torch.bfloat16, torch.float64)
    values, grads = draw([(7,), (3, 4), (2100,)], 3)
    values = [v.to(kind) for v, kind in zip(values, kinds, strict=True)]
    grads = [[g.to(kind) for g, kind in zip(now, kinds, strict=True)] for now in grads]
    limit, runs = limit_for(grads), []
    for build, dtype, more in (
        (case.ours, None, {"max_grad_norm": limit}),
        (case.exact, torch.float64, {}),
    ):
        params = [leaf(v, dtype or v.dtype) for v in values]
        opt = build([{"params": params[:1]}, {"params": params[1:], "lr": 0.03}], **more)
        clipped_and_stepped(opt, params, grads, [None if more else limit] * 3)
        runs.append((opt, params))
    for p, q in zip(runs[0][1], runs[1][1], strict=True):
        assert_near(p, q, dtype=torch.float32 if p.dtype == torch.float64 else p.dtype)
    assert_norm(runs[0][0].grad_norm, grads[-1])


@richest
@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_clipping_of_layouts(case, layout, backend):
    shape = (4, 3, 2, 5)
    values = [torch.randn(shape), torch.randn(9)]
    grads = [[gradient_like(torch.randn(shape)), gradient_like(torch.randn(9))] for _ in range(2)]
    if layout == "expanded":
        grads = [[g[:1].expand_as(g), h] for g, h in grads]
    limit = limit_for(grads)
    params, exact = ([leaf(v) for v in values] for _ in range(2))
    opt, stock = case.ours(params, max_grad_norm=limit), case.stock(exact)
    for g, h in grads:
        params[0].grad, around = GRAD_LAYOUTS[layout](g)
        params[1].grad = h.clone()
        before = [bits(t) for t in (params[0].grad, h, *around)]
        version = params[0].grad._version
        opt.step()
        assert [bits(t) for t in (params[0].grad, params[1].grad, *around)] == before
        assert params[0].grad._version == version
        assert_norm(opt.grad_norm, [g, h])
    clipped_and_stepped(stock, exact, grads, [limit] * 2)
    assert_trained_alike(opt, params, stock, exact)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("case", COMPLEX_CASES, ids=str)
def test_clipping_of_complex_gradients(case, dtype, backend):
    values, grads = draw([(9,), (2, 3)], 3, dtype)
    limit = limit_for(grads)
    params, opt = train(case.ours, values, grads, max_grad_norm=limit)
    assert_norm(opt.grad_norm, grads[-1])
    exact = [leaf(v) for v in values]
    stock = case.stock(exact)
    clipped_and_stepped(stock, exact, grads, [limit] * 3)
    for p, q in zip(params, exact, strict=True):
        assert_near(p, q)


@pytest.mark.parametrize(
    "case",
    [
        Case("SGD", {"lr": 0.1}),
        Case("SGD", {"lr": 0.1, "momentum": 0.9}),
        Case("Adagrad", {"lr": 0.1}),
    ],
    ids=str,
)
def test_clipping_of_sparse_gradients(case, backend):
    """With indices that occur twice, beside a dense parameter. torch cannot measure these."""
    values = [torch.randn(5, 2), torch.randn(4)]
    grads = [
        [torch.sparse_coo_tensor([[0, 3, 0]], 3 + torch.rand(3, 2), (5, 2)), 3 + torch.rand(4)]
        for _ in range(3)
    ]
    params, opt = train(case.ours, values, grads, max_grad_norm=2.0)
    assert_norm(opt.grad_norm, grads[-1])
    scaled = [[g * float(2.0 / (norm_of(now) + 1e-6)) for g in now] for now in grads]
    exact, _ = train(case.stock, values, scaled)
    for p, q in zip(params, exact, strict=True):
        assert_near(p, q)


@every_case_or_dtype
def test_a_norm_below_the_limit_changes_no_bit(case, dtype, backend):
    values, grads = draw(SHAPES, 3, dtype)
    plain, without = train(case.ours, values, grads)
    limit = 1.001 * max(norm_of(now).item() for now in grads)
    for max_norm in (limit, INF):
        params, opt = train(case.ours, values, grads, max_grad_norm=max_norm)
        assert [bits(p) for p in params] == [bits(p) for p in plain]
        assert snapshot(opt) == snapshot(without)


@richest
@pytest.mark.parametrize("bad", [INF, -INF, NAN], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.6, INF], ids=str)
def test_gradients_that_are_not_finite(case, bad, share, backend):
    values, grads = draw([(33,), (2, 3)], 3)
    max_norm = share * norm_of(grads[0]).item()
    grads[1][0][5] = bad
    params, opt = train(case.ours, values, grads[:2], max_grad_norm=max_norm)
    assert torch.equal(opt.grad_norm.isnan(), torch.tensor(bad != bad))
    assert not opt.grad_norm.isfinite()
    step_through(opt, params, grads[2:])
    exact = [leaf(v) for v in values]
    stock = case.stock(exact)
    clipped_and_stepped(stock, exact, grads, [max_norm] * 3)
    assert_trained_alike(opt, params, stock, exact)


@richest
def test_a_limit_that_changes(case, backend):
    values, grads = draw([(33,), (2, 3)], 7)
    limit = limit_for(grads)
    limits = [None, int(limit), 0.0, limit, None, INF, 0.8 * limit]
    params, exact = ([leaf(v) for v in values] for _ in range(2))
    opt, stock = case.ours(params), case.stock(exact)
    for now, limit in zip(grads, limits, strict=True):
        opt.max_grad_norm = limit
        step_through(opt, params, [now])
        if limit is None:
            assert opt.grad_norm is None
        else:
            assert_norm(opt.grad_norm, now)
    clipped_and_stepped(stock, exact, grads, limits)
    assert_trained_alike(opt, params, stock, exact)


@richest
def test_clipping_with_a_closure(case, backend):
    runs = []
    for build, more in ((case.ours, {"max_grad_norm": 0.5}), (case.stock, {})):
        p = leaf(torch.linspace(1, 2, 5))
        opt = build([p], **more)

        def closure(opt=opt, p=p, more=more):
            opt.zero_grad()
            loss = (p**3).sum()
            loss.backward()
            if not more:
                nn.utils.clip_grad_norm_([p], 0.5)
            return loss

        runs.append(([opt.step(closure).item() for _ in range(3)], p))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-4, atol=1e-4)
    assert_near(runs[0][1], runs[1][1])


@richest
def test_clipping_without_any_gradient(case, backend):
    params, opt = train(case.ours, *draw([(5,), (0,)], 2), max_grad_norm=1.0)
    for p in params:
        p.grad = None
    before = snapshot(opt)
    opt.step()
    assert snapshot(opt) == before and opt.grad_norm is None
    assert case.ours([leaf(torch.ones(2))]).grad_norm is None


@richest
def test_clipping_of_empty_gradients_alone(case, backend):
    _, opt = train(case.ours, *draw([(0,), (2, 0)], 2), max_grad_norm=1.0)
    assert opt.grad_norm.item() == 0.0


@richest
@pytest.mark.parametrize("value", [-1.0, -INF, NAN, "1", [1.0], 1j], ids=str)
def test_bad_limits(case, value, backend):
    with pytest.raises(ValueError, match="max_grad_norm"):
        case.ours([leaf(torch.ones(1))], max_grad_norm=value)
    values, grads = draw([(5,), (2, 3)], 3)
    params = [leaf(v) for v in values]
    opt = case.ours(params)
    for now in grads[:2]:  # at the first step and later
        opt.max_grad_norm = value
        before = snapshot(opt)
        with pytest.raises(ValueError, match="max_grad_norm"):
            step_through(opt, params, [now])
        assert snapshot(opt) == before
        opt.max_grad_norm = None
        opt.step()
    exact, stock = train(case.stock, values, grads[:2])
    assert_trained_alike(opt, params, stock, exact)


@richest
@pytest.mark.parametrize("bad", ["shape", "dtype", "meta"])
def test_bad_gradients_with_clipping(case, bad, backend):
    values, grads = draw([(5,), (6,), (4,)], 2)
    params, limit = [leaf(v) for v in values], limit_for(grads)
    wrong = leaf(torch.ones(6, device="meta" if bad == "meta" else "cpu"))
    opt = case.ours([*params[:2], wrong, params[2]], max_grad_norm=limit, amp_fused=True)
    for now in grads:
        for p, g in zip(params, now, strict=True):
            p.grad = g.clone()
        if bad == "dtype":
            if not hasattr(wrong, "grad_dtype"):
                pytest.skip("this torch has no grad_dtype")
            wrong.grad_dtype = None
            wrong.grad = torch.ones(6, dtype=torch.int64)
        else:
            wrong.grad = torch.ones_like(wrong)
        if bad == "shape":
            wrong.grad.data = torch.ones(7)
        before = snapshot(opt)
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            opt.step()
        assert snapshot(opt) == before
        wrong.grad = None
        opt.step()
    exact = [leaf(v) for v in values]
    stock = case.stock(exact)
    clipped_and_stepped(stock, exact, grads, [limit] * 2)
    assert_trained_alike(opt, params, stock, exact)
