"""step() validates before it writes: a bad input raises, says where, and changes nothing."""

from __future__ import annotations

import re

import pytest
import torch
from cases import (
    RICHEST,
    SCALARS,
    SPARSE,
    Case,
    assert_trained_alike,
    bits,
    counting,
    draw,
    leaf,
    richest,
    snapshot,
    step_through,
    those_with,
)

SHAPES = [(6,), (3, 4), (5, 2), (4, 3)]


class Run:
    """An optimizer over two groups of two named parameters, and stock's with the same past.

    The third parameter is the bad one: others come before it and after it.
    """

    def __init__(self, case, steps):
        values, grads = draw(SHAPES, steps + 2)
        self.case, self.grads = case, grads
        self.params, self.stock_params = ([leaf(v) for v in values] for _ in range(2))
        self.opt, self.stock = (
            build(
                [
                    {"params": [("a", params[0]), ("b", params[1])]},
                    {"params": [("c", params[2]), ("d", params[3])], "lr": 0.02},
                ]
            )
            for build, params in ((case.ours, self.params), (case.stock, self.stock_params))
        )
        step_through(self.opt, self.params, grads[:steps])
        step_through(self.stock, self.stock_params, grads[:steps])
        for p, g in zip(self.params, grads[-2], strict=True):
            p.grad = g.clone()
        self.bad = self.params[2]
        self.state = self.opt.state.get(self.bad)

    def fails(self, error, *words):
        """step() raises, names the place, changes nothing, and does so again."""
        before, plan_free = snapshot(self.opt), [bits(p.grad) for p in self.params[:2]]
        for _ in range(2):
            with pytest.raises(error) as caught:
                self.opt.step()
            message = str(caught.value)
            for word in (f"fusedopt.{self.case.name}", *words):
                assert word in message, message
            assert snapshot(self.opt) == before
        assert [bits(p.grad) for p in self.params[:2]] == plan_free

    def goes_on(self):
        """After the repair, steps are those of stock."""
        for now in self.grads[-2:]:
            step_through(self.opt, self.params, [now])
            step_through(self.stock, self.stock_params, [now])
        assert_trained_alike(self.opt, self.params, self.stock, self.stock_params)


def where(dtype="torch.float32", shape=(5, 2), strides=(2, 1)):
    """What a message must say about the third parameter."""
    return ("group 1", "parameter 0", "'c'", str(shape), dtype, f"strides {strides}")


@pytest.fixture(params=[0, 2], ids=["at the first step", "later"])
def steps(request):
    return request.param


def _grad_shape(run):
    run.bad.grad = torch.ones(5, 2)
    run.bad.grad.data = torch.ones(2, 5)


def _grad_size(run):
    run.bad.grad.data = torch.ones(11)


def _grad_broadcastable(run):
    run.bad.grad.data = torch.ones(1, 2)


def _grad_empty(run):
    run.bad.grad.data = torch.ones(0)


def _param_shape(run):
    run.bad.data = torch.ones(4, 2)


def _grad_complex(run):
    run.bad.grad_dtype = None
    run.bad.grad = torch.ones(5, 2, dtype=torch.complex64)


def _grad_integer(run):
    run.bad.grad_dtype = None
    run.bad.grad = torch.ones(5, 2, dtype=torch.int64)


def _grad_bool(run):
    run.bad.grad_dtype = None
    run.bad.grad = torch.ones(5, 2, dtype=torch.bool)


