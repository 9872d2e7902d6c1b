"""Every rule and option against torch's for-loop, in float64 for accuracy."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import seam
import torch
from cases import (
    CASES,
    COMPLEX_CASES,
    DTYPES,
    SCALARS,
    Case,
    assert_near,
    assert_trained_alike,
    bits,
    draw,
    every_case,
    every_dtype,
    gradient_like,
    leaf,
    richest,
    snapshot,
    states,
    step_through,
    train,
)

import fusedopt
from rules import SHAPES


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_float64_oracle(case, dtype, backend):
    values, grads = draw(SHAPES, 6, dtype)
    params, opt = train(case.ours, values, grads)
    exact, oracle = train(case.exact, values, grads, torch.float64)
    if backend == "python" and any(isinstance(v, torch.Tensor) for v in case.options.values()):
        dtype = torch.float32  # as torch, the Python rule computes with a tensor lr in its dtype
    assert_trained_alike(opt, params, oracle, exact, dtype)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_less_accurate_than_stock(case, dtype, backend):
    case = Case(case.name, {"lr": 0.1, **case.options})
    if case.name == "Lion":
        pytest.skip("an error is no measure where the sign of a rounding decides")
    values, grads = draw([(64, 129)], 5, dtype)
    # Away from zero, where squares underflow in float16 and everyone's error is unbounded.
    grads = [[g.sign() * torch.empty_like(g).uniform_(4, 16) for g in now] for now in grads]
    runs = []
    for build, wide in ((case.ours, None), (case.stock, None), (case.exact, torch.float64)):
        (param,), opt = train(build, values, grads, wide)
        runs.append({"param": param.detach(), **opt.state[param]})
    ours, stock, exact = runs
    for key in exact.keys() - {"step"}:
        error, of_stock = ((run[key].double() - exact[key]) for run in (ours, stock))
        half_ulp = torch.finfo(dtype).eps / 2 * exact[key].abs().clamp_min(1)
        assert error.norm() <= of_stock.norm() + 0.25 * half_ulp.norm(), key
        assert error.abs().max() <= of_stock.abs().max() + 2 * half_ulp.max(), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_float32_rounded_once(dtype, backend):
    """Random values, and those that rounding treats specially: ties, subnormals, overflow."""
    tiny = torch.finfo(dtype).tiny
    special = torch.tensor([0.0, -0.0, tiny, tiny / 4, -tiny / 2, 1e4, -6e4, 65504, math.inf])
    values = torch.cat([torch.randn(4096), special]).to(dtype)
    grads = torch.cat([torch.randn(4096), -special.flip(0)]).to(dtype)
    (param,), _ = train(fusedopt.SGD, [values], [[grads]], lr=0.37)
    lr = torch.tensor(0.37)
    torch.testing.assert_close(
        param.detach(), (values.float() - lr * grads.float()).to(dtype), rtol=0, atol=0
    )


@pytest.mark.parametrize("case", [c for c in CASES if "eps_inside_sqrt" not in c.options], ids=str)
def test_special_values_go_where_stock_sends_them(case, backend):
    # A centered variance of inf - inf depends on whether the compiler fused multiply and add.
    large = 1e18 if case.options.get("centered") else 3e38
    special = [0.0, -0.0, 1.0, -2.0, math.inf, -math.inf, math.nan, 1e-40, -1e-42, large, 1e-20]
    grid = torch.cartesian_prod(*[torch.tensor(special)] * 2)
    values, grad = (c.contiguous() for c in grid.unbind(1))
    grads = [[grad], [grad.roll(5)], [torch.ones_like(grad)]]
    (param,), opt = train(case.ours, [values], grads)
    (expected,), stock = train(case.stock, [values], grads)
    parts = [(param, expected)]
    parts += [
        (v, stock.state[expected][k]) for k, v in opt.state[param].items() if k not in SCALARS
    ]
    for ours, theirs in parts:
        ours, theirs = ours.detach(), theirs.detach()
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert not (kind(ours) ^ kind(theirs)).any(), (ours, theirs)
        normal = theirs.isfinite() & (theirs.abs() < 1e30)
        assert_near(ours[normal], theirs[normal], str(case), torch.float32)


def test_amsgrad_keeps_a_nan(backend):
    case = Case("Adam", {"amsgrad": True})
    nan = torch.full((35,), math.nan)
    (param,), opt = train(case.ours, [torch.ones(35)], [[nan]])
    opt.state[param]["exp_avg_sq"].fill_(1.0)
    step_through(opt, [param], [[torch.ones(35)]])
    assert opt.state[param]["max_exp_avg_sq"].isnan().all()


@richest
def test_mixed_dtypes_in_one_group(case, backend):
    dtypes = [*DTYPES, torch.complex64, torch.complex128] * 2
    values = [torch.randn(37, dtype=torch.complex128).to(d) for d in DTYPES for d in dtypes]
    # Of size 1: the tolerances are absolute where momentum and gradient cancel.
    grads = [[gradient_like(v, scale=1.0) for v in values] for _ in range(3)]
    params, opt = train(case.ours, values, grads)
    exact = [v.to(torch.complex128 if v.is_complex() else torch.float64) for v in values]
    wide = [[g.to(e.dtype) for g, e in zip(now, exact, strict=True)] for now in grads]
    oracle_params, oracle = train(case.exact, exact, wide)
    assert_trained_alike(opt, params, oracle, oracle_params)


@pytest.mark.parametrize("case", COMPLEX_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex(case, dtype, backend):
    values = [torch.randn(s, dtype=dtype) for s in SHAPES]
    grads = [[gradient_like(v) for v in values] for _ in range(4)]
    params, opt = train(case.ours, values, grads)
    exact, oracle = train(case.exact, values, grads, torch.complex128)
    if any(isinstance(v, torch.Tensor) for v in case.options.values()):
        dtype = torch.complex64
    assert_trained_alike(opt, params, oracle, exact, dtype)


def test_conjugate_and_negated_views_as_gradients(backend):
    values = [torch.randn(9, dtype=torch.complex64), torch.randn(9)]
    grad = torch.randn(9, dtype=torch.complex64)
    lazy = [grad.conj(), grad.conj().imag]
    assert lazy[0].is_conj() and lazy[1].is_neg()
    runs = []
    for build, grads in (
        (fusedopt.Adam, lazy),
        (torch.optim.Adam, [g.resolve_conj().resolve_neg() for g in lazy]),
    ):
        params = [leaf(v) for v in values]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        build(params, lr=0.1).step()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert_near(p, q)


@richest
def test_new_state_does_not_depend_on_memory(case, backend, monkeypatch):
    """Uninitialised memory is NaN in one of the two runs."""
    values, grads = draw([(129,), (8, 5)], 3)
    plain = snapshot(train(case.ours, values, grads)[1])
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = snapshot(train(case.ours, values, grads)[1])
    finally:
        torch.use_deterministic_algorithms(False)
    assert poisoned == plain


@every_dtype
def test_sgd_does_not_read_the_momentum_buffer_at_its_first_step(dtype, backend):
    case = Case("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True})
    values, grads = draw([(35,), (4, 4)], 3, dtype)
    plain = snapshot(train(case.ours, values, grads)[1])
    with seam.initial_state_of(fusedopt.SGD, math.nan):
        assert snapshot(train(case.ours, values, grads)[1]) == plain


@richest
def test_version_counters_move(case, backend):
    (param,), opt = train(case.ours, *draw([(40,)], 2))
    versions = {k: v._version for k, v in opt.state[param].items()}
    before = param._version
    y = (param * param).sum()
    opt.step()
    assert param._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    for key, value in opt.state[param].items():
        assert value._version > versions[key], key


@richest
def test_step_leaves_gradients_alone(case, backend):
    values, grads = draw([(40,), (3, 7)], 1)
    params = [leaf(v) for v in values]
    opt = case.ours(params, maximize=True)
    for p, g in zip(params, grads[0], strict=True):
        p.grad = g
    before, versions = [bits(p.grad) for p in params], [p.grad._version for p in params]
    for _ in range(3):
        opt.step()
    assert [bits(p.grad) for p in params] == before
    assert [p.grad._version for p in params] == versions
    buffers = [v for s in states(opt, params) for v in s.values()]
    assert not {b.data_ptr() for b in buffers} & {p.grad.data_ptr() for p in params}


@pytest.mark.parametrize("foreach", [False, True])
def test_lion_as_the_benchmarks_have_it(foreach, monkeypatch):
    """What they compare with computes the same."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    published_lion = importlib.import_module("bench.published_lion")
    values, grads = draw([(3,), (4, 5)], 5, torch.float64)
    options = {"lr": 0.1, "weight_decay": 0.1}
    expected, _ = train(published_lion.Lion, values, grads, foreach=foreach, **options)
    params, _ = train(fusedopt.Lion, values, grads, **options)
    for param, exact in zip(params, expected, strict=True):
        assert_near(param, exact)
