"""Zeros without memory, as autograd keeps them."""

from __future__ import annotations

import random

import pytest
import torch
from cases import (
    COMPLEX_CASES,
    SCALARS,
    TABLES,
    assert_near,
    bits,
    every_name,
    leaf,
    richest_and_stateless,
    richest_by_options,
    snapshot,
)
from torch import Tensor

import fusedopt
from memory import SIZE, STORED, stored, zeros


@richest_and_stateless
def test_a_zero_gradient_of_a_backward_as_in_torch(case, backend):
    """At the first step or later, beside parameters with gradients."""
    at = random.randrange(3)
    values = [torch.randn(shape) for shape in [(64,), (3, 5), (), (0, 2), (7,)]]
    both = [[leaf(v) for v in values] for _ in range(2)]
    opts = [case.ours(both[0]), case.stock(both[1])]
    for step in range(4):
        ordinary = torch.randn(7)
        for opt, params in zip(opts, both, strict=True):
            opt.zero_grad()
            for p in params[:-1]:
                if step == at:
                    torch.sgn(p).sum().backward()
                    assert p.grad._is_zerotensor()
                else:
                    p.sum().backward()
            params[-1].grad = ordinary.clone()
            opt.step()
    for p, q in zip(*both, strict=True):
        assert_near(p, q)
        for key, value in opts[1].state[q].items():
            if isinstance(value, Tensor):
                assert_near(opts[0].state[p][key], value, key)


@richest_by_options
@stored
def test_a_zero_gradient_is_a_gradient_of_zeros(case, stored, backend):
    """Bit for bit, with every option."""
    shape = random.choice([(SIZE,), (65, 64)])
    options, dtype = STORED[stored]
    value = torch.randn(shape).to(dtype)
    params = [[leaf(value), leaf(value[:1])] for _ in range(2)]
    torch.manual_seed(5)
    opts = [case.ours(params[0], **options)]
    opts.append(case.ours(params[1], **options))
    for step in range(4):
        grads = [torch.randn(shape).to(dtype), torch.randn(value[:1].shape).to(dtype)]
        for without, (opt, (p, q)) in enumerate(zip(opts, params, strict=True)):
            p.grad, q.grad = grads[0].clone(), grads[1].clone()
            if step in (0, 2):
                p.grad = torch.zeros_like(p) if without else zeros(*shape, dtype=dtype)
            torch.manual_seed(step)  # of rounding
            opt.step()
    assert snapshot(opts[0]) == snapshot(opts[1])


@pytest.mark.parametrize("case", COMPLEX_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float16], ids=str)
def test_zero_gradients_of_other_dtypes(case, dtype, backend):
    value = (
        torch.randn(9, dtype=torch.complex64).to(dtype)
        if dtype.is_complex
        else (torch.randn(9).to(dtype))
    )
    params = [leaf(value), leaf(value)]
    opts = [case.ours(params[:1]), case.ours(params[1:])]
    for step in range(3):
        grad = torch.randn_like(value)
        for p in params:
            p.grad = grad.clone()
        if step != 1:
            params[0].grad, params[1].grad = zeros(9, dtype=dtype), torch.zeros_like(value)
        opts[0].step()
        opts[1].step()
    assert snapshot(opts[0]) == snapshot(opts[1])


@richest_and_stateless
def test_zero_gradients_in_another_layout(case, backend):
    """Expanded, transposed, and of a parameter that is no ordinary memory block."""
    params = [leaf(torch.ones(4, 6).t()), torch.ones(4, 6)[:, ::2].requires_grad_()]
    params.append(leaf(torch.ones(3, 3)))
    expected = [leaf(p) for p in params]
    opts = [case.ours(params), case.stock(expected)]
    for _ in range(3):
        params[0].grad = zeros(6, 4)
        params[1].grad = zeros(4, 3)
        params[2].grad = zeros(3, 3).t()
        for q in expected:
            q.grad = torch.zeros_like(q)
        opts[0].step()
        opts[1].step()
    for p, q in zip(params, expected, strict=True):
        assert_near(p, q)


@richest_and_stateless
@pytest.mark.parametrize("what", ["parameter", "state"])
def test_zero_gradients_where_something_else_has_changed(case, what, backend):
    """A layout or a dtype, since the step before: nothing turns out in the middle of a step."""
    params = [leaf(torch.ones(2, 3, 4, 5)) for _ in range(2)]
    opts = [case.ours(params[:1]), case.stock(params[1:])]
    for kind in ("ordinary", "zero", "zero"):
        for p, opt, make in zip(params, opts, (zeros, torch.zeros), strict=True):
            p.grad = torch.full((2, 3, 4, 5), 2.0) if kind == "ordinary" else make(2, 3, 4, 5)
            opt.step()
        p, state = params[0], opts[0].state.get(params[0], {})
        if what == "parameter":
            p.data = p.detach().clone(memory_format=torch.channels_last)
        for key in state:
            if what == "state" and key not in SCALARS:
                value = state[key].clone(memory_format=torch.channels_last)
                state[key] = value.double() if kind == "zero" else value
    assert_near(*params)


