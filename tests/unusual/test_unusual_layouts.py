"""Parameters, gradients and state that are not memory with strides: sparse, MKL-DNN and nested
layouts. Where torch's for-loop trains them, so do we, with its bits."""

from __future__ import annotations

import random

import pytest
import seam
import torch
from cases import COUNTING, TABLES, Case, leaf
from torch import Tensor, nn

import fusedopt


def _coo(sparse_dim=2):
    return lambda v: v.relu().to_sparse(sparse_dim)


def _repeated(v: Tensor) -> Tensor:
    """A COO tensor that has a row twice."""
    return torch.sparse_coo_tensor([[1, 3, 1]], v[:3], v.shape)


def _jagged(v: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(v, torch.tensor([0, 2, len(v)]))


LAYOUTS = {
    "coo": _coo(),
    "hybrid coo": _coo(1),
    "coo with a row twice": _repeated,
    "csr": lambda v: v.relu().to_sparse_csr(),
    "hybrid csr": lambda v: torch.stack([v, v], 2).to_sparse_csr(dense_dim=1),
    "mkldnn": lambda v: v.float().to_mkldnn(),
    "jagged": _jagged,
}
SGD_OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "weight decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True, "momentum": 0.5},
    "lr as a tensor": {"lr": torch.tensor(0.1)},
}
SGD = [Case("SGD", {"lr": 0.1, **options}) for options in SGD_OPTIONS.values()]


def dense(value: Tensor) -> Tensor:
    """The elements of a tensor of any layout."""
    value = value.detach()
    if value.is_nested:
        return torch.cat(value.unbind())
    if value.layout in (torch.sparse_csr, torch.sparse_csc):
        return torch.cat([part.double().flatten() for part in _parts(value)])
    return value if value.layout is torch.strided else value.to_dense()


def _parts(value: Tensor) -> tuple[Tensor, ...]:
    return value.crow_indices(), value.col_indices(), value.values()


def state_of(opt, param) -> dict[str, Tensor]:
    return {key: dense(value) for key, value in opt.state.get(param, {}).items()}


def assert_same(ours, stock) -> None:
    """Optimizers of one parameter each hold the same bits."""
    (p,), (q,) = (opt.param_groups[0]["params"] for opt in (ours, stock))
    assert torch.equal(dense(p), dense(q))
    assert p.layout is q.layout
    mine, theirs = state_of(ours, p), state_of(stock, q)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def scaled(value: Tensor) -> Tensor:
    return value * random.uniform(0.2, 2.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SGD, ids=[*SGD_OPTIONS])
def test_sgd_of_every_layout(layout, case, backend):
    if layout == "mkldnn" and case.options.get("maximize"):
        pytest.skip("torch does not negate them")
    value = LAYOUTS[layout](torch.randn(6, 4, dtype=torch.float64))
    params = [nn.Parameter(value.clone()), nn.Parameter(value.clone())]
    ours, stock = case.ours(params[:1]), case.stock(params[1:])
    for at in range(4):
        grad = scaled(value)
        for param in params:
            param.grad = grad.clone()
        ours.step()
        stock.step()
        assert_same(ours, stock)
        if at == 1 and layout != "jagged":  # whose shape is that of this very tensor
            resumed = case.ours(params[:1])
            resumed.load_state_dict(ours.state_dict())
            ours = resumed


def test_a_gradient_with_elements_that_the_parameter_has_not(backend):
    for layout in ("to_sparse", "to_sparse_csr"):
        value = getattr(torch.eye(5), layout)()
        params = [nn.Parameter(value.clone()), nn.Parameter(value.clone())]
        case = Case("SGD", {"lr": 0.1, "momentum": 0.9})
        ours, stock = case.ours(params[:1]), case.stock(params[1:])
        for _ in range(3):
            grad = getattr(torch.randn(5, 5).relu(), layout)()
            for param in params:
                param.grad = grad.clone()
            ours.step()
            stock.step()
            assert_same(ours, stock)


def test_nested_parameters_of_strided_layout(backend):
    parts = [torch.randn(2, 3), torch.randn(4, 3)]
    params = [nn.Parameter(torch.nested.nested_tensor(parts)) for _ in range(2)]
    case = Case("SGD", {"lr": 0.1, "momentum": 0.9})
    ours, stock = case.ours(params[:1]), case.stock(params[1:])
    for _ in range(3):
        weights = torch.randn(2, 4, 3)
        for opt, param in zip((ours, stock), params, strict=True):
            opt.zero_grad()
            (torch.nested.to_padded_tensor(param, 0.0) * weights).sum().backward()
            opt.step()
    assert_same(ours, stock)


