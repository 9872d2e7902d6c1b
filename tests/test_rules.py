"""Every rule and option against torch's for-loop, in float64 for accuracy."""

from __future__ import annotations

import copy
import math

import pytest
import seam
import torch
from cases import (
    CASES,
    COMPLEX_CASES,
    COUNTING,
    DTYPES,
    RICHEST_OF,
    SCALARS,
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
    same_bits,
    snapshot,
    states,
    step_through,
    train,
)

import fusedopt

SHAPES = [(), (1,), (5,), (17, 33), (0, 3), (4099,), (2, 3, 4, 5)]


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


# Steps and group values -----------------------------------------------------------------------


@pytest.mark.parametrize("case", COUNTING, ids=str)
def test_step_counts_beyond_float32(case, backend):
    values, grads = draw([(19,)], 1)
    (param,), opt = train(case.ours, values, grads)
    opt.state[param]["step"].fill_(2**24 - 1)
    counts = []
    for _ in range(3):
        opt.step()
        counts.append(opt.state[param]["step"].item())
    assert counts == [2**24, 2**24 + 1, 2**24 + 2]


@pytest.mark.parametrize("case", COUNTING, ids=str)
def test_a_late_step_has_the_bias_correction_of_its_count(case, backend):
    values, grads = draw([(19,)], 3)
    runs = []
    for build, dtype in ((case.ours, None), (case.exact, torch.float64)):
        (param,), opt = train(build, values, grads[:1], dtype)
        opt.state[param]["step"].fill_(1234)
        step_through(opt, [param], grads[1:])
        runs.append((opt, [param]))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.999), (0.9, 0.0), (0.5, 0.5)])
def test_beta_limits(betas, backend):
    case = Case("Adam", {"betas": betas, "lr": 0.1})
    values, grads = draw(SHAPES, 4)
    params, opt = train(case.ours, values, grads)
    exact, oracle = train(case.exact, values, grads, torch.float64)
    assert_trained_alike(opt, params, oracle, exact, torch.float32)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        (RICHEST_OF["SGD"], {"lr": 0.5, "momentum": 0.2, "weight_decay": 0.3, "maximize": True}),
        (RICHEST_OF["SGD"], {"nesterov": False, "dampening": 0.4}),
        (RICHEST_OF["SGD"], {"momentum": 0.0, "nesterov": False}),
        (RICHEST_OF["Adam"], {"lr": 0.5, "betas": (0.2, 0.3), "eps": 0.1, "maximize": True}),
        (RICHEST_OF["Adam"], {"amsgrad": False, "weight_decay": 0.0}),
        (RICHEST_OF["Adam"], {"decoupled_weight_decay": True}),
        (RICHEST_OF["AdamW"], {"betas": [0.2, 0.3], "weight_decay": 0.5}),
        (RICHEST_OF["RMSprop"], {"lr": 0.5, "alpha": 0.7, "eps": 0.1, "maximize": True}),
        (RICHEST_OF["RMSprop"], {"centered": False, "momentum": 0.1}),
        (RICHEST_OF["RMSprop"], {"momentum": 0.0}),
        (RICHEST_OF["Adagrad"], {"lr": 0.5, "lr_decay": 0.5, "eps": 0.1, "maximize": True}),
    ],
    ids=str,
)
def test_group_values_are_read_at_every_step(case, changes, backend):
    values, grads = draw(SHAPES, 6)
    runs = []
    for build, dtype in ((case.ours, None), (case.exact, torch.float64)):
        params, opt = train(build, values, grads[:3], dtype)
        opt.param_groups[0].update(changes)
        step_through(opt, params, grads[3:])
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


@richest
def test_tensor_lr_changed_in_place(case, backend):
    values, grads = draw(SHAPES, 4)
    runs = []
    for build in (case.ours, case.stock):
        params = [leaf(v) for v in values]
        opt = build(params)
        lr = opt.param_groups[0]["lr"] = torch.tensor(0.1)
        step_through(opt, params, grads[:2])
        lr.mul_(5)
        step_through(opt, params, grads[2:])
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


