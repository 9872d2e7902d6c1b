"""What multiplies gradients inside the step: max_grad_norm, GradScaler; and clip_grad_norm_."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import math
import pickle
import warnings

import pytest
import torch
from cases import (
    COMPLEX_CASES,
    FLOWS,
    GRAD_LAYOUTS,
    LAYOUTS,
    NAMES,
    RICHEST,
    SPARSE,
    TABLES,
    Amp,
    Case,
    assert_near,
    assert_trained_alike,
    bits,
    draw,
    every_case,
    every_dtype,
    every_name,
    every_sparse,
    gradient_like,
    leaf,
    richest,
    snapshot,
    step_through,
    those_with,
    train,
)
from torch import nn

import fusedopt

SHAPES = [(33,), (2, 3), (), (0,), (2049,)]
INF, NAN = float("inf"), float("nan")


def norm_of(grads):
    """In float64, over all elements at once."""
    dense = [g.to_dense().resolve_conj().reshape(-1) for g in grads if g is not None]
    wide = [torch.view_as_real(g.cdouble()).reshape(-1) if g.is_complex() else g for g in dense]
    return torch.cat([g.double() for g in wide]).norm()


def limit_for(grads):
    """One that clips, but leaves so much that no gradient cancels with a penalty."""
    return 0.6 * norm_of(grads[0]).item()


def assert_norm(norm, grads, dtype=torch.float32):
    assert norm.dtype == torch.float64 and norm.shape == ()
    torch.testing.assert_close(
        norm, norm_of(grads), rtol=1e-12 if dtype.itemsize > 4 else 1e-5, atol=0
    )


def clipped_and_stepped(opt, params, grads, max_norms):
    """torch's clipping and then the step."""
    for now, max_norm in zip(grads, max_norms, strict=True):
        for param, grad in zip(params, now, strict=True):
            param.grad = None if grad is None else grad.to(param.dtype, copy=True)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(params, max_norm)
        opt.step()


# max_grad_norm --------------------------------------------------------------------------------


@every_dtype
@every_case
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


@every_dtype
@every_case
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
def test_the_norm_that_was_read_stays(case, backend):
    params, opt = train(case.ours, *draw([(5,)], 1), max_grad_norm=1.0)
    seen = opt.grad_norm
    before = bits(seen)
    params[0].grad.mul_(3)
    opt.step()
    assert bits(seen) == before and bits(opt.grad_norm) != before


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


def test_the_norm_of_a_sparse_gradient_without_rows(backend):
    """An embedding whose batch had no token: zero, not the norm of the step before."""
    param = leaf(torch.ones(4, 3))
    opt = fusedopt.SGD([param], lr=0.1, max_grad_norm=1.0)
    param.grad = torch.ones(4, 3)
    opt.step()
    assert opt.grad_norm > 3
    param.grad = torch.sparse_coo_tensor([[]], torch.zeros(0, 3), (4, 3))
    opt.step()
    assert opt.grad_norm == 0


def test_the_norm_has_the_same_bits_on_any_number_of_threads(native, step_threads):
    values, grads = draw([(300_001,), (7,), (65_536,)], 1)
    seen = set()
    for threads in (1, 2, 3):
        step_threads(threads)
        _, opt = train(fusedopt.SGD, values, grads, max_grad_norm=1.0)
        assert_norm(opt.grad_norm, grads[0])
        seen.add(bits(opt.grad_norm))
    assert len(seen) == 1


def test_a_large_norm_of_half_gradients_is_finite(backend):
    """The sum of their squares is far beyond float16."""
    grads = [[torch.full((5000,), 100.0, dtype=torch.float16)]]
    (p,), opt = train(fusedopt.SGD, [torch.zeros(5000).half()], grads, lr=1.0, max_grad_norm=1e3)
    assert_norm(opt.grad_norm, grads[0])
    assert_near(p, torch.full((5000,), -1e3 / 5000**0.5))


