"""Conjugate and negative views: bits that are not in memory."""

from __future__ import annotations

import pytest
import torch
from cases import assert_near, bits, gradient_like, richest_and_stateless, richest_by_options

import fusedopt
from overlaps import compare, leaf_of


@richest_and_stateless
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_negative_views_as_gradients(case, dtype, backend):
    shapes = [(), (1,), (2,), (7,), (3, 5), (1, 1), (0,), (4100,)]
    values = [torch.randn(shape).to(dtype) for shape in shapes]
    both = [[leaf_of(v.clone()) for v in values] for _ in range(2)]
    opts = [case.ours(params) for params in both]
    for _ in range(3):
        for p, q in zip(*both, strict=True):
            p.grad = torch._neg_view(gradient_like(p))
            q.grad = p.grad.resolve_neg().clone()
            assert p.grad.is_neg() and p.grad.is_contiguous() and not q.grad.is_neg()
        for opt in opts:
            opt.step()
    assert [*map(bits, both[0])] == [*map(bits, both[1])]


@richest_and_stateless
@pytest.mark.parametrize("size", [1, 2, 9])
def test_imaginary_parts_of_conjugates_as_gradients(case, size, backend):
    def build():
        param, other = leaf_of(torch.randn(size)), leaf_of(torch.randn(size).double())

        def set_grads(at):
            param.grad = torch.complex(torch.zeros(size), gradient_like(param)).conj().imag
            other.grad = torch.complex(torch.zeros(size).double(), gradient_like(other)).conj().imag
            assert param.grad.is_neg()

        return [param, other], set_grads, []

    compare(case, build)


@richest_and_stateless
def test_a_negative_view_that_comes_and_goes(case, backend):
    """Not only at the first step, and at the same place in memory."""
    params = [leaf_of(torch.randn(5)) for _ in range(2)]
    twins = [leaf_of(p.clone()) for p in params]
    opts = [case.ours(params), case.stock(twins)]
    grad = gradient_like(params[0])
    for at in range(5):
        params[0].grad, params[1].grad = grad, gradient_like(params[1])
        if at in (1, 2, 4):
            params[0].grad = torch._neg_view(grad)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.resolve_neg().clone()
        for opt in opts:
            opt.step()
    for p, q in zip(params, twins, strict=True):
        assert_near(p, q)


def test_norms_of_negative_views(backend):
    params = [leaf_of(torch.randn(4)) for _ in range(2)]
    for p in params:
        p.grad = torch._neg_view(torch.full((4,), 3.0))
    assert_near(fusedopt.clip_grad_norm_(params, 1.0), torch.tensor(72.0**0.5))
    for p in params:
        assert torch.allclose(p.grad, torch.full((4,), -3.0 / 72.0**0.5))
    opt = fusedopt.SGD(params, lr=1.0, max_grad_norm=0.5)
    before = [p.detach().clone() for p in params]
    opt.step()
    for p, b in zip(params, before, strict=True):
        assert torch.allclose(p - b, torch.full((4,), 0.5 / 8**0.5), atol=1e-4)


@richest_by_options
def test_state_and_parameters_that_are_negative_views(case, backend):
    made = []
    for build in (case.ours, case.stock):
        torch.manual_seed(6)
        params = [leaf_of(torch._neg_view(torch.randn(5))), leaf_of(torch.randn(5))]
        opt = build(params)
        for at in range(4):
            for p in params:
                p.grad = gradient_like(p.detach().resolve_neg())
            opt.step()
            if at == 1:
                for key, value in opt.state[params[1]].items():
                    opt.state[params[1]][key] = torch._neg_view(-value)
        made.append(params)
    for p, q in zip(*made, strict=True):
        assert_near(p.detach().resolve_neg(), q.detach().resolve_neg())
