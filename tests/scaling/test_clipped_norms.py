"""The norm that a clipping step measures."""

from __future__ import annotations

import math

import pytest
import torch
from cases import assert_near, bits, draw, leaf, richest, step_through, train

import fusedopt
from scaling import INF, NAN, assert_norm


@richest
def test_the_norm_that_was_read_stays(case, backend):
    params, opt = train(case.ours, *draw([(5,)], 1), max_grad_norm=1.0)
    seen = opt.grad_norm
    before = bits(seen)
    params[0].grad.mul_(3)
    opt.step()
    assert bits(seen) == before and bits(opt.grad_norm) != before


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