# Squares that float32 cannot hold, and others beside them.
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-25, 1e-14, 1e17, 1e19, 1e25, 1e37], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_a_norm_whose_squares_leave_float32(dtype, scale, backend):
    grads = [(scale * torch.randn(n, dtype=dtype)) for n in (70_001, 300, 1)] + [torch.ones(0)]
    params = [leaf(torch.zeros_like(grad)) for grad in grads]
    exact = torch.cat([grad.to(torch.complex128) for grad in grads]).norm().item()
    opt = fusedopt.SGD(params, lr=1.0, max_grad_norm=1.0)
    step_through(opt, params, [grads])
    near = {"rtol": 1e-6, "atol": 1e-45}
    torch.testing.assert_close(opt.grad_norm.item(), exact, **near)
    length = torch.cat([p.detach().to(torch.complex128) for p in params]).norm().item()
    if scale < 1e37:  # else the factor is a subnormal float
        torch.testing.assert_close(length, min(1.0, exact), rtol=1e-2, atol=1e-45)
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()
    norm = fusedopt.clip_grad_norm_(params, 1.0)
    torch.testing.assert_close(norm.item(), norm.new_tensor(exact).item(), rtol=1e-2, atol=1e-45)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_the_norm_is_that_of_unscaled_gradients(dtype, backend):
    """Whatever the squares of the scaled ones are."""
    top = torch.finfo(dtype).max / 4
    grads = [torch.randn(5_000, dtype=dtype).clamp(-1, 1) * top]
    opt = fusedopt.SGD([leaf(torch.zeros_like(grads[0]))], max_grad_norm=1.0, amp_fused=True)
    scale = max(2.0**16, top**0.5 * 4)
    opt.grad_scale = torch.tensor(min(scale, 2.0**127))
    opt.found_inf = torch.zeros(())
    step_through(opt, opt.param_groups[0]["params"], [grads])
    exact = (grads[0].double() / opt.grad_scale.double()).norm()
    torch.testing.assert_close(opt.grad_norm, exact, rtol=1e-6, atol=0.0)


def test_a_norm_between_overflows(backend):
    """One infinite gradient, or one that is not a number, is what the norm is."""
    for bad in (INF, -INF, NAN):
        grads = [torch.full((70_000,), 1e30), torch.full((3,), bad)]
        _, opt = train(fusedopt.SGD, [torch.zeros_like(g) for g in grads], [grads], max_grad_norm=1)
        assert not opt.grad_norm.isfinite() and opt.grad_norm.isnan() == math.isnan(bad)


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


# clip_grad_norm_ ------------------------------------------------------------------------------

CLIPS = (fusedopt.clip_grad_norm_, nn.utils.clip_grad_norm_)


def params_with(grads):
    params = [
        torch.zeros_like(g).requires_grad_() if g is not None else leaf(torch.ones(2))
        for g in grads
    ]
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()
    return params


def assert_clips_alike(grads, *args, pick=lambda params: params, coarsest=None, **kwargs):
    runs = []
    for clip in CLIPS:
        params = params_with(grads)
        norm = clip(pick(params), *args, **kwargs)
        runs.append((norm, [p.grad for p in params]))
    (ours, grads_), (theirs, expected) = runs
    assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device)
    assert not ours.requires_grad
    assert_near(ours, theirs, dtype=coarsest)
    for g, h in zip(grads_, expected, strict=True):
        assert (g is None) == (h is None)
        if g is not None:
            assert_near(g, h, dtype=torch.float16 if g.dtype.itemsize == 2 else coarsest)


def test_clip_grad_norm_signature():
    ours, theirs = (inspect.signature(clip).parameters for clip in CLIPS)
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


@pytest.mark.parametrize("foreach", [None, True, False], ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 2, 1, 1.5, 0, INF, -INF, "2", "inf"], ids=str)
@pytest.mark.parametrize("max_norm", [0.0, 1, 2.5, INF, 1e9], ids=str)
def test_clip_grad_norm_(norm_type, foreach, max_norm, backend):
    _, (grads,) = draw([(33,), (2, 3), (), (3, 1, 5)], 1)
    assert_clips_alike([*grads, None], max_norm, norm_type, foreach=foreach)
    assert_clips_alike(grads, max_norm=max_norm, norm_type=norm_type, foreach=foreach)


@pytest.mark.parametrize(
    "pick",
    [lambda ps: ps[0], tuple, lambda ps: (p for p in ps), lambda ps: nn.ParameterList(ps), iter],
    ids=["tensor", "tuple", "generator", "ParameterList", "iterator"],
)
@every_dtype
def test_clip_grad_norm_of(pick, dtype, backend):
    _, (grads,) = draw([(33,), (2, 3)], 1, dtype)
    assert_clips_alike(grads, 2.0, pick=pick)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float64, torch.float32),
        (torch.complex64, torch.float64),
        (torch.complex64, torch.float32),
        (torch.complex128,),
    ],
    ids=str,
)
def test_clip_grad_norm_of_mixed_dtypes(dtypes, backend):
    grads = [gradient_like(torch.randn(5, dtype=dtype)) for dtype in dtypes]
    half = [dtype for dtype in dtypes if dtype.itemsize == 2]
    assert_clips_alike(grads, 2.0, coarsest=half[0] if half else torch.float32)


def test_clip_grad_norm_of_nothing(backend):
    assert_clips_alike([None, None], 1.0)
    assert_clips_alike([], 1.0)
    assert_clips_alike([torch.ones(0), torch.ones(2, 0)], 1.0)
    assert_clips_alike([torch.ones(0), torch.ones(3)], 1.0)