@richest_and_stateless
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_zero_gradients_beside_one_that_is_not_finite(case, dtype, backend):
    """The norm is not, and its product with zero is no number, as of zeros in memory."""
    params = [[leaf(torch.ones(8, dtype=dtype)) for _ in range(2)] for _ in range(2)]
    opts = [case.ours(p, max_grad_norm=1.0) for p in params]
    for opt, make, (p, q) in zip(opts, (zeros, torch.zeros), params, strict=True):
        p.grad, q.grad = make(8, dtype=dtype), torch.full((8,), float("nan"), dtype=dtype)
        opt.step()
    for p, q in zip(*params, strict=True):
        assert p.isnan().all() and q.isnan().all()


@every_name
def test_zero_gradients_of_differentiable_steps(name, backend):
    def through(cls, **more):
        scale = torch.ones(5, requires_grad=True)
        param = scale.clone()
        opt = cls([param], lr=0.1, differentiable=True, **more)
        for _ in range(2):
            param.grad = zeros(5)
            opt.step()
        return torch.autograd.grad(param.square().sum(), scale)[0]

    if name == "Adamax":
        pytest.skip("torch's Adamax cannot be differentiated through two steps")
    expected = through(TABLES[name].stock, foreach=False)
    assert_near(through(getattr(fusedopt, name)), expected)


@richest_and_stateless
@pytest.mark.parametrize("clipped", [None, 0.5])
def test_zero_gradients_that_the_step_unscales(case, clipped, backend):
    """And in a step that is skipped. (torch's GradScaler refuses them, and its bookkeeping is done
    here by hand.)"""
    params = [[leaf(torch.ones(8)) for _ in range(2)] for _ in range(2)]
    opts = [case.ours(p, amp_fused=True, max_grad_norm=clipped) for p in params]
    for step in range(4):
        for opt, make, (p, q) in zip(opts, (zeros, torch.zeros), params, strict=True):
            p.grad, q.grad = make(8), torch.full((8,), 3.0 + step)
            opt.found_inf, opt.grad_scale = torch.tensor(float(step == 1)), torch.tensor(8.0)
            opt.step()
    assert snapshot(opts[0]) == snapshot(opts[1])


@every_name
def test_zero_gradients_in_the_backward(name, backend):
    cls = getattr(fusedopt, name)
    params, expected = [leaf(torch.ones(6)) for _ in range(2)], leaf(torch.ones(6))
    opt = fusedopt.attach(params, cls, lr=0.1)
    stock = TABLES[name].stock([expected], lr=0.1, foreach=False)
    for _ in range(3):
        torch.sgn(params[0]).sum().backward()
        assert params[0].grad is None
        expected.grad = torch.zeros(6)
        stock.step()
    assert_near(params[0], expected)
    assert len(opt.state[params[0]]) == len(stock.state[expected])


def test_a_norm_with_zero_gradients(backend):
    for others in (0, 1, 3):
        params = [leaf(torch.ones(4)) for _ in range(1 + others)]
        torch.sgn(params[0]).sum().backward()
        for p in params[1:]:
            p.grad = torch.full((4,), 3.0)
        for foreach in (None, False):
            norm = fusedopt.clip_grad_norm_(params, 1.0, foreach=foreach)
            assert_near(norm, torch.tensor(6.0 * others**0.5 if foreach is None else others > 0.0))
            assert not params[0].grad.any()


def test_scaling_tensors_without_memory(backend):
    """That there was no overflow is a zero, too."""
    params = [leaf(torch.ones(4)) for _ in range(2)]
    opts = [fusedopt.Adam(params[:1], lr=0.1, amp_fused=True), fusedopt.Adam(params[1:], lr=0.1)]
    for _ in range(3):
        for p in params:
            p.grad = torch.ones(4)
        opts[0].found_inf, opts[0].grad_scale = zeros(1), torch.ones(1)
        opts[0].step()
        opts[1].step()
    assert bits(params[0]) == bits(params[1])


@richest_by_options
@stored
def test_parameters_and_state_without_memory_cannot_be_written(case, stored, backend):
    options, dtype = STORED[stored]
    params = [leaf(torch.randn(SIZE).to(dtype)) for _ in range(2)]
    opt = case.ours(params, **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(SIZE).to(dtype)
        opt.step()
    state = opt.state[params[1]]
    for key, value in [*state.items()]:
        state[key] = zeros(*value.shape, dtype=value.dtype)
        before = snapshot(opt)
        with pytest.raises(RuntimeError, match=rf"parameter 1 .*{key}.* is a ZeroTensor"):
            opt.step()
        assert snapshot(opt) == before
        state[key] = value
        opt.step()
    param = zeros(3).requires_grad_()
    param.grad = torch.ones(3)
    opt.add_param_group({"params": [param]})
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match="param group 1, parameter 0 .*is a ZeroTensor"):
        opt.step()
    assert snapshot(opt) == before


@richest_and_stateless
def test_a_learning_rate_without_memory_is_zero(case, backend):
    param = leaf(torch.ones(4))
    opt = case.ours([param], lr=zeros())
    param.grad = torch.ones(4)
    opt.step()
    opt.step()
    assert torch.equal(param, torch.ones(4))
