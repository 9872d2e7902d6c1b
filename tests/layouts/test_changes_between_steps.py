"""Whatever may happen to parameters, gradients and state between steps."""

from __future__ import annotations

import pytest
import torch
from cases import (
    SCALARS,
    assert_near,
    assert_trained_alike,
    draw,
    gradient_like,
    leaf,
    richest,
    same_bits,
    states,
    step_through,
    train,
)
from torch import nn


def _runs(case, values, grads, change, dtype=None):
    """Trains ours and stock in the same way, with a change after two steps."""
    runs = []
    for build in (case.ours, case.stock):
        params = [leaf(v) for v in values]
        opt = build(params)
        step_through(opt, params, grads[:2])
        change(opt, params)
        step_through(opt, params, grads[2:])
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=dtype)
    return runs


def _swap_data(opt, params):
    for p in params:
        p.data = p.data * 1.5


def _to_channels_last(opt, params):
    for p in params:
        p.data = p.data.to(memory_format=torch.channels_last)


def _replace_state(opt, params):
    for p in params:
        for key, value in opt.state[p].items():
            opt.state[p][key] = value * 2


def _swap_state_data(opt, params):
    for p in params:
        for key, value in opt.state[p].items():
            if key not in SCALARS:
                value.data = value.data * 2


def _swap_step_data(opt, params):
    for p in params:
        if "step" in opt.state[p]:
            opt.state[p]["step"].data = torch.tensor(7.0)


def _write_state(opt, params):
    for p in params:
        for value in opt.state[p].values():
            value.mul_(2)


def _permute_state(opt, params):
    for p in params:
        for key, value in opt.state[p].items():
            if key not in SCALARS:
                opt.state[p][key] = value.transpose(0, 3).contiguous().transpose(0, 3)


def _slice_state(opt, params):
    for p in params:
        for key, value in opt.state[p].items():
            if key not in SCALARS:
                base = torch.zeros(*value.shape[:-1], 2 * value.shape[-1], dtype=value.dtype)
                opt.state[p][key] = base[..., ::2].copy_(value)


def _forget_state(opt, params):
    opt.state.clear() if not isinstance(opt, torch.optim.Adagrad) else None


def _forget_one(opt, params):
    del opt.state[params[1]]


def _swap_state(opt, params):
    a, b = params[0], params[1]
    opt.state[a], opt.state[b] = opt.state[b], opt.state[a]


def _replace_params(opt, params):
    new = [leaf(p.detach() + 1) for p in params]
    for old, fresh in zip(params, new, strict=True):
        opt.state[fresh] = opt.state.pop(old)
    opt.param_groups[0]["params"][:] = new
    params[:] = new


def _drop_a_param(opt, params):
    """By hand, from the list that the optimizer has."""
    del opt.param_groups[0]["params"][0]


def _reorder_params(opt, params):
    opt.param_groups[0]["params"].reverse()


def _replace_group(opt, params):
    opt.param_groups[0] = {**opt.param_groups[0], "lr": 0.3}


def _resize(opt, params):
    """Shrinks a parameter and what belongs to it, as pruning does."""
    for p in params[:1]:
        p.data = p.data[:2].clone()
        for key, value in opt.state[p].items():
            if key not in SCALARS:
                opt.state[p][key] = value[:2].clone()


CHANGES = [
    _swap_data,
    _to_channels_last,
    _replace_state,
    _swap_state_data,
    _swap_step_data,
    _write_state,
    _permute_state,
    _slice_state,
    _forget_state,
    _forget_one,
    _swap_state,
    _replace_params,
    _drop_a_param,
    _reorder_params,
    _replace_group,
]


@richest
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__[1:])
def test_changes_between_steps_are_noticed(case, change, backend):
    values, grads = draw([(4, 3, 5, 2), (4, 3, 5, 2)], 5)
    _runs(case, values, grads, change, torch.float32)


@richest
def test_pruned_parameter(case, backend):
    values, grads = draw([(4, 3), (5,)], 4)
    grads = [[g[0] if at < 2 else g[0][:2], g[1]] for at, g in enumerate(grads)]
    _runs(case, values, grads, _resize, torch.float32)


