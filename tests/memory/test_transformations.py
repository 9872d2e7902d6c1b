"""Tensors inside of function transformations have no memory of their own."""

from __future__ import annotations

import contextlib

import pytest
import seam
import torch
from cases import SCALARS, assert_near, leaf, richest_by_options, snapshot


@richest_by_options
@pytest.mark.parametrize("role", ["grad", "step", "state"])
def test_one_functional_tensor_among_others(case, role, backend):
    """torch lets it not be written into others: where its loop raises, nothing is written."""
    params = [leaf(torch.randn(4)), leaf(torch.randn(3))]
    opt = case.ours(params)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    opt.step()
    before, state = snapshot(opt), opt.state[params[1]]
    kept, grad = dict(state), params[1].grad

    def inside(zeros):
        if role == "grad":
            params[1].grad = grad + zeros
        for key in kept if role != "grad" else ():
            if (key in SCALARS) == (role == "step"):
                state[key] = kept[key] + zeros.sum().to(kept[key].dtype)
        with contextlib.suppress(RuntimeError):
            opt.step()
            assert role == "step"  # which is read
        return zeros + 1

    torch.func.functionalize(inside)(torch.zeros(3))
    state.update(kept)
    params[1].grad = grad
    if role != "step":
        assert snapshot(opt) == before
    opt.step()


@richest_by_options
@pytest.mark.parametrize("name", ["found_inf", "grad_scale"])
def test_functional_scaling_tensors(case, name, backend):
    params = [leaf(torch.ones(4)) for _ in range(2)]
    opts = [case.ours(params[:1], amp_fused=True), case.stock(params[1:])]

    for at in range(4):
        grad = torch.randn(4)
        grads = [4.0 * grad, grad]
        scaling = {"found_inf": torch.tensor(0.0), "grad_scale": torch.tensor(4.0)}
        for p, g in zip(params, grads, strict=True):
            p.grad = g

        def run(zeros, scaling=scaling):
            scaling[name] = scaling[name] + zeros.sum()
            opts[0].found_inf, opts[0].grad_scale = scaling["found_inf"], scaling["grad_scale"]
            opts[0].step()
            return zeros + 1

        (torch.func.functionalize(run) if at in (1, 2) else run)(torch.zeros(2))
        opts[1].step()
    assert_near(*params)


@richest_by_options
@pytest.mark.parametrize("transform", [torch.func.functionalize, torch.func.vmap])
def test_a_norm_measured_inside_of_a_transformation_leaves_nothing_behind(case, transform, backend):
    params = [leaf(torch.ones(4)) for _ in range(2)]
    opts = [case.ours(params[:1]), case.stock(params[1:])]
    for at in range(4):
        for opt, p in zip(opts, params, strict=True):
            p.grad = torch.full((4,), 2.0)
            if opt is opts[0]:
                opt.max_grad_norm = 1.0
            else:
                torch.nn.utils.clip_grad_norm_([p], 1.0)

            def run(x, opt=opt):
                opt.step()
                return x * 2

            (transform(run) if at == 1 else run)(torch.ones(4))
        if at == 0:
            seam.forget_norm(opts[0])
    assert_near(*params)
    assert_near(opts[0].grad_norm, torch.tensor(4.0))
