"""Parameters, gradients and state that are not memory with strides: sparse, MKL-DNN and nested
layouts, and subclasses that say themselves what an operator does. Where torch's for-loop trains
them, so do we, with its bits."""

from __future__ import annotations

import copy
import random

import pytest
import seam
import torch
from cases import (
    COUNTING,
    RICHEST,
    SCALARS,
    TABLES,
    Case,
    draw,
    every_name,
    leaf,
    richest_by_options,
    train,
)
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import fusedopt

aten = torch.ops.aten


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
    torch.testing.assert_close(opt.grad_norm, norm.double())
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


# Subclasses -----------------------------------------------------------------------------------


class Quantized(torch.Tensor):
    """Weights in 8 bits with a scale for each row, which knows the operators of torch's for-loops
    and no others."""

    KNOWN = (
        *(aten.detach.default, aten.clone.default, aten.zeros_like.default, aten.full_like.default),
        *(
            aten.add.Tensor,
            aten.neg.default,
            aten.sqrt.default,
            aten.copy_.default,
            aten.mul.Tensor,
        ),
        *(aten.add_.Tensor, aten.mul_.Tensor, aten.mul_.Scalar, aten.lerp_.Scalar),
        *(aten.addcmul_.default, aten.addcdiv_.default),
    )
    fails = None  # the operator that raises

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, value):
        self = cls(torch.empty_like(value, dtype=torch.int8), value.new_empty(len(value), 1))
        self.set(value)
        return self

    def set(self, value):
        self.scale.copy_(value.abs().amax(1, keepdim=True) / 127)
        self.codes.copy_((value / self.scale).round())

    def value(self):
        return self.codes * self.scale

    def __repr__(self):
        return f"Quantized({self.value()})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func not in cls.KNOWN or func is cls.fails:
            raise NotImplementedError(f"Quantized has no {func}")
        if func in (aten.detach.default, aten.clone.default):
            tensors = args[0].codes, args[0].scale
            return cls(*(tensors if func is aten.detach.default else [t.clone() for t in tensors]))
        values = [a.value() if isinstance(a, cls) else a for a in args]
        out = func(*values, **(kwargs or {}))
        if func.__name__.split(".")[0].endswith("_") and isinstance(args[0], cls):
            args[0].set(out)
            return args[0]
        return out


class Cautious(torch.Tensor):
    """Knows the functions of torch's for-loops and no others."""

    KNOWN = (
        *(
            "__get__",
            "__set__",
            "clone",
            "detach",
            "zeros_like",
            "full_like",
            "add",
            "add_",
            "mul_",
        ),
        *("mul", "neg", "lerp_", "addcmul_", "addcdiv_", "sqrt", "__truediv__", "maximum", "div"),
        *("requires_grad_", "is_complex", "as_subclass", "copy_", "addcmul", "size", "dim", "to"),
        *("is_floating_point", "is_inference", "stride", "__hash__", "_is_view", "square"),
        *("equal", "sqrt_", "__rsub__", "__neg__", "sub", "addcdiv", "numel"),
    )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ not in cls.KNOWN:
            raise NotImplementedError(f"Cautious has no {func.__name__}")
        return super().__torch_function__(func, types, args, kwargs or {})


def plain(value: Tensor) -> Tensor:
    with torch.no_grad():
        value = value.detach()
        if isinstance(value, TwoTensor):
            return torch.stack([value.a, value.b])
        if isinstance(value, Quantized):
            return value.value()
        return value.as_subclass(torch.Tensor)


KINDS = {
    "quantized": Quantized.of,
    "two tensors": lambda v: TwoTensor(v.clone(), v * 2),
    "cautious": lambda v: v.clone().as_subclass(Cautious),
    "masked": lambda v: torch.masked.masked_tensor(v.clone(), v > 0),
}
SUBCLASSES = [k for k in KINDS if k != "masked"]
GRADS = {
    "quantized": lambda v: v.clone(),
    "two tensors": KINDS["two tensors"],
    "cautious": lambda v: v.clone(),
}


def _train(build, make, make_grad, value, grads):
    params = [nn.Parameter(make(value)), leaf(value)]
    opt = build(params)
    for grad in grads:
        params[0].grad, params[1].grad = make_grad(grad), grad.clone()
        opt.step()
    return params, opt


@pytest.mark.parametrize("kind", SUBCLASSES)
@pytest.mark.parametrize("case", [*RICHEST, Case("SGD", {}), Case("Adam", {})], ids=str)
def test_parameters_of_a_subclass(kind, case, backend):
    case = Case(case.name, {k: v for k, v in case.options.items() if k != "amsgrad"})
    (value,), grads = draw([(5, 4)], 4)
    grads = [grad for (grad,) in grads]
    (p, q), ours = _train(case.ours, KINDS[kind], GRADS[kind], value, grads)
    (r, s), stock = _train(case.stock, KINDS[kind], GRADS[kind], value, grads)
    assert type(p) is type(r)
    assert torch.equal(plain(p), plain(r))
    assert ours.state[p].keys() == stock.state[r].keys()
    for key, moment in stock.state[r].items():
        assert type(ours.state[p][key]) is type(moment)
        assert torch.equal(plain(ours.state[p][key]), plain(moment))
    torch.testing.assert_close(q, s)
    assert type(ours.state_dict()["state"]) is dict