def test_clip_grad_norm_of_an_empty_generator(backend):
    """torch warns."""
    seen = []
    for clip in CLIPS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert clip((p for p in ()), 1.0).item() == 0.0
        seen.append([(w.category, str(w.message)) for w in caught])
    assert seen[0] == seen[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_clip_grad_norm_of_layouts(layout, backend):
    runs = []
    values = torch.randn(4, 3, 2, 5)
    for clip in CLIPS:
        p = leaf(torch.zeros_like(values))
        p.grad, around = LAYOUTS[layout](values)
        before = [bits(t) for t in around]
        runs.append((clip(p, 1.0), p.grad))
        assert [bits(t) for t in around] == before
    for ours, theirs in zip(*runs, strict=True):
        assert_near(ours, theirs)


@pytest.mark.parametrize("bad", [INF, -INF, NAN], ids=str)
@pytest.mark.parametrize("max_norm", [1.0, INF], ids=str)
def test_clip_grad_norm_not_finite(bad, max_norm, backend):
    _, (grads,) = draw([(33,), (2, 3)], 1)
    grads[0][3] = bad
    assert_clips_alike(grads, max_norm)
    raised = []
    for clip in CLIPS:
        params = params_with(grads)
        with pytest.raises(RuntimeError) as caught:
            clip(params, max_norm, error_if_nonfinite=True)
        assert [bits(p.grad) for p in params] == [bits(g) for g in grads]
        raised.append(str(caught.value))
    assert raised[0] == raised[1]
    assert_clips_alike([torch.ones(3)], max_norm, error_if_nonfinite=True)


@pytest.mark.parametrize("arguments", [("x",), (1.0, "x"), (1.0, None), (None,)], ids=str)
def test_clip_grad_norm_bad_arguments(arguments, backend):
    raised = []
    for clip in CLIPS:
        with pytest.raises((TypeError, ValueError)) as caught:
            clip(params_with([torch.ones(3)]), *arguments)
        raised.append(caught.type)
    assert raised[0] is raised[1]


def test_clip_grad_norm_of_sparse_gradients(backend):
    """torch cannot; here it is the norm of the same gradients as dense ones."""
    sparse = torch.sparse_coo_tensor([[0, 2, 0]], 2 + torch.rand(3, 2), (3, 2))
    dense = [sparse.to_dense(), torch.rand(4)]
    p, q = torch.zeros(3, 2).requires_grad_(), torch.zeros(4).requires_grad_()
    p.grad, q.grad = sparse.clone(), dense[1].clone()
    norm = fusedopt.clip_grad_norm_([p, q], 1.5)
    expected = params_with(dense)
    assert_near(norm, nn.utils.clip_grad_norm_(expected, 1.5))
    assert_near(p.grad.to_dense(), expected[0].grad)
    assert_near(q.grad, expected[1].grad)


def test_clip_grad_norm_in_place_and_without_a_graph(backend):
    p = leaf(torch.ones(3))
    loss = (p**3).sum()
    (p.grad,) = torch.autograd.grad(loss, [p], create_graph=True)
    grad = p.grad
    runs = [fusedopt.clip_grad_norm_(p, 1.0)]
    assert p.grad is grad and not runs[0].requires_grad
    assert_near(grad, torch.full((3,), 3**-0.5))


# amp_fused ------------------------------------------------------------------------------------


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


@every_dtype
@every_case
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


# Where the options live -----------------------------------------------------------------------


def via_torch_save(opt):
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt)),
    "torch.save": via_torch_save,
}


@every_name
@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("max_norm", [None, 0.0, 2.5, INF], ids=str)
@pytest.mark.parametrize("amp", [False, True])
def test_copies_keep_the_options(name, duplicate, max_norm, amp, backend):
    _, opt = train(getattr(fusedopt, name), *draw([(5,)], 2), max_grad_norm=max_norm, amp_fused=amp)
    twin = COPIES[duplicate](opt)
    assert (twin.max_grad_norm, twin.amp_fused) == (max_norm, amp)
    assert bool(getattr(twin, "_step_supports_amp_scaling", False)) == amp
    assert snapshot(twin) == snapshot(opt)


@every_name
def test_the_options_are_not_in_checkpoints(name, backend):
    cls, stock_cls = getattr(fusedopt, name), TABLES[name].stock
    values, grads = draw([(5,)], 2)
    (p,), opt = train(cls, values, grads, max_grad_norm=2.0, amp_fused=True)
    _, stock = train(stock_cls, values, grads)
    assert [list(g) for g in opt.param_groups] == [list(g) for g in stock.param_groups]
    assert opt.defaults.keys() == stock.defaults.keys()
    assert repr(opt) == repr(cls([leaf(values[0])]))
    for source in (stock, train(cls, values, grads)[1]):
        opt.load_state_dict(source.state_dict())
        assert (opt.max_grad_norm, opt.amp_fused) == (2.0, True)
        assert opt._step_supports_amp_scaling
    _, plain = train(cls, values, grads)
    plain.load_state_dict(opt.state_dict())
    assert plain.max_grad_norm is None and not plain.amp_fused
    assert not hasattr(plain, "_step_supports_amp_scaling")


