"""Parameters and gradients that share tensors, and memory."""

from __future__ import annotations

import pytest
import torch
from cases import Case, assert_near, assert_trained_alike, draw, leaf, richest, step_through, train
from torch import nn

import fusedopt


@richest
def test_tied_parameters(case, backend):
    runs = []
    for build in (case.ours, case.stock):
        torch.manual_seed(5)
        model = nn.ModuleDict({"inp": nn.Embedding(11, 6), "out": nn.Linear(6, 11, bias=False)})
        model["out"].weight = model["inp"].weight
        opt = build(model.parameters())
        for _ in range(3):
            opt.zero_grad()
            model["out"](model["inp"](torch.arange(11))).logsumexp(1).sum().backward()
            opt.step()
        runs.append((opt, [*model.parameters()]))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


@richest
@pytest.mark.parametrize("size", [1, 5, 2**18])
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_duplicate_parameter_steps_twice(case, size, backend):
    """With one state, as stock's loop does; the second update must see the first."""
    values, grads = draw([(3,), (size,)], 3)
    runs = []
    for build in (case.ours, case.stock):
        a, b = (leaf(v) for v in values)
        opt = build([b, a, b])
        step_through(opt, [a, b], grads)
        runs.append((opt, [a, b]))
    if case.table.counts_steps:
        assert runs[0][0].state[runs[0][1][1]]["step"].item() == 6
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


@richest
def test_two_parameters_in_one_storage(case, backend):
    """Overlapping views: each is updated in turn, in the order of the list. The sizes let threads
    that ignore this meet in the same elements."""
    half = 2**18
    runs = []
    for build in (case.ours, case.stock):
        torch.manual_seed(1)
        params = []
        for _ in range(4):
            base = torch.randn(3 * half)
            params += [base[: 2 * half].detach().requires_grad_()]
            params += [base[half:].detach().requires_grad_()]
        opt = build(params)
        step_through(opt, params, [[torch.randn(2 * half) + 3 for _ in params] for _ in range(3)])
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


@richest
def test_gradient_that_is_another_parameter(case, backend):
    """Gradients are read before anything is written, as stock does for a later parameter."""
    runs = []
    for build in (case.ours, case.stock):
        torch.manual_seed(1)
        params = [torch.randn(2**18).add(3).requires_grad_() for _ in range(4)]
        opt = build(params)
        mine, other = params[::2], params[1::2]
        for _ in range(3):
            for p, q in zip(mine, other, strict=True):
                p.grad, q.grad = q.data, torch.ones_like(q)
            opt.step()
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


@richest
def test_gradient_that_is_another_parameter_since_it_moved(case, backend):
    runs = []
    for build in (case.ours, case.stock):
        torch.manual_seed(1)
        params = [torch.randn(2**18).add(3).requires_grad_() for _ in range(4)]
        opt = build(params)
        mine, other = params[::2], params[1::2]
        for moves in (False, True, False, True):
            for p, q in zip(mine, other, strict=True):
                p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
                if moves:
                    q.data = q.data.clone()
                    p.grad = q.data
            opt.step()
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


@richest
def test_copies_of_gradients_where_other_tensors_were(case, backend):
    """A parameter without a gradient moves, and a copy of a gradient gets its old memory."""
    torch.manual_seed(1)
    mine, other = (torch.randn(6, 5).add(3).requires_grad_() for _ in range(2))
    opt = case.ours([mine, other])
    for _ in range(20):
        for at_rest in (False, True):
            mine.grad = torch.randn(5, 6).t()  # which is copied
            other.grad = None if at_rest else torch.randn(6, 5)
            if at_rest:
                other.data = other.detach().clone()
            opt.step()


@richest
def test_adjacent_views_of_one_buffer(case, backend):
    """A flat buffer cut into parameters, as FSDP and DDP lay them out."""
    values, grads = draw([(7,), (33,), (1,), (64,)], 3)
    base = torch.cat(values)
    parts = [v.detach().requires_grad_() for v in base.split([7, 33, 1, 64])]
    flat_grads = [torch.cat(now) for now in grads]
    opt = case.ours(parts)
    for flat in flat_grads:
        for p, g in zip(parts, flat.split([7, 33, 1, 64]), strict=True):
            p.grad = g
        opt.step()
    exact, _ = train(case.exact, values, grads, torch.float64)
    for p, q in zip(parts, exact, strict=True):
        assert_near(p, q)


@richest
@pytest.mark.parametrize("size", [5, 50_000])
def test_gradient_that_is_the_parameter(case, size, backend):
    """It is read before it is written."""
    runs = []
    for build, read in ((case.ours, lambda p: p.data), (case.stock, lambda p: p.data.clone())):
        torch.manual_seed(1)
        p = (torch.randn(size) + 3).requires_grad_()
        opt = build([p])
        for _ in range(2):
            p.grad = read(p)
            opt.step()
        runs.append((opt, [p]))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


@richest
def test_one_gradient_for_two_parameters(case, backend):
    grad = torch.randn(9) + 3
    params = [leaf(torch.zeros(9)), leaf(torch.ones(9))]
    params[0].grad = params[1].grad = grad
    case.ours(params).step()
    exact = [leaf(torch.zeros(9, dtype=torch.float64)), leaf(torch.ones(9, dtype=torch.float64))]
    for q in exact:
        q.grad = grad.double()
    case.exact(exact).step()
    for p, q in zip(params, exact, strict=True):
        assert_near(p, q)


def test_parameters_and_buffers_of_subclasses(backend):
    """nn.Parameter, a plain leaf, and a Tensor subclass in one group."""

    class Tagged(torch.Tensor):
        pass

    values, grads = draw([(5,)] * 3, 3)
    params = [nn.Parameter(values[0].clone()), leaf(values[1])]
    params.append(values[2].clone().as_subclass(Tagged).requires_grad_())
    opt = fusedopt.Adam(params, lr=0.1)
    step_through(opt, params, grads)
    exact, _ = train(Case("Adam", {"lr": 0.1}).exact, values, grads, torch.float64)
    for p, q in zip(params, exact, strict=True):
        assert_near(p.detach().as_subclass(torch.Tensor), q)


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_many_parameters(count, backend):
    case = Case("AdamW", {"lr": 0.1})
    values, grads = draw([(3,)] * (count + 1), 2)
    params, opt = train(case.ours, values, grads)
    exact, oracle = train(case.exact, values, grads, torch.float64)
    assert_trained_alike(opt, params, oracle, exact, torch.float32)
