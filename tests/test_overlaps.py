"""Tensors that share memory: each parameter is updated in the order of the groups, as a loop over
them would, whatever overlaps with what. Nothing depends on the number of threads."""

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
from torch import Tensor

import fusedopt


def rand(*shape, dtype=torch.float64) -> Tensor:
    """Wide enough that rounding does not hide which value was read."""
    return torch.randn(*shape, dtype=dtype)


def both(build, seed: int):
    """Twice the same tensors, each with its aliases."""
    made = []
    for _ in range(2):
        torch.manual_seed(seed)
        made.append(build())
    return made


def near(ours: Tensor, theirs: Tensor, what: str, dtype) -> None:
    """Who reads another value is off by about 1. Where the variance of a centered RMSprop is nearly
    zero, a rounding of float64 becomes more than what float64 is compared with elsewhere."""
    if dtype is None and ours.dtype == torch.float64:
        ours, theirs = (t.detach().to(torch.float64, copy=True) for t in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=lambda m: f"{what}: {m}")
    else:
        assert_near(ours, theirs, what, dtype)


def compare(case, build, steps: int = 3, dtype=None, **options) -> None:
    """``build`` returns parameters, a function that sets their gradients, and the memory that all
    of this is in."""
    seed = random.randrange(2**31)
    (ours, our_grads, our_memory), (theirs, their_grads, their_memory) = both(build, seed)
    opt, stock = case.ours(groups(ours), **options), case.stock(groups(theirs))
    for at in range(steps):
        torch.manual_seed(at)
        our_grads(at)
        torch.manual_seed(at)
        their_grads(at)
        opt.step()
        stock.step()
    for i, (mine, other) in enumerate(zip(our_memory, their_memory, strict=True)):
        near(mine, other, f"memory {i}", dtype)
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        near(p, q, f"parameter {i}", dtype)
        for key, value in opt.state[p].items():
            if isinstance(value, Tensor) and key in stock.state[q]:
                near(value, stock.state[q][key], f"{key} of parameter {i}", dtype)


def groups(params):
    """The last parameters in a group of their own."""
    half = (len(params) + 1) // 2
    return [{"params": part} for part in (params[:half], params[half:]) if part]


def leaf_of(view: Tensor) -> Tensor:
    return view.detach().requires_grad_()


def fresh(*params: Tensor):
    def set_grads(at: int) -> None:
        for p in params:
            p.grad = gradient_like(p)

    return set_grads


@pytest.fixture
def size() -> int:
    """So few that one thread takes them, or so many that threads share them."""
    return random.choice([6, 20_000])


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


# Parameters and state that overlap --------------------------------------------------------------

PARAMETERS = {
    "overlapping halves": lambda b: [b[: len(b) // 2 + 1], b[len(b) // 2 - 1 :]],
    "one inside of the other": lambda b: [b, b[2:5]],
    "inside, listed first": lambda b: [b[2:5], b],
    "three in a row": lambda b: [b[:4], b[2:6], b[5:]],
    "interleaved": lambda b: [b[::2], b[1::2]],
    "interleaved and whole": lambda b: [b[::2], b, b[1::2]],
    "square and transposed": lambda b: [b[:4].view(2, 2), b[:4].view(2, 2).t()],
    "diagonal": lambda b: [b[:4].view(2, 2), b[:4].view(2, 2).diagonal()],
    "shape of its own": lambda b: [b[:6].view(2, 3), b[:6].view(3, 2)],
    "same memory three times": lambda b: [b, b.view(-1), b[:]],
    "one element": lambda b: [b[0], b[:1], b[:3]],
    "with a gap": lambda b: [b[:3], b[3:], b[2:4]],
}


@richest_and_stateless
@pytest.mark.parametrize("kind", PARAMETERS)
def test_parameters_that_overlap(case, kind, size, backend):
    def build():
        base = rand(size)
        params = [leaf_of(v) for v in PARAMETERS[kind](base)]
        return params, fresh(*params), [base]

    compare(case, build)


@richest_by_options
@pytest.mark.parametrize("way", ["of two parameters", "shifted", "the parameter of another"])
def test_state_that_overlaps(case, size, way, backend):
    made = []
    for build in (case.ours, case.stock):
        torch.manual_seed(8)
        memory = torch.rand(size + 2, dtype=torch.float64) + 0.5
        params = [leaf_of(rand(size)) for _ in range(3)]
        opt = build(params)
        for at in range(4):
            for p in params:
                p.grad = gradient_like(p)
            opt.step()
            if at != 1:
                continue
            # Of a mean that is not one the root of a negative variance would be taken.
            for key in [k for k in opt.state[params[0]] if k not in ("step", "grad_avg")]:
                memory[:size] = opt.state[params[0]][key]
                if way == "the parameter of another":
                    if "sq" in key or key in ("square_avg", "sum"):
                        continue  # squares are not negative
                    opt.state[params[0]][key] = params[1].detach()
                    break
                shift = 1 if way == "shifted" else 0
                opt.state[params[0]][key] = memory[shift : size + shift]
                opt.state[params[2]][key] = memory[:size]
                memory = torch.rand(size + 2, dtype=torch.float64) + 0.5
        made.append((opt, params))
    for p, q in zip(made[0][1], made[1][1], strict=True):
        assert_near(p, q)


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


# Bits that are not in memory --------------------------------------------------------------------


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