@richest
@pytest.mark.parametrize(
    "damage",
    [
        _grad_shape,
        _grad_size,
        _grad_broadcastable,
        _grad_empty,
        _param_shape,
        _grad_complex,
        _grad_integer,
        _grad_bool,
    ],
    ids=lambda f: f.__name__[1:],
)
def test_bad_gradients(case, damage, steps, backend):
    run = Run(case, steps)
    before = run.bad.detach().clone()
    if "dtype" in damage.__code__.co_names and not hasattr(run.bad, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    if damage is _param_shape:
        damage(run)
        run.fails((TypeError, ValueError), *where(shape=(4, 2)))
        run.bad.data = before
    else:
        damage(run)
        run.fails((TypeError, ValueError), *where())
    run.bad.grad = None
    if hasattr(run.bad, "grad_dtype"):
        run.bad.grad_dtype = torch.float32
    run.goes_on()


def _sparse_like(param):
    return torch.sparse_coo_tensor([[0, 2]], torch.ones(2, *param.shape[1:]), param.shape)


@richest
def test_sparse_gradient_in_the_last_parameter(case, steps, backend):
    """Not supported by the rule, or together with weight decay."""
    assert case.options["weight_decay"]
    run = Run(case, steps)
    run.params[3].grad = _sparse_like(run.params[3])
    run.fails(RuntimeError, "sparse gradients", "group 1", "parameter 1", "'d'", "(4, 3)")
    run.params[3].grad = None
    run.goes_on()


def test_l1_with_sparse_gradients(backend):
    for name in SPARSE:
        run = Run(Case(name, {"lr": 0.1, "l1": 0.1}), 1)
        run.bad.grad = _sparse_like(run.bad)
        run.fails(RuntimeError, "l1", "sparse", *where())


def test_sparse_gradient_on_a_dense_nesterov_buffer(backend):
    """torch cannot add these; here it is what the same gradient does as a dense one."""
    run = Run(Case("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}), 2)
    grad = _sparse_like(run.params[3])
    run.params[3].grad, run.stock_params[3].grad = grad, grad.to_dense()
    run.opt.step()
    run.stock.step()
    torch.testing.assert_close(run.params[3], run.stock_params[3])


def test_dense_gradient_on_a_sparse_momentum_buffer(backend):
    run = Run(Case("SGD", {"lr": 0.1, "momentum": 0.9}), 0)
    run.bad.grad = _sparse_like(run.bad)
    run.opt.step()
    run.bad.grad = torch.ones(5, 2)
    before = snapshot(run.opt)
    with pytest.raises(RuntimeError, match="sparse"):
        run.opt.step()
    assert snapshot(run.opt) == before


def _wrong(key, value):
    def corrupt(state, slot):
        key_ = slot if key is None else key
        state[key_] = value(state[key_]) if callable(value) else value

    return corrupt


SLOT_DAMAGE = {
    "another shape": _wrong(None, torch.ones(2, 5)),
    "broadcastable": _wrong(None, torch.ones(1, 2)),
    "larger": _wrong(None, torch.ones(50)),
    "a number": _wrong(None, 1.0),
    "a list": _wrong(None, lambda t: t.tolist()),
    "a numpy array": _wrong(None, lambda t: t.numpy()),
    "meta": _wrong(None, lambda t: t.to("meta")),
    "integer": _wrong(None, lambda t: t.long()),
    "complex": _wrong(None, lambda t: t + 0j),
    "sparse": _wrong(None, lambda t: t.to_sparse()),
    "expanded": _wrong(None, lambda t: torch.ones(1, 2).expand(5, 2)),
}
STEP_DAMAGE = {
    "negative": _wrong("step", torch.tensor(-1.0)),
    "NaN": _wrong("step", torch.tensor(float("nan"))),
    "a vector": _wrong("step", torch.ones(2)),
    "empty": _wrong("step", torch.ones(0)),
    "a string": _wrong("step", "3"),
    "None": _wrong("step", None),
    "meta": _wrong("step", torch.ones((), device="meta")),
    "complex": _wrong("step", torch.tensor(1 + 1j)),
}


@richest
@pytest.mark.parametrize("damage", SLOT_DAMAGE)
def test_corrupted_state(case, damage, backend):
    run = Run(case, 2)
    good = dict(run.state)
    slot = [key for key in run.state if key not in SCALARS][-1]
    SLOT_DAMAGE[damage](run.state, slot)
    run.fails((TypeError, ValueError, RuntimeError), f"state['{slot}']", *where())
    run.state.update(good)
    run.goes_on()


@richest
def test_state_resized_in_place(case, backend):
    """The tensor is the one of the last step, but what it holds has another shape."""
    run = Run(case, 2)
    slot = [key for key in run.state if key not in SCALARS][-1]
    good = run.state[slot].data
    run.state[slot].data = torch.ones(3)
    run.fails((TypeError, ValueError), f"state['{slot}']", *where())
    run.state[slot].data = good
    run.goes_on()


@counting
@pytest.mark.parametrize("damage", STEP_DAMAGE)
def test_corrupted_step(case, damage, backend):
    run = Run(case, 2)
    good = dict(run.state)
    STEP_DAMAGE[damage](run.state, None)
    run.fails((TypeError, ValueError), "step", *where())
    run.state.update(good)
    run.goes_on()


@counting
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_step_made_negative_in_place(case, value, backend):
    """The step tensor is still the one that the last step used."""
    run = Run(case, 2)
    good = run.state["step"].clone()
    run.state["step"].fill_(value)
    run.fails(ValueError, "step", *where())
    run.state["step"].copy_(good)
    run.goes_on()


@richest
def test_state_that_is_not_a_dict(case, backend):
    run = Run(case, 2)
    good, run.opt.state[run.bad] = run.state, [1, 2]
    run.fails(TypeError, *where())
    run.opt.state[run.bad] = good
    run.goes_on()


# Parameters that cannot be optimized ----------------------------------------------------------


def _last(case, param, grad, *words, error=(TypeError, ValueError)):
    """A bad parameter at the end of a list of good ones: at the first step, and later."""
    for steps in (0, 2):
        values, grads = draw([(5,), (2, 3)], 3)
        good = [leaf(v) for v in values]
        opt = case.ours([*good, param])
        exact = [leaf(v) for v in values]
        stock = case.stock(exact)
        param.grad = None
        step_through(opt, [*good, param], [[*now, None] for now in grads[:steps]])
        for p, g in zip(good, grads[steps], strict=True):
            p.grad = g.clone()
        param.grad = grad
        before = snapshot(opt)
        with pytest.raises(error) as caught:
            opt.step()
        for word in (f"fusedopt.{case.name}", "group 0", "parameter 2", *words):
            assert word in str(caught.value), str(caught.value)
        assert snapshot(opt) == before
        param.grad = None
        step_through(opt, [*good, param], [[*grads[steps], None]])
        step_through(stock, exact, grads[: steps + 1])
        assert_trained_alike(opt, good, stock, exact)


@richest
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_integer_parameters(case, dtype, backend):
    param = torch.ones(4, dtype=dtype)
    _last(case, param, torch.ones(4, dtype=dtype), "(4,)", str(dtype), "strides (1,)")


@richest
def test_meta_parameters(case, backend):
    param = torch.ones(4, device="meta", requires_grad=True)
    _last(case, param, torch.ones(4, device="meta"), "meta", "(4,)")


@richest
@pytest.mark.parametrize(
    "param",
    [torch.ones(1).expand(4), torch.ones(2, 1).expand(2, 3)],
    ids=["expanded", "partly expanded"],
)
def test_parameters_that_overlap_themselves(case, param, backend):
    param = param.detach().requires_grad_()
    _last(case, param, torch.ones(param.shape), "share", str(tuple(param.shape)))


@richest
def test_inference_parameters(case, backend):
    with torch.inference_mode():
        param = torch.ones(4)
    good = leaf(torch.ones(3))
    opt = case.ours([good, param])
    good.grad, param.grad = torch.ones(3), torch.ones(4)
    before = snapshot(opt)
    with pytest.raises(RuntimeError):
        opt.step()
    assert snapshot(opt) == before


# Group values ---------------------------------------------------------------------------------

every_number = pytest.mark.parametrize(
    ("case", "key"),
    [(case, key) for case in RICHEST for key in case.table.numbers],
    ids=lambda v: v if isinstance(v, str) else v.name,
)


@every_number
def test_group_values_that_are_no_numbers(case, key, steps, backend):
    """In the second group: the first must not have been updated."""
    run = Run(case, steps)
    good = run.opt.param_groups[1][key]
    for value in ("x", None, [0.1, 0.2, 0.3], torch.ones(3), 1j, object()):
        run.opt.param_groups[1][key] = value
        run.fails((TypeError, ValueError), "group 1", key)
    run.opt.param_groups[1][key] = good
    run.goes_on()


@every_number
def test_missing_group_values(case, key, steps, backend):
    run = Run(case, steps)
    for key_ in (key, "maximize"):
        good = run.opt.param_groups[1].pop(key_)
        run.fails((KeyError, TypeError, ValueError), "group 1", key_)
        run.opt.param_groups[1][key_] = good
    run.goes_on()


@pytest.mark.parametrize("name", those_with("capturable"))
def test_capturable_on_the_cpu(name, backend):
    """As with stock, an error; and one that comes before anything is written."""
    if backend == "kernels":
        pytest.skip("there all memory is that of a GPU")
    case = Case(name, {})
    run = Run(case, 1)
    run.opt.param_groups[1]["capturable"] = True
    run.fails((AssertionError, RuntimeError, ValueError), "capturable", *where())
    run.opt.param_groups[1]["capturable"] = False
    run.goes_on()


# Interruption ---------------------------------------------------------------------------------


@richest
def test_a_step_that_fails_keeps_no_stale_tensors(case, backend):
    """After an error the optimizer looks at everything anew."""
    run = Run(case, 2)
    run.bad.grad.data = torch.ones(3)
    run.fails(ValueError, *where())
    for p, q in zip(run.params, run.stock_params, strict=True):
        p.data = p.data.clone() * 2
        q.data = q.data.clone() * 2
    run.bad.grad = None
    run.goes_on()


@richest
def test_errors_do_not_depend_on_names(case, backend):
    values, grads = draw([(6,), (5,)], 1)
    params = [leaf(v) for v in values]
    opt = case.ours(params)
    step_through(opt, params, grads)
    params[1].grad.data = torch.ones(4)
    pattern = re.escape(f"fusedopt.{case.name}, param group 0, parameter 1 (shape (5,)")
    with pytest.raises(ValueError, match=pattern):
        opt.step()