def test_a_sparse_layer_is_trained(backend):
    """A sparse matrix beside a bias, by a real backward; also in it."""
    weight = torch.randn(5, 4).relu()
    inputs = [torch.randn(4, 3) for _ in range(4)]

    def train(build, steps=True):
        params = [nn.Parameter(weight.to_sparse()), leaf(torch.ones(5, 1))]
        opt = build(params)
        for x in inputs:
            (torch.sparse.mm(params[0], x) + params[1]).square().sum().backward()
            opt.step()
            opt.zero_grad()
        return [dense(p) for p in params]

    case = Case("SGD", {"lr": 0.01, "momentum": 0.9})
    expected = train(case.stock)
    for build in (case.ours, lambda ps: fusedopt.attach(ps, fusedopt.SGD, **case.options)):
        for value, other in zip(train(build), expected, strict=True):
            torch.testing.assert_close(value, other)


def test_an_ordinary_parameter_beside_it_is_not_slowed(native):
    """The native step takes what it can, with the same bits as without the sparse one."""
    value = torch.randn(700)
    params = [leaf(value), leaf(value), nn.Parameter(torch.eye(3).to_sparse())]
    opts = [fusedopt.SGD(params[:1], momentum=0.9), fusedopt.SGD(params[1:], momentum=0.9)]
    for _ in range(3):
        params[0].grad = params[1].grad = torch.randn(700)
        params[2].grad = torch.eye(3).to_sparse()
        for opt in opts:
            opt.step()
        assert torch.equal(params[0], params[1])
        assert seam.has_plan(opts[1])
    assert torch.equal(params[2].to_dense().diag(), (1 - 1e-3 * (1 + 1.9 + 2.71)) * torch.ones(3))


OWN_OPTIONS = {
    "l1": 0.1,
    "ema": 0.0,
    "state_dtype": torch.bfloat16,
    "master_weights": "fp32",
    "rounding": "stochastic",
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "nested"])
@pytest.mark.parametrize("option", OWN_OPTIONS)
def test_options_that_torch_lacks_do_not_go_with_them(layout, option, backend):
    value = torch.randn(6, 4)
    if layout == "nested":
        param = nn.Parameter(torch.nested.nested_tensor([value, value]))
        torch.nested.to_padded_tensor(param, 0.0).sum().backward()
    else:
        param = nn.Parameter(LAYOUTS[layout](value))
        param.grad = param.detach().clone()
    before = dense(param).clone()
    opt = fusedopt.SGD([("w", param)], momentum=0.9, **{option: OWN_OPTIONS[option]})
    with pytest.raises(RuntimeError, match=rf"'w'.*{option}.*not compatible.*param group"):
        opt.step()
    assert torch.equal(dense(param), before)
    assert not opt.state


@pytest.mark.parametrize("name", [case.name for case in COUNTING])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_torch_cannot_nothing_is_written(name, layout, backend):
    """Also not into the parameter before it."""
    param = nn.Parameter(LAYOUTS[layout](torch.randn(6, 4)))
    try:
        stock = TABLES[name].stock([param], foreach=False)
    except (RuntimeError, NotImplementedError):
        assert TABLES[name].makes_state_at_once
        with pytest.raises((RuntimeError, NotImplementedError)):
            getattr(fusedopt, name)([param])
        return
    first = leaf(torch.ones(3))
    twin = leaf(torch.ones(3))
    opt = getattr(fusedopt, name)([("first", first), ("second", param)])
    first.grad, twin.grad = torch.ones(3), torch.ones(3)
    param.grad = param.detach().clone()
    with pytest.raises((RuntimeError, NotImplementedError)):
        stock.step()
    before = dense(param).clone()
    with pytest.raises(RuntimeError, match="parameter 1 'second'.*(sparse gradients|cannot upd)"):
        opt.step()
    assert torch.equal(first, torch.ones(3))
    assert torch.equal(dense(param), before)
    assert all(int(s.get("step", 0)) == 0 for s in opt.state.values())


@pytest.mark.parametrize("layout", [k for k in LAYOUTS if k != "hybrid csr"])
def test_clipping_and_unscaling(layout, backend):
    value = LAYOUTS[layout](torch.randn(6, 4) + 3)
    grad = scaled(value)
    norm = dense(grad).norm() if layout not in ("csr",) else grad.values().norm()
    factor = float(0.5 / (norm + 1e-6))
    expected = torch.add(value, grad * factor, alpha=-1)

    param = nn.Parameter(value.clone())
    opt = fusedopt.SGD([param], lr=1.0, max_grad_norm=0.5)
    param.grad = grad.clone()
    opt.step()
    torch.testing.assert_close(opt.grad_norm, norm.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(dense(param), dense(expected))
    assert torch.equal(dense(param.grad), dense(grad))

    param = nn.Parameter(value.clone())
    opt = fusedopt.SGD([param], lr=1.0, amp_fused=True)
    param.grad = grad * 8.0
    opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    opt.step()
    assert torch.equal(dense(param), dense(value))
    opt.found_inf = torch.tensor(0.0)
    opt.step()
    torch.testing.assert_close(dense(param), dense(torch.add(value, grad, alpha=-1)))
