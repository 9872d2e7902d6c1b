"""Gradients inside of parameters, complex beside real; and every run is the same."""

from __future__ import annotations

import random

import pytest
import torch
from cases import (
    SCALARS,
    Case,
    assert_near,
    bits,
    every_name,
    every_sparse,
    gradient_like,
    richest_and_stateless,
    richest_by_options,
)

from overlaps import compare, fresh, leaf_of, rand

# Complex beside real ----------------------------------------------------------------------------

COMPLEX = {
    "complex, then its real view": lambda z: [z, torch.view_as_real(z)],
    "real view, then complex": lambda z: [torch.view_as_real(z), z],
    "complex and real part": lambda z: [z, z.real],
    "imaginary part and complex": lambda z: [z.imag, z],
    "both parts": lambda z: [z.real, z.imag],
    "both parts and the real view": lambda z: [z.real, z.imag, torch.view_as_real(z)],
    "half of the complex": lambda z: [z[: len(z) // 2], torch.view_as_real(z)],
    "negative view": lambda z: [z.conj().imag, z.imag],
}


@richest_and_stateless
@pytest.mark.parametrize("kind", COMPLEX)
def test_complex_beside_real_views_of_it(case, kind, size, backend):
    def build():
        z = rand(size, dtype=torch.complex128)
        params = [leaf_of(v) for v in COMPLEX[kind](z)]
        return params, fresh(*params), [z]

    compare(case, build)


# Gradients inside of parameters -----------------------------------------------------------------

INSIDE = {
    "exact": lambda q, n: q[:n],
    "a part": lambda q, n: q[3 : n + 3],
    "its end": lambda q, n: q[-n:],
    "every other element": lambda q, n: q[: 2 * n : 2],
    "backwards in two dimensions": lambda q, n: (
        q[: n // 2 * 2].view(2, n // 2).t().reshape(-1)[:n] if n % 2 else q[:n].view(2, n // 2).t()
    ),
    "expanded": lambda q, n: q[5:6].expand(n),
}


@richest_and_stateless
@pytest.mark.parametrize("kind", INSIDE)
@pytest.mark.parametrize("later", [False, True], ids=["listed before", "listed after"])
def test_a_gradient_inside_of_a_parameter(case, kind, later, size, backend, step_threads):
    def build():
        owner = leaf_of(rand(3 * size))
        grad = INSIDE[kind](owner.detach(), size)
        param, third = leaf_of(rand(grad.shape)), leaf_of(rand(9))

        def set_grads(at):
            owner.grad, third.grad = gradient_like(owner), gradient_like(third)
            param.grad = grad

        order = [owner, third, param] if later else [param, third, owner]
        return order, set_grads, [owner.detach()]

    step_threads(random.choice([1, 2, 5]))
    compare(case, build)


@richest_and_stateless
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradients_inside_of_parameters_of_every_dtype(case, later, dtype, size, backend):
    """One optimizer takes the steps that one for each parameter takes in the same order."""
    results = []
    for together in (True, False):
        torch.manual_seed(3)
        owner = leaf_of(torch.randn(2 * size).to(dtype))
        param, third = leaf_of(torch.randn(size).to(dtype)), leaf_of(torch.randn(5))
        order = [owner, third, param] if later else [param, third, owner]
        opts = [case.ours(part) for part in ([order] if together else [[p] for p in order])]
        for _ in range(3):
            owner.grad, third.grad = torch.randn(2 * size).to(dtype), torch.randn(5)
            param.grad = owner.detach()[1 : size + 1]
            for opt in opts:
                opt.step()
        results.append(order)
    for p, q in zip(*results, strict=True):
        assert_near(p, q)


@richest_and_stateless
def test_conjugates_beside_what_they_are_of(case, backend):
    """One optimizer takes the steps of two. (torch's loop of most classes refuses conjugates.)"""
    results = []
    for kind in ("conjugates", "copies"):
        torch.manual_seed(3)
        z = torch.randn(6, dtype=torch.complex64)
        params = [leaf_of(z.conj()), leaf_of(torch.randn(3))]
        assert params[0].is_conj()
        if kind == "copies":
            params[0] = leaf_of(z.conj().resolve_conj())
        opt = case.ours(params)
        for _ in range(3):
            params[0].grad = torch.randn(6, dtype=torch.complex64).conj()
            params[1].grad = torch.randn(3)
            opt.step()
        results.append([bits(p) for p in params])
        if kind == "conjugates":
            assert torch.equal(params[0].detach(), z.conj())
    assert results[0] == results[1]


@every_sparse
@pytest.mark.parametrize("later", [False, True])
def test_sparse_gradients_with_values_inside_of_a_parameter(name, later, size, backend):
    case = Case(name, {"lr": 0.1})

    def build():
        owner, param = leaf_of(rand(size, 2)), leaf_of(rand(size, 2))
        values = owner.detach()[1:4]

        def set_grads(at):
            owner.grad = gradient_like(owner)
            param.grad = torch.sparse_coo_tensor(
                torch.tensor([[0, 2, 5]]), values, param.shape, is_coalesced=True
            )

        return [owner, param] if later else [param, owner], set_grads, []

    compare(case, build)


@richest_and_stateless
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]], ids=str)
def test_gradients_that_are_the_next_parameter(case, order, size, backend):
    """A chain, and a ring."""
    for ring in (False, True):

        def build(ring=ring):
            params = [leaf_of(rand(size)) for _ in range(3)]

            def set_grads(at):
                params[0].grad, params[1].grad = params[1].detach(), params[2].detach()
                params[2].grad = params[0].detach() if ring else gradient_like(params[2])

            return [params[i] for i in order], set_grads, []

        compare(case, build)