@richest
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_model_to_another_dtype_between_steps(case, dtype, backend):
    """Parameters change in place; state keeps its dtype, and nothing is read as another."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    params = [*model.parameters()]
    opt = case.ours(params)
    exact = [leaf(p, torch.float64) for p in params]
    oracle = case.exact(exact)

    def step(times):
        for _ in range(times):
            for p, q in zip(params, exact, strict=True):
                p.grad = gradient_like(p)
                q.grad = p.grad.double()
            opt.step()
            oracle.step()

    step(2)
    model.to(dtype)
    assert params[0].dtype == dtype
    step(2)
    for p, q in zip(params, exact, strict=True):
        assert_near(p, q, dtype=torch.float32 if dtype == torch.float64 else dtype)
        assert all(v.dtype == torch.float32 for v in opt.state[p].values())


@richest
def test_fp32_state_on_a_low_precision_parameter(case, backend):
    """Moments that someone made float32 are kept and used as such."""
    values, grads = draw([(35,), (6, 7)], 6, torch.bfloat16)
    params = [leaf(v) for v in values]
    opt = case.ours(params)
    step_through(opt, params, grads[:1])
    exact = [leaf(p, torch.float64) for p in params]
    oracle = case.exact(exact)
    step_through(oracle, exact, grads[:1])
    for p, q in zip(params, exact, strict=True):
        q.data.copy_(p.detach())
        for key, value in opt.state[p].items():
            opt.state[p][key] = value.float()
            oracle.state[q][key].copy_(value)
    for now in grads[1:]:
        step_through(opt, params, [now])
        step_through(oracle, exact, [now])
        for p, q in zip(params, exact, strict=True):
            ulp = torch.finfo(torch.bfloat16).eps * q.detach().abs()
            assert ((p.double() - q).abs() <= ulp + 1e-6).all()
            q.data.copy_(p.detach())  # so that state is all that can differ
            for key, value in opt.state[p].items():
                assert value.dtype == torch.float32
                assert_near(value, oracle.state[q][key], key)


@richest
def test_low_precision_gradient_on_a_float32_parameter(case, backend):
    """Where torch allows it: with ``grad_dtype``."""
    param = torch.randn(37, requires_grad=True)
    if not hasattr(param, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    param.grad_dtype = None
    exact = leaf(param, torch.float64)
    opt, oracle = case.ours([param]), case.exact([exact])
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16, torch.float64):
        param.grad = (torch.randn(37) + 3).to(dtype)
        exact.grad = param.grad.double()
        opt.step()
        oracle.step()
    assert_near(param, exact)


@richest
def test_late_missing_and_frozen(case, backend):
    """Gradients that first appear at step 3, come and go, or never come."""
    values, grads = draw([(5,), (3, 4), (7,), (2,)], 6)
    for at, now in enumerate(grads):
        now[1] = now[1] if at >= 2 else None
        now[2] = now[2] if at % 2 else None
        now[3] = None
    runs = []
    for build in (case.ours, case.stock):
        params, opt = train(build, values, grads)
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)
    ours, stock = (states(*run) for run in runs)
    assert [s.keys() for s in ours] == [s.keys() for s in stock]
    assert same_bits(runs[0][1][3], leaf(values[3]))


@richest
def test_no_gradient_at_all(case, backend):
    params = [leaf(torch.ones(3)), leaf(torch.ones(()))]
    opt, stock = case.ours(params), case.stock(params)
    for _ in range(2):
        opt.step()
        stock.step()
    assert opt.state_dict()["state"].keys() == stock.state_dict()["state"].keys()
    step_through(opt, params, [[torch.ones(3), None]])
    assert not torch.equal(params[0].detach(), torch.ones(3))


@richest
def test_requires_grad_may_be_turned_off_between_steps(case, backend):
    values, grads = draw([(5,), (6,)], 4)
    _runs(case, values, grads, lambda opt, params: params[0].requires_grad_(False), torch.float32)


@richest
def test_shared_state(case, backend):
    """Two parameters with one step count and one moment, each updated twice in a step."""
    values, grads = draw([(2**18,), (2**18,)], 4)

    def share(opt, params):
        first, second = (opt.state[p] for p in params)
        for key in ("step", case.table.required):
            if key in first:
                second[key] = first[key]

    _runs(case, values, grads, share, torch.float32)
