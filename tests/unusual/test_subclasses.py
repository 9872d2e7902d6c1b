"""Parameters, gradients and state of subclasses that say themselves what an operator does. Where
torch's for-loop trains them, so do we, with its bits."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import RICHEST, SCALARS, TABLES, Case, draw, every_name, leaf, richest_by_options, train
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import fusedopt

aten = torch.ops.aten


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
    for cls in (TABLES[name].stock, getattr(fusedopt, name)):
        param = nn.Parameter(KINDS["masked"](value))
        try:
            opt = cls([param], foreach=False)
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