@richest_by_options
@pytest.mark.parametrize("later", [False, True])
def test_a_gradient_that_is_the_state_of_another(case, later, size, backend):
    made = []
    for build in (case.ours, case.stock):
        torch.manual_seed(4)
        params = [leaf_of(rand(size)) for _ in range(2)]
        opt = build(params[::-1] if later else params)
        for _ in range(2):
            for p in params:
                p.grad = gradient_like(p)
            opt.step()
        made.append((opt, params))
    keys = [k for k in made[0][0].state[made[0][1][0]] if k not in SCALARS]
    for key in keys:
        for opt, params in made:
            params[0].grad = torch.ones(size, dtype=torch.float64)
            params[1].grad = opt.state[params[0]][key]
            opt.step()
            opt.step()
        for p, q in zip(made[0][1], made[1][1], strict=True):
            assert_near(p, q, key)


@richest_by_options
def test_a_gradient_that_is_its_own_state(case, backend):
    made = []
    for build in (case.ours, case.stock):
        torch.manual_seed(4)
        params = [leaf_of(rand(9)) for _ in range(2)]
        opt = build(params)
        for _ in range(2):
            for p in params:
                p.grad = gradient_like(p)
            opt.step()
        made.append((opt, params))
    for key in [k for k in made[0][0].state[made[0][1][0]] if k not in ("step", "max_exp_avg_sq")]:
        for opt, params in made:
            params[0].grad = opt.state[params[0]][key].clone()
            params[1].grad = opt.state[params[0]][key]
            opt.step()
        for p, q in zip(made[0][1], made[1][1], strict=True):
            assert_near(p, q, key)


# Every run is the same --------------------------------------------------------------------------


@richest_and_stateless
def test_neither_threads_nor_runs_matter(case, backend, step_threads):
    results = []
    kind = random.choice(["a part", "expanded", "every other element"])
    for threads in (1, 2, 5, 5):
        step_threads(threads)
        torch.manual_seed(11)
        size = 20_000
        owner, others = (
            leaf_of(torch.randn(3 * size)),
            [leaf_of(torch.randn(40)) for _ in range(40)],
        )
        grad = INSIDE[kind](owner.detach(), size)
        param = leaf_of(torch.randn(grad.shape))
        opt = case.ours([*others[:20], owner, *others[20:], param])
        for _ in range(3):
            for p in (owner, *others):
                p.grad = torch.randn_like(p)
            param.grad = grad
            opt.step()
        results.append((bits(owner), bits(param), [bits(p) for p in others]))
    assert all(result == results[0] for result in results)


@every_name
@pytest.mark.parametrize("options", [{"ema": 0.9}, {"state_dtype": "8bit"}, {"l1": 0.01}], ids=str)
def test_with_options_that_torch_lacks(name, options, backend):
    """One optimizer takes the steps that one for each parameter takes in the same order."""
    size, results = 4200, []
    for together in (True, False):
        torch.manual_seed(2)
        base = torch.randn(2 * size)
        params = [leaf_of(base[:size]), leaf_of(base[100 : size + 100]), leaf_of(torch.randn(size))]
        parts = [params] if together else [[p] for p in params]
        opts = [Case(name, {"lr": 0.01}).ours(part, **options) for part in parts]
        for _ in range(3):
            params[0].grad, params[1].grad = gradient_like(params[0]), gradient_like(params[1])
            params[2].grad = base[:size]
            for opt in opts:
                opt.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert_near(p, q)