@richest
def test_groups_have_their_own_options(case, backend):
    values, grads = draw([(7,), (3, 4), (20,)], 4)
    override = {"lr": 0.01, "weight_decay": 0.3, "maximize": True}
    runs = []
    for build, dtype in ((case.ours, None), (case.exact, torch.float64)):
        params = [leaf(v, dtype) for v in values]
        opt = build([{"params": params[:1]}, {"params": params[1:2], **override}])
        step_through(opt, params[:2], [now[:2] for now in grads[:2]])
        opt.add_param_group({"params": params[2:], "lr": 0.03})
        step_through(opt, params, grads[2:])
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


# l1 and eps_inside_sqrt -----------------------------------------------------------------------


@richest
def test_options_that_are_off_are_in_no_group(case):
    opt = case.ours([leaf(torch.ones(2))])
    assert not {"l1", "eps_inside_sqrt"} & (set(opt.param_groups[0]) | set(opt.defaults))


@richest
def test_l1_can_be_set_for_one_group(case, backend):
    plain = Case(case.name, {**case.options, "l1": 0.05})
    values, grads = draw([(33,), (33,)], 4)
    params = [leaf(v) for v in values]
    opt = case.ours([{"params": params[:1]}, {"params": params[1:], "l1": 0.05}])
    step_through(opt, params, grads)
    off, _ = train(case.exact, values[:1], [g[:1] for g in grads], torch.float64)
    on, _ = train(plain.exact, values[1:], [g[1:] for g in grads], torch.float64)
    assert_near(params[0], off[0])
    assert_near(params[1], on[0])


@richest
def test_l1_does_not_move_a_parameter_at_zero(case, backend):
    values = [torch.zeros(40)]
    grads = [[torch.zeros(40)]] * 2
    case = Case(case.name, {**case.options, "l1": 0.5})
    (param,), _ = train(case.ours, values, grads)
    assert not param.detach().abs().max()


@every_name
@pytest.mark.parametrize("l1", [-1e-9, math.nan])
def test_bad_l1_raises(name, l1):
    with pytest.raises(ValueError, match="Invalid l1 value"):
        Case(name, {"l1": l1}).ours([leaf(torch.ones(2))])


def test_extras_survive_a_checkpoint_and_a_copy(backend):
    case = Case("RMSprop", {"l1": 0.1, "eps_inside_sqrt": True})
    _, opt = train(case.ours, *draw([(5,)], 2))
    fresh = Case("RMSprop", {}).ours([leaf(torch.ones(5))])
    fresh.load_state_dict(opt.state_dict())
    for other in (fresh, copy.deepcopy(opt)):
        assert other.param_groups[0]["l1"] == 0.1
        assert other.param_groups[0]["eps_inside_sqrt"] is True


def test_the_second_step_goes_on_after_a_first_by_the_python_rule(backend):
    """A gradient of another dtype is left to the Python rule; the momentum that it made counts."""
    case = Case("SGD", {"lr": 0.1, "momentum": 0.9})
    values, grads = draw([(7,), (5,)], 3, torch.float64)
    params, exact = [leaf(v) for v in values], [leaf(v) for v in values]
    ours, oracle = case.ours(params), case.exact(exact)
    for step, now in enumerate(grads):
        now = [g.float() for g in now] if step == 0 else now
        for p, q, g in zip(params, exact, now, strict=True):
            if hasattr(p, "grad_dtype"):  # torch 2.10 has it not, and takes any dtype
                p.grad_dtype = None
            p.grad, q.grad = g.clone(), g.double()
        ours.step()
        oracle.step()
    assert_trained_alike(ours, params, oracle, exact)


# Sparse ---------------------------------------------------------------------------------------


