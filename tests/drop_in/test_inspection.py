"""What can be inspected of an optimizer: groups and state look like stock's."""

from __future__ import annotations

import pytest
import torch
from cases import (
    CASES,
    EXTRAS,
    assert_near,
    assert_trained_alike,
    bits,
    draw,
    gradient_like,
    leaf,
    richest,
    step_through,
    train,
)

PLAIN = [case for case in CASES if not set(case.options) & set(EXTRAS)]


@pytest.mark.parametrize("case", PLAIN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_groups_and_state_look_like_stock(case, dtype, backend):
    values = [torch.randn(4, 3, 2, 5).to(dtype), torch.randn(()).to(dtype), torch.randn(3)]
    values[0] = values[0].to(memory_format=torch.channels_last)
    grads = [[gradient_like(values[0]), None, torch.randn(3)]] * 3
    _, ours = train(case.ours, values, grads)
    _, stock = train(case.stock, values, grads, foreach=None)
    assert ours.defaults == stock.defaults
    assert list(ours.defaults) == list(stock.defaults)
    assert repr(ours) == repr(stock)
    for group, expected in zip(ours.param_groups, stock.param_groups, strict=True):
        assert list(group) == list(expected)
        assert {**group, "params": 0} == {**expected, "params": 0}
    saved, expected = ours.state_dict(), stock.state_dict()
    assert saved.keys() == expected.keys()
    assert saved["param_groups"] == expected["param_groups"]
    assert saved["state"].keys() == expected["state"].keys()
    for i, state in expected["state"].items():
        assert saved["state"][i].keys() == state.keys()
        for key, value in state.items():
            mine = saved["state"][i][key]
            assert (mine.dtype, mine.shape, mine.device) == (value.dtype, value.shape, value.device)
            assert mine.stride() == value.stride(), key
            assert mine.requires_grad == value.requires_grad and mine.is_leaf


@richest
def test_state_before_the_first_step(case):
    params = [leaf(torch.ones(2)), leaf(torch.ones(2, dtype=torch.complex64))]
    more = {"initial_accumulator_value": 0.25} if case.table.makes_state_at_once else {}
    ours, stock = case.ours(params, **more), case.stock(params, **more)
    assert len(ours.state) == len(stock.state)
    for p in params if stock.state else []:
        assert [*map(bits, ours.state[p].values())] == [*map(bits, stock.state[p].values())]


@richest
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_state_of_parameters_that_came_later(case, dtype, backend):
    """By add_param_group; Adagrad makes the state of these in step(), not in the constructor."""
    more = {"initial_accumulator_value": 0.25} if case.table.makes_state_at_once else {}
    runs = []
    values = [torch.randn(5).to(dtype) for _ in range(2)]
    grads = [[gradient_like(v) for v in values] for _ in range(3)]
    for build in (case.ours, case.stock):
        params = [leaf(v) for v in values]
        opt = build(params[:1], **more)
        step_through(opt, params[:1], [now[:1] for now in grads[:1]])
        opt.add_param_group({"params": params[1:]})
        assert len(opt.state) == 1
        step_through(opt, params, grads[1:])
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1])


@richest
def test_default_dtype_float64(case, backend):
    torch.set_default_dtype(torch.float64)
    try:
        values, grads = draw([(3,)], 2)
        (p,), ours = train(case.ours, values, grads)
        (q,), stock = train(case.stock, values, grads)
        assert {k: v.dtype for k, v in ours.state[p].items()} == {
            k: v.dtype for k, v in stock.state[q].items()
        }
        assert_near(p, q)
    finally:
        torch.set_default_dtype(torch.float32)
