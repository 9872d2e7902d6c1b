"""Random programs: shapes, strides, dtypes, options, missing gradients, numbers of steps."""

from __future__ import annotations

import copy
import random
from unittest import mock

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    EXTRAS,
    GRAD_LAYOUTS,
    LAYOUTS,
    NAMES,
    TABLES,
    Case,
    assert_near,
    assert_trained_alike,
    leaf,
    step_through,
    train,
)
from conftest import SEED
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from optimizers import Between

import fusedopt

relaxed = settings(
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

shapes = st.lists(st.integers(0, 7), min_size=4, max_size=4).map(tuple)
small = st.one_of(st.just(0.0), st.floats(0.01, 0.3))
lr = st.floats(0.001, 0.2)
flag = st.booleans()


def strategy(choice):
    if isinstance(choice, list):
        return st.tuples(*map(strategy, choice))
    if isinstance(choice, Between):
        floats = st.floats(choice.low, choice.high)
        return st.just(0.0) | floats if choice.or_zero else floats
    return st.sampled_from(choice)


@st.composite
def options(draw):
    """Any valid options of any class. What makes a rule ill-conditioned is left to tests/rules."""
    name = draw(st.sampled_from(NAMES))
    chosen = {"lr": draw(lr), "weight_decay": draw(small), "maximize": draw(flag)}
    if draw(flag):
        chosen["l1"] = draw(st.floats(0.01, 0.1))
    for option, choice in TABLES[name].mild.items():
        chosen[option] = draw(strategy(choice))
    TABLES[name].settle(chosen)
    return Case(name, chosen)


@st.composite
def programs(draw):
    """A case, parameters with their layouts, and which gradients each step has."""
    params = draw(
        st.lists(
            st.tuples(shapes, st.sampled_from(sorted(LAYOUTS)), st.sampled_from(DTYPES)),
            min_size=1,
            max_size=5,
        )
    )
    present = st.lists(st.booleans(), min_size=len(params), max_size=len(params))
    layouts = st.lists(
        st.sampled_from(sorted(GRAD_LAYOUTS)), min_size=len(params), max_size=len(params)
    )
    steps = draw(st.lists(st.tuples(present, layouts), min_size=1, max_size=5))
    return draw(options()), params, steps, draw(st.integers(0, 2**20))


def _run(program):
    """Ours and the exact run of a program."""
    case, kinds, steps, number = program
    torch.manual_seed(number)
    random.seed(number)
    params, exact = [], []
    for shape, layout, dtype in kinds:
        p = LAYOUTS[layout](torch.randn(shape).to(dtype))[0].detach().requires_grad_()
        params.append(p)
        exact.append(leaf(p.detach().contiguous(), torch.float64))
    ours, oracle = case.ours(params), case.exact(exact)
    for present, layouts in steps:
        for p, q, there, layout in zip(params, exact, present, layouts, strict=True):
            g = torch.randn(p.shape)
            g = GRAD_LAYOUTS[layout]((3 * (g + g.sign())).to(p.dtype))[0]
            p.grad, q.grad = (g, g.double()) if there else (None, None)
        ours.step()
        oracle.step()
    return ours, params, oracle, exact


@seed(SEED)
@given(program=programs())
@relaxed
def test_any_program_equals_the_oracle(program, backend):
    ours, params, oracle, exact = _run(program)
    for p, q in zip(params, exact, strict=True):
        assert_near(p, q, program)
        if p.dtype in (torch.float32, torch.float64):
            assert_trained_alike(ours, [p], oracle, [q], torch.float32)


@seed(SEED)
@given(program=programs())
@relaxed
def test_native_and_python_agree(program, native):
    fast, params, _, _ = _run(program)
    with mock.patch.object(fusedopt.backend, "native", None):
        slow, expected, _, _ = _run(program)
    for p, q in zip(params, expected, strict=True):
        assert_near(p, q, program)
        assert fast.state[p].keys() == slow.state[q].keys()
        for key, value in fast.state[p].items():
            other = slow.state[q][key]
            assert (value.dtype, value.stride()) == (other.dtype, other.stride())
            assert_near(value, other, (key, program))


@seed(SEED)
@given(
    case=st.sampled_from(CASES),
    cut=st.integers(1, 4),
    number=st.integers(0, 2**20),
    shape=shapes,
)
@relaxed
def test_resuming_anywhere_changes_nothing(case, cut, number, shape, backend):
    torch.manual_seed(number)
    values = [torch.randn(shape)]
    grads = [[torch.randn(shape) + 3] for _ in range(5)]
    (expected,), _ = train(case.ours, values, grads)
    (param,), opt = train(case.ours, values, grads[:cut])
    other = case.ours([param])
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    step_through(other, [param], grads[cut:])
    assert torch.equal(param.detach(), expected.detach())


@seed(SEED)
@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=12), number=st.integers(0, 2**20))
@relaxed
def test_cutting_a_parameter_changes_nothing(sizes, number, native):
    """Elementwise rules: it does not matter how elements are spread over tensors."""
    torch.manual_seed(number)
    case = CASES[number % len(CASES)]
    dtype = DTYPES[number // 7 % len(DTYPES)]
    values = [torch.randn(sum(sizes)).to(dtype)]
    grads = [[(torch.randn(sum(sizes)) + 3).to(dtype)] for _ in range(3)]
    (whole,), _ = train(case.ours, values, grads)
    cut, _ = train(case.ours, values[0].split(sizes), [g[0].split(sizes) for g in grads])
    assert torch.equal(whole.detach(), torch.cat([p.detach() for p in cut]))


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_extra_options_are_among_the_cases(extra):
    assert any(case.options.get(extra) for case in CASES)