def _sparse(rows: int, columns: int, indices: list[int], dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(len(indices), columns, dtype=dtype)
    return torch.sparse_coo_tensor([indices], values, (rows, columns))


@pytest.mark.parametrize(
    "case",
    [
        Case("SGD", {"lr": 0.1}),
        Case("SGD", {"lr": 0.1, "momentum": 0.9, "maximize": True}),
        Case("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
        Case("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        Case("SGD", {"lr": torch.tensor(0.1), "momentum": 0.9}),
        Case("Adagrad", {"lr": 0.1}),
        Case("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "maximize": True}),
        Case("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.3, "eps": 0.1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sparse_gradients(case, dtype, backend):
    """Next to dense ones; with repeated, missing and new rows."""
    rows = [[0, 3, 3], [], [5, 1], [0, 0, 0, 2], list(range(6))]
    values = [torch.randn(6, 4, dtype=dtype), torch.randn(9, dtype=dtype)]
    grads = [[_sparse(6, 4, r, dtype), torch.randn(9, dtype=dtype)] for r in rows]
    runs = []
    for build in (case.ours, case.stock):
        params, opt = train(build, values, grads)
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)
    for state, expected in zip(states(*runs[0]), states(*runs[1]), strict=True):
        assert state.keys() == expected.keys()
        for key in state:
            assert state[key].layout == expected[key].layout
            assert_near(state[key].to_dense(), expected[key].to_dense(), key, torch.float32)


@every_sparse
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sparse_gradients_of_fewer_bits(name, dtype, backend):
    """Their squares do not fit into float16; the update has the accuracy of the parameter."""
    case = Case(name, {"lr": 0.1})
    values, grad = torch.randn(6, 4, dtype=dtype), _sparse(6, 4, [1, 4], torch.float16) * 1000
    param, exact = leaf(values), leaf(values, torch.float64)
    ours, oracle = case.ours([param]), case.exact([exact])
    for p, opt in ((param, ours), (exact, oracle)):
        if hasattr(p, "grad_dtype"):  # torch 2.10 has it not, and takes any dtype
            p.grad_dtype = None
        p.grad = grad if opt is ours else grad.double()
        opt.step()
    assert_trained_alike(ours, [param], oracle, [exact], dtype)


def test_sparse_gradients_with_state_of_fewer_bits(backend):
    """The sum overflows float16 when it is stored, not in the update."""
    param = leaf(torch.zeros(6, 4))
    opt = fusedopt.Adagrad([param], lr=0.1)
    opt.state[param]["sum"] = torch.zeros(6, 4, dtype=torch.float16)
    param.grad = _sparse(6, 4, [1, 4], torch.float32) * 1e4
    opt.step()
    moved = param.detach()[[1, 4]].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1))
    assert opt.state[param]["sum"][[1, 4]].isinf().any()


@pytest.mark.parametrize(
    "case",
    [
        Case("SGD", {"lr": 0.1}),
        Case("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        Case("Adagrad", {"lr": 0.1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (1, 2, 2, 3)], ids=str)
def test_sparse_gradients_of_a_view(case, shape, backend):
    """Only the view is written. torch's own ``add_`` writes to memory beside it, for gradients that
    are sparse in all dimensions."""
    values, grad = torch.randn(shape), torch.randn(shape) + 3
    memory = torch.full((3 * values.numel(),), 7.0)
    middle = memory[values.numel() : 2 * values.numel()]
    param = middle.view(shape).copy_(values).requires_grad_()
    exact = leaf(values, torch.float64)
    ours, oracle = case.ours([param]), case.exact([exact])
    for scale in (1, 2):
        param.grad, exact.grad = (scale * grad).to_sparse(), (scale * grad).double()
        ours.step()
        oracle.step()
    assert_near(param, exact)
    around = torch.cat([memory[: values.numel()], memory[2 * values.numel() :]])
    assert (around == 7).all()


@pytest.mark.parametrize("case", [RICHEST_OF["SGD"], RICHEST_OF["Adagrad"]], ids=str)
def test_sparse_and_dense_gradients_take_turns(case, backend):
    """An embedding whose gradient is dense, then sparse, as stock's SGD and Adagrad allow."""
    case = Case(case.name, {**case.options, "weight_decay": 0})
    case.options.pop("nesterov", None)
    runs = []
    grads = [[torch.randn(6, 4)], [_sparse(6, 4, [1, 1, 4], torch.float32)], [torch.randn(6, 4)]]
    values = [torch.randn(6, 4)]
    for build in (case.ours, case.stock):
        params, opt = train(build, values, grads)
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


def test_nothing_is_left_of_a_sparse_embedding_step(backend):
    torch.manual_seed(0)
    runs = []
    for cls in (fusedopt.Adagrad, torch.optim.Adagrad):
        torch.manual_seed(0)
        table = torch.nn.Embedding(10, 3, sparse=True)
        opt = cls(table.parameters(), lr=0.1)
        for ids in ([1, 2, 2], [9, 1]):
            opt.zero_grad()
            table(torch.tensor(ids)).square().sum().backward()
            opt.step()
        runs.append(table.weight)
    assert_near(*runs)
    assert same_bits(runs[0].detach()[3:9], runs[1].detach()[3:9])