@richest_by_options
@pytest.mark.parametrize("what", ["grad", "state", "both"])
def test_gradients_and_state_of_a_subclass(case, what, backend):
    """On an ordinary parameter: gradients in 8 bits, or the state of an optimizer in 8 bits."""
    case = Case(case.name, {k: v for k, v in case.options.items() if k != "amsgrad"})
    (value,), grads = draw([(5, 4)], 4)
    (q,), stock = train(case.stock, [value], grads[:1])
    p = leaf(q)
    ours = case.ours([p])
    saved = copy.deepcopy(stock.state_dict())
    for state in (stock.state[q], saved["state"][0]) if what != "grad" else ():
        for key in {"exp_avg", "momentum_buffer", "sum"} & state.keys():
            state[key] = Quantized.of(state[key])
    ours.load_state_dict(saved)
    for (grad,) in grads[1:]:
        for param, opt in ((p, ours), (q, stock)):
            param.grad = Quantized.of(grad) if what != "state" else grad.clone()
            opt.step()
        assert torch.equal(p, q)
    for key, moment in stock.state[q].items():
        assert type(ours.state[p][key]) is type(moment)
        assert torch.equal(plain(ours.state[p][key]), plain(moment))


@richest_by_options
@pytest.mark.parametrize("option", ["l1", "ema", "state_dtype"])
def test_options_that_torch_lacks_on_a_subclass(case, option, backend):
    """As each of the two tensors alone."""
    options = {option: {"l1": 0.1, "ema": 0.9, "state_dtype": torch.bfloat16}[option]}
    (value,), grads = draw([(5, 4)], 3)
    grads = [grad for (grad,) in grads]
    build = lambda params: case.ours(params, **options)  # noqa: E731
    (p, _), opt = _train(build, KINDS["two tensors"], KINDS["two tensors"], value, grads)
    for at, factor in enumerate((1, 2)):
        alone = leaf(value * factor)
        other = build([alone])
        for grad in grads:
            alone.grad = grad * factor
            other.step()
        torch.testing.assert_close(plain(p)[at], alone)
        for key, moment in other.state[alone].items():
            if key not in SCALARS:
                assert opt.state[p][key].dtype == moment.dtype
                torch.testing.assert_close(plain(opt.state[p][key])[at], moment)


@pytest.mark.parametrize("options", [{"state_dtype": "8bit"}, {"l1": 0.1}])
def test_what_a_subclass_cannot_do_is_said(options, backend):
    param = nn.Parameter(Quantized.of(torch.randn(80, 64)))
    before = plain(param).clone()
    opt = fusedopt.Adam([("w", param)], **options)
    param.grad = torch.randn(80, 64)
    with pytest.raises(RuntimeError, match="'w'.*type Quantized"):
        opt.step()
    assert torch.equal(plain(param), before)
    assert not opt.state


@richest_by_options
@pytest.mark.parametrize("steps", [0, 2])
def test_an_error_in_the_middle_changes_nothing(case, steps, backend, monkeypatch):
    """The last operator of the loop fails in the second of three parameters."""
    case = Case(case.name, {k: v for k, v in case.options.items() if k != "amsgrad"})

    class Failing(Quantized):
        pass

    values, grads = draw([(5, 4)] * 3, 4)
    params = [
        nn.Parameter(kind.of(v))
        for kind, v in zip((Quantized, Failing, Quantized), values, strict=True)
    ]
    params.append(leaf(values[0]))
    opt = case.ours(params)

    def step(at):
        for param, grad in zip(params, (*grads[at], grads[at][0]), strict=True):
            param.grad = grad.clone()
        opt.step()

    def everything():
        held = [plain(p).clone() for p in params]
        return held, [
            {k: plain(v).clone() for k, v in opt.state.get(p, {}).items()} for p in params
        ]

    for at in range(steps):
        step(at)
    before = everything()
    adds = not case.table.counts_steps or "momentum" in case.options
    last = aten.add_.Tensor if adds else aten.addcdiv_.default
    with monkeypatch.context() as patch:
        patch.setattr(Failing, "fails", last)
        with pytest.raises(RuntimeError, match=r"parameter 1.*type Failing.*has no aten") as info:
            step(2)
    assert isinstance(info.value.__cause__, NotImplementedError)
    after = everything()
    assert all(torch.equal(a, b) for a, b in zip(after[0], before[0], strict=True))
    for a, b in zip(after[1], before[1], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    step(3)


@every_name
def test_masked_parameters_as_in_torch(name, backend):
    """torch's loops do not know how to update them: an error, and nothing has changed."""
    value = torch.randn(5)
    results = []
    for module in (torch.optim, fusedopt):
        param = nn.Parameter(KINDS["masked"](value))
        try:
            opt = getattr(module, name)([param], foreach=False)
            param.grad = KINDS["masked"](value)
            opt.step()
            results.append(None)
        except (RuntimeError, TypeError, ValueError) as error:
            results.append(str(error))
        assert torch.equal(param.get_data(), value) is (results[-1] is not None)
    assert (results[0] is None) is (results[1] is None)


def test_clipping_of_subclasses(backend):
    value, grad = torch.randn(5, 4), torch.randn(5, 4) + 3
    param, other = nn.Parameter(KINDS["two tensors"](value)), leaf(value)
    opt = fusedopt.SGD([param, other], lr=1.0, max_grad_norm=0.5)
    param.grad, other.grad = KINDS["two tensors"](grad), grad.clone()
    opt.step()
    clipped = grad * (0.5 / (2**0.5 * grad.norm() + 1e-6))
    torch.testing.assert_close(plain(param)[0], value - clipped)
    torch.testing.assert_close(other, value - clipped)
    param.grad = Quantized.of(grad)
    with pytest.raises(TypeError, match="of type Quantized cannot be measured"):
        opt.step()
