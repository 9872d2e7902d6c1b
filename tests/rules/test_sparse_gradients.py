"""Every rule that takes sparse gradients against torch's."""

from __future__ import annotations

import pytest
import torch
from cases import (
    RICHEST_OF,
    Case,
    assert_near,
    assert_trained_alike,
    every_sparse,
    leaf,
    same_bits,
    states,
    train,
)

import fusedopt


def _sparse(rows: int, columns: int, indices: list[int], dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(len(indices), columns, dtype=dtype)
    return torch.sparse_coo_tensor([indices], values, (rows, columns))


@pytest.mark.parametrize(
    "case",
    [
        Case("SGD", {"lr": 0.1}),
        Case("SGD", {"lr": 0.1, "momentum": 0.9, "maximize": True}),
        Case("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
        Case("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        Case("SGD", {"lr": torch.tensor(0.1), "momentum": 0.9}),
        Case("Adagrad", {"lr": 0.1}),
        Case("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "maximize": True}),
        Case("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.3, "eps": 0.1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sparse_gradients(case, dtype, backend):
    """Next to dense ones; with repeated, missing and new rows."""
    rows = [[0, 3, 3], [], [5, 1], [0, 0, 0, 2], list(range(6))]
    values = [torch.randn(6, 4, dtype=dtype), torch.randn(9, dtype=dtype)]
    grads = [[_sparse(6, 4, r, dtype), torch.randn(9, dtype=dtype)] for r in rows]
    runs = []
    for build in (case.ours, case.stock):
        params, opt = train(build, values, grads)
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)
    for state, expected in zip(states(*runs[0]), states(*runs[1]), strict=True):
        assert state.keys() == expected.keys()
        for key in state:
            assert state[key].layout == expected[key].layout
            assert_near(state[key].to_dense(), expected[key].to_dense(), key, torch.float32)


@every_sparse
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sparse_gradients_of_fewer_bits(name, dtype, backend):
    """Their squares do not fit into float16; the update has the accuracy of the parameter."""
    case = Case(name, {"lr": 0.1})
    values, grad = torch.randn(6, 4, dtype=dtype), _sparse(6, 4, [1, 4], torch.float16) * 1000
    param, exact = leaf(values), leaf(values, torch.float64)
    ours, oracle = case.ours([param]), case.exact([exact])
    for p, opt in ((param, ours), (exact, oracle)):
        if hasattr(p, "grad_dtype"):  # torch 2.10 has it not, and takes any dtype
            p.grad_dtype = None
        p.grad = grad if opt is ours else grad.double()
        opt.step()
    assert_trained_alike(ours, [param], oracle, [exact], dtype)


def test_sparse_gradients_with_state_of_fewer_bits(backend):
    """The sum overflows float16 when it is stored, not in the update."""
    param = leaf(torch.zeros(6, 4))
    opt = fusedopt.Adagrad([param], lr=0.1)
    opt.state[param]["sum"] = torch.zeros(6, 4, dtype=torch.float16)
    param.grad = _sparse(6, 4, [1, 4], torch.float32) * 1e4
    opt.step()
    moved = param.detach()[[1, 4]].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1))
    assert opt.state[param]["sum"][[1, 4]].isinf().any()


@pytest.mark.parametrize(
    "case",
    [
        Case("SGD", {"lr": 0.1}),
        Case("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        Case("Adagrad", {"lr": 0.1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (1, 2, 2, 3)], ids=str)
def test_sparse_gradients_of_a_view(case, shape, backend):
    """Only the view is written. torch's own ``add_`` writes to memory beside it, for gradients that
    are sparse in all dimensions."""
    values, grad = torch.randn(shape), torch.randn(shape) + 3
    memory = torch.full((3 * values.numel(),), 7.0)
    middle = memory[values.numel() : 2 * values.numel()]
    param = middle.view(shape).copy_(values).requires_grad_()
    exact = leaf(values, torch.float64)
    ours, oracle = case.ours([param]), case.exact([exact])
    for scale in (1, 2):
        param.grad, exact.grad = (scale * grad).to_sparse(), (scale * grad).double()
        ours.step()
        oracle.step()
    assert_near(param, exact)
    around = torch.cat([memory[: values.numel()], memory[2 * values.numel() :]])
    assert (around == 7).all()


@pytest.mark.parametrize("case", [RICHEST_OF["SGD"], RICHEST_OF["Adagrad"]], ids=str)
def test_sparse_and_dense_gradients_take_turns(case, backend):
    """An embedding whose gradient is dense, then sparse, as stock's SGD and Adagrad allow."""
    case = Case(case.name, {**case.options, "weight_decay": 0})
    case.options.pop("nesterov", None)
    runs = []
    grads = [[torch.randn(6, 4)], [_sparse(6, 4, [1, 1, 4], torch.float32)], [torch.randn(6, 4)]]
    values = [torch.randn(6, 4)]
    for build in (case.ours, case.stock):
        params, opt = train(build, values, grads)
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


def test_nothing_is_left_of_a_sparse_embedding_step(backend):
    torch.manual_seed(0)
    runs = []
    for cls in (fusedopt.Adagrad, torch.optim.Adagrad):
        torch.manual_seed(0)
        table = torch.nn.Embedding(10, 3, sparse=True)
        opt = cls(table.parameters(), lr=0.1)
        for ids in ([1, 2, 2], [9, 1]):
            opt.zero_grad()
            table(torch.tensor(ids)).square().sum().backward()
            opt.step()
        runs.append(table.weight)
    assert_near(*runs)
    assert same_bits(runs[0].detach()[3:9], runs[1].detach()[3:9])
