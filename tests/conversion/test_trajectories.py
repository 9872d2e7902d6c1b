"""A run that changes its library goes on as if it had not."""

from __future__ import annotations

import copy
import functools
import inspect

import pytest
import torch
from cases import (
    CASES,
    EXTRAS,
    RICHEST,
    TORCH_NAMES,
    Case,
    draw,
    richest,
    snapshot,
    step_through,
    those_with,
)
from torch import nn

import fusedopt
from conversion import Run, assert_alike, build, class_in, convert, convert_to, drawn, other, stock

DOUBLE = functools.partial(torch.tensor, dtype=torch.float64)
SWITCHES = [{"foreach": True}, {"fused": True}, {"fused": False}, {"maximize": True}]


def accepts(name, option):
    return option in inspect.signature(getattr(torch.optim, name)).parameters


VARIANTS = [
    # A float32 lr would be the precision of the whole step.
    *(
        case
        for case in CASES
        if case.name in TORCH_NAMES and not any(map(torch.is_tensor, case.options.values()))
    ),
    *(
        Case(case.name, {**case.options, **switch})
        for case in RICHEST
        for switch in (*SWITCHES, {"differentiable": True, "foreach": None})
        if all(accepts(case.name, option) for option in switch)
    ),
    *(Case(case.name, {**case.options, "lr": DOUBLE(0.05)}) for case in RICHEST),
    Case("Adam", {"lr": DOUBLE(0.05), "betas": (DOUBLE(0.8), DOUBLE(0.95))}),
    Case("SGD", {"lr": DOUBLE([0.05]), "momentum": 0.9, "weight_decay": DOUBLE(0.1)}),
]
VARIANTS = [case for case in VARIANTS if not set(case.options) & set(EXTRAS)]
every_variant = pytest.mark.parametrize("case", VARIANTS, ids=str)


@every_variant
@convert_to
def test_in_the_middle_of_training(case, to, backend):
    """Against the run of stock that was never converted."""
    values, grads = drawn(8, case=case)
    expected = Run(case, "torch", values).go(grads)
    run = Run(case, other(to), values).go(grads[:4])
    assert convert(run.opt) is run.opt
    assert type(run.opt) is class_in(to, case.name)
    assert_alike(run.go(grads[4:]), expected)


@every_variant
def test_to_and_fro(case, backend):
    """Before the first step, and after each."""
    values, grads = drawn(8, case=case)
    expected = Run(case, "torch", values).go(grads)
    run = Run(case, "torch", values)
    kept = vars(run.opt).keys()
    for now in grads:
        convert(run.opt)
        run.go([now])
    assert type(run.opt) is class_in("torch", case.name)
    assert_alike(run, expected)
    assert vars(run.opt).keys() == kept
    assert repr(run.opt) == repr(expected.opt)


@every_variant
def test_to_torch_is_what_torch_makes(case):
    run, expected = (
        Run(case, library, [torch.ones(2), torch.ones(3)]) for library in ("fusedopt", "torch")
    )
    opt = fusedopt.to_torch(run.opt)
    # Of fused optimizers, which look for it in this way: getattr(..., True).
    optional = {"_need_device_dtype_check_for_fused"}
    assert vars(opt).keys() - optional == vars(expected.opt).keys() - optional
    assert opt.defaults == expected.opt.defaults and [*opt.defaults] == [*expected.opt.defaults]
    assert repr(opt) == repr(expected.opt)
    assert [[*group] for group in opt.param_groups] == [
        [*group] for group in expected.opt.param_groups
    ]
    flag = "_step_supports_amp_scaling"
    assert getattr(opt, flag, None) == getattr(expected.opt, flag, None)


@pytest.mark.parametrize("name", [n for n in those_with("capturable") if n in TORCH_NAMES])
@convert_to
def test_capturable(name, to):
    """Can be made on a CPU, and not be stepped there by either library."""
    case = Case(name, {"capturable": True})
    run = Run(case, other(to), [torch.ones(3), torch.ones(2)])
    opt = convert(run.opt)
    assert all(group["capturable"] for group in (opt.defaults, *opt.param_groups))
    with pytest.raises((RuntimeError, AssertionError), match="capturable"):
        run.go([[torch.ones(3), torch.ones(2)]])


@convert_to
@richest
def test_complex_parameters(case, to, backend):
    values, grads = drawn(6, torch.complex128)
    expected = Run(case, "torch", values).go(grads)
    run = Run(case, other(to), values).go(grads[:3])
    convert(run.opt)
    assert_alike(run.go(grads[3:]), expected)


@pytest.mark.parametrize(
    "case",
    [Case("SGD", {"lr": 0.1}), Case("SGD", {"lr": 0.1, "momentum": 0.9}), Case("Adagrad", {})],
    ids=str,
)
@convert_to
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients(case, to, backend):
    """The momentum buffer of stock is then sparse, too."""
    embedding = nn.Embedding(7, 3, sparse=True).double()
    runs = []
    for library, convert_at in (("torch", None), (other(to), 3)):
        module = copy.deepcopy(embedding)
        opt = build(case, library, module.parameters())
        for at in range(6):
            if at == convert_at:
                convert(opt)
            opt.zero_grad()
            module(torch.arange(at, at + 4) % 7).square().sum().backward()
            opt.step()
        runs.append((module.weight, opt.state[module.weight]))
    (weight, state), (other_weight, other_state) = runs
    assert state.keys() == other_state.keys()
    for value, expected in [(weight, other_weight), *((state[k], other_state[k]) for k in state)]:
        value, expected = (t.to_dense() if t.is_sparse else t for t in (value, expected))
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@richest
def test_low_precision_moments_of_torch(case, backend):
    """Moments that fusedopt keeps in float32, torch could not go on with."""
    values, grads = draw([(3, 4)], 3, torch.float64)
    _, wide = (None, stock(case, params := [v.float() for v in values]))
    step_through(wide, params, grads)
    params = [v.bfloat16() for v in values]
    opt, expected = case.ours(params), stock(case, [v.bfloat16() for v in values])
    for each in (opt, expected):
        each.load_state_dict(copy.deepcopy(wide.state_dict()))
    assert fusedopt.to_torch(opt) is opt
    assert snapshot(opt) == snapshot(expected)
    for each in (opt, expected):
        step_through(each, each.param_groups[0]["params"], grads)
    assert snapshot(opt) == snapshot(expected)
