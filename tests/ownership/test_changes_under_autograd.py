"""Parameters that change under autograd, between steps."""

from __future__ import annotations

import random

import pytest
import torch
from cases import RICHEST_OF, assert_near, bits, every_name, leaf, richest_and_stateless
from torch import nn

from ownership import train, with_options


@richest_and_stateless
@with_options
def test_another_shape_through_data(case, options, backend):
    """The next backward makes a gradient of the new shape."""
    shape = random.choice([(2, 3), (12,), (3, 1), (0,), (4, 3, 2)])
    param = leaf(torch.randn(4, 3))
    opt = case.ours([param], **options)
    train(opt, lambda: (param * 2).sum())
    param.data = torch.randn(shape)
    opt.state.clear()
    opt.zero_grad()
    weights = torch.randn(shape)
    (param * weights).sum().backward()
    assert torch.equal(param.grad, weights)
    expected = leaf(param)
    stock = case.stock([expected])
    expected.grad = weights.clone()
    fresh = case.ours([leaf(param)], **options)
    fresh.param_groups[0]["params"][0].grad = weights.clone()
    for each in (opt, stock, fresh):
        if (
            each is opt and case.table.makes_state_at_once
        ):  # which makes its state in the constructor
            opt.state = case.ours([param], **options).state
        each.step()
    assert bits(param) == bits(fresh.param_groups[0]["params"][0])
    if options == {}:
        assert_near(param, expected)


@richest_and_stateless
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_another_dtype_through_data(case, dtype, backend):
    param = leaf(torch.randn(4))
    opt = case.ours([param])
    train(opt, lambda: (param * 2).sum())
    param.data = param.data.to(dtype)
    if case.table.makes_state_at_once:
        opt.state = case.ours([param]).state
    else:
        opt.state.clear()
    expected = leaf(param)
    stock = case.stock([expected])
    for _ in range(2):
        opt.zero_grad()
        (param * 3).abs().sum().backward()
        assert param.grad.dtype is dtype
        expected.grad = param.grad.clone()
        opt.step()
        stock.step()
    assert_near(param, expected)


@richest_and_stateless
@with_options
def test_parameters_swapped_there_and_back(case, options, backend):
    """As modules do under torch.__future__.set_swap_module_params_on_conversion."""
    params = [leaf(torch.randn(3, 2)) for _ in range(2)]
    opt = case.ours(params, **options)
    train(opt, lambda: (params[0] * 2).sum() + params[1].sum())
    other = nn.Parameter(torch.randn(5, dtype=torch.float64))
    opt.zero_grad()
    before = bits(params[0])
    torch.utils.swap_tensors(params[0], other)
    weights = torch.randn(5, dtype=torch.float64)
    (params[0] * weights).sum().backward()
    assert torch.equal(params[0].grad, weights)
    params[0].grad = None
    torch.utils.swap_tensors(params[0], other)
    assert bits(params[0]) == before
    twins = [leaf(p) for p in params]
    train(opt, lambda: (params[0] * 2).sum())
    assert params[0].grad.shape == (3, 2) and twins[0].shape == (3, 2)
    assert bits(params[0]) != before


@every_name
@with_options
def test_state_swapped_there_and_back(name, options, backend):
    case = RICHEST_OF[name]
    param, twin = (leaf(torch.ones(6)) for _ in range(2))
    opts = [case.ours([p], **options) for p in (param, twin)]
    for opt, p in zip(opts, (param, twin), strict=True):
        train(opt, lambda p=p: p.square().sum())
    for key, value in opts[0].state[param].items():
        other = torch.full((3, 3), 7.0)
        before = bits(value)
        torch.utils.swap_tensors(value, other)
        assert value.shape == (3, 3) and bits(other) == before
        torch.utils.swap_tensors(value, other)
        assert bits(value) == before, key
        replacement = value.clone()
        torch.utils.swap_tensors(value, replacement)  # for good, with the same contents
        for opt, p in zip(opts, (param, twin), strict=True):
            train(opt, lambda p=p: p.square().sum(), 1)
    assert bits(param) == bits(twin)


@richest_and_stateless
def test_modules_converted_by_swapping(case, backend):
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        results = []
        for build in (case.ours, case.stock):
            torch.manual_seed(3)
            model = nn.Linear(4, 3)
            opt = build(model.parameters())
            x = torch.ones(2, 4)
            train(opt, lambda m=model, x=x: m(x).square().sum())
            opt.zero_grad()
            model.double().float()
            train(opt, lambda m=model, x=x: m(x).square().sum())
            results.append([*model.parameters()])
        for p, q in zip(*results, strict=True):
            assert_near(p, q)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