@pytest.mark.parametrize(
    ("name", "more"),
    [
        (name, more)
        for name in NAMES
        for more in ({}, {"fused": True})
        if not more or name in those_with("fused")
    ],
    ids=str,
)
def test_the_scaler_unscales_by_default(name, more):
    cls = getattr(fusedopt, name)
    _, opt = train(cls, *draw([(5,)], 1), **more)
    _, unfused = train(cls, *draw([(5,)], 1))
    for twin in (opt, *(duplicate(opt) for duplicate in COPIES.values())):
        assert not hasattr(twin, "_step_supports_amp_scaling")
        twin.load_state_dict(unfused.state_dict())
        assert not hasattr(twin, "_step_supports_amp_scaling")
    assert not hasattr(cls, "_step_supports_amp_scaling")


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", those_with("fused"))
def test_an_unfused_checkpoint_in_a_fused_optimizer(name, amp, backend):
    """Where torch turns fusing off, but goes on telling the scaler that it is on."""
    case = Case(name, {"lr": 0.01})
    past = Amp(case.stock).run(". .")
    ours = Amp(case.ours, fused=True, amp_fused=amp)
    stock = Amp(case.stock)
    for run in (ours, stock):
        run.opt.load_state_dict(copy.deepcopy(past.opt.state_dict()))
        run.run(". o .")
    assert ours.log == stock.log
    assert_trained_alike(ours.opt, ours.params, stock.opt, stock.params)


# capturable -----------------------------------------------------------------------------------


@richest
def test_capturable_on_the_cpu(case, backend):
    """An error of the step, as with stock, and nothing has changed."""
    if backend == "kernels":
        pytest.skip("its memory is that of a GPU")
    values, grads = draw([(5,), (2, 3)], 3)
    params = [leaf(v) for v in values]
    opt = case.ours(params, capturable=True)
    for now in grads[:2]:
        for group in opt.param_groups:
            group["capturable"] = True
        for p, g in zip(params, now, strict=True):
            p.grad = g.clone()
        before = snapshot(opt)
        with pytest.raises(RuntimeError, match="capturable=True"):
            opt.step()
        assert snapshot(opt) == before
        for group in opt.param_groups:
            group["capturable"] = False
        opt.step()
    exact, stock = train(case.stock, values, grads[:2])
    assert_trained_alike(opt, params, stock, exact)


@every_sparse
def test_capturable_is_in_no_group_unless_on(name, backend):
    """torch has no such option; one that is on travels through its checkpoints."""
    cls, stock_cls = getattr(fusedopt, name), TABLES[name].stock
    values, grads = draw([(5,)], 2)
    (_,), off = train(cls, values, grads)
    (_,), stock = train(stock_cls, values, grads)
    on = cls([leaf(values[0])], capturable=True)
    assert all("capturable" not in g for g in (*off.param_groups, off.defaults))
    assert on.param_groups[0]["capturable"] is True and on.defaults["capturable"] is True
    on.add_param_group({"params": [leaf(values[0])]})
    assert on.param_groups[1]["capturable"] is True
    on = cls([leaf(values[0])], capturable=True)
    on.load_state_dict(stock.state_dict())
    assert on.param_groups[0]["capturable"] is True
    assert "capturable" not in stock.state_dict()["param_groups"][0]
    (q,), there = train(stock_cls, values, grads)
    there.load_state_dict(on.state_dict())
    q.grad = torch.ones(5)
    there.step()  # torch ignores what it does not know
    off.load_state_dict(on.state_dict())
    assert off.param_groups[0]["capturable"] is True


@pytest.mark.parametrize("name", those_with("capturable"))
def test_a_capturable_checkpoint_of_stock(name, backend):
    case = Case(name, {"lr": 0.1})
    values, grads = draw([(5,)], 3)
    (q,), stock = train(case.stock, values, grads[:2])
    stock.param_groups[0]["capturable"] = True
    (p,), opt = train(case.ours, values, grads[:2])
    opt.load_state_dict(stock.state_dict())
    assert opt.param_groups[0]["capturable"] is True
    if case.table.counts_steps:
        assert opt.state[p]["step"].dtype == torch.float32 and opt.state[p]["step"].item() == 2
    back = case.stock([leaf(values[0])])
    back.load_state_dict(opt.state_dict())
    assert back.param_groups[0]["capturable"] is True
