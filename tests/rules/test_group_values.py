"""Step counts, and options of groups: they are read at every step."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import (
    COUNTING,
    RICHEST_OF,
    Case,
    assert_near,
    assert_trained_alike,
    draw,
    every_name,
    leaf,
    richest,
    step_through,
    train,
)

from rules import SHAPES

# Steps and group values -----------------------------------------------------------------------


@pytest.mark.parametrize("case", COUNTING, ids=str)
def test_step_counts_beyond_float32(case, backend):
    values, grads = draw([(19,)], 1)
    (param,), opt = train(case.ours, values, grads)
    opt.state[param]["step"].fill_(2**24 - 1)
    counts = []
    for _ in range(3):
        opt.step()
        counts.append(opt.state[param]["step"].item())
    assert counts == [2**24, 2**24 + 1, 2**24 + 2]


@pytest.mark.parametrize("case", COUNTING, ids=str)
def test_a_late_step_has_the_bias_correction_of_its_count(case, backend):
    values, grads = draw([(19,)], 3)
    runs = []
    for build, dtype in ((case.ours, None), (case.exact, torch.float64)):
        (param,), opt = train(build, values, grads[:1], dtype)
        opt.state[param]["step"].fill_(1234)
        step_through(opt, [param], grads[1:])
        runs.append((opt, [param]))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.999), (0.9, 0.0), (0.5, 0.5)])
def test_beta_limits(betas, backend):
    case = Case("Adam", {"betas": betas, "lr": 0.1})
    values, grads = draw(SHAPES, 4)
    params, opt = train(case.ours, values, grads)
    exact, oracle = train(case.exact, values, grads, torch.float64)
    assert_trained_alike(opt, params, oracle, exact, torch.float32)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        (RICHEST_OF["SGD"], {"lr": 0.5, "momentum": 0.2, "weight_decay": 0.3, "maximize": True}),
        (RICHEST_OF["SGD"], {"nesterov": False, "dampening": 0.4}),
        (RICHEST_OF["SGD"], {"momentum": 0.0, "nesterov": False}),
        (RICHEST_OF["Adam"], {"lr": 0.5, "betas": (0.2, 0.3), "eps": 0.1, "maximize": True}),
        (RICHEST_OF["Adam"], {"amsgrad": False, "weight_decay": 0.0}),
        (RICHEST_OF["Adam"], {"decoupled_weight_decay": True}),
        (RICHEST_OF["AdamW"], {"betas": [0.2, 0.3], "weight_decay": 0.5}),
        (RICHEST_OF["RMSprop"], {"lr": 0.5, "alpha": 0.7, "eps": 0.1, "maximize": True}),
        (RICHEST_OF["RMSprop"], {"centered": False, "momentum": 0.1}),
        (RICHEST_OF["RMSprop"], {"momentum": 0.0}),
        (RICHEST_OF["Adagrad"], {"lr": 0.5, "lr_decay": 0.5, "eps": 0.1, "maximize": True}),
    ],
    ids=str,
)
def test_group_values_are_read_at_every_step(case, changes, backend):
    values, grads = draw(SHAPES, 6)
    runs = []
    for build, dtype in ((case.ours, None), (case.exact, torch.float64)):
        params, opt = train(build, values, grads[:3], dtype)
        opt.param_groups[0].update(changes)
        step_through(opt, params, grads[3:])
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


@richest
def test_tensor_lr_changed_in_place(case, backend):
    values, grads = draw(SHAPES, 4)
    runs = []
    for build in (case.ours, case.stock):
        params = [leaf(v) for v in values]
        opt = build(params)
        lr = opt.param_groups[0]["lr"] = torch.tensor(0.1)
        step_through(opt, params, grads[:2])
        lr.mul_(5)
        step_through(opt, params, grads[2:])
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


@richest
def test_groups_have_their_own_options(case, backend):
    values, grads = draw([(7,), (3, 4), (20,)], 4)
    override = {"lr": 0.01, "weight_decay": 0.3, "maximize": True}
    runs = []
    for build, dtype in ((case.ours, None), (case.exact, torch.float64)):
        params = [leaf(v, dtype) for v in values]
        opt = build([{"params": params[:1]}, {"params": params[1:2], **override}])
        step_through(opt, params[:2], [now[:2] for now in grads[:2]])
        opt.add_param_group({"params": params[2:], "lr": 0.03})
        step_through(opt, params, grads[2:])
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


# l1 and eps_inside_sqrt -----------------------------------------------------------------------


@richest
def test_options_that_are_off_are_in_no_group(case):
    opt = case.ours([leaf(torch.ones(2))])
    assert not {"l1", "eps_inside_sqrt"} & (set(opt.param_groups[0]) | set(opt.defaults))


@richest
def test_l1_can_be_set_for_one_group(case, backend):
    plain = Case(case.name, {**case.options, "l1": 0.05})
    values, grads = draw([(33,), (33,)], 4)
    params = [leaf(v) for v in values]
    opt = case.ours([{"params": params[:1]}, {"params": params[1:], "l1": 0.05}])
    step_through(opt, params, grads)
    off, _ = train(case.exact, values[:1], [g[:1] for g in grads], torch.float64)
    on, _ = train(plain.exact, values[1:], [g[1:] for g in grads], torch.float64)
    assert_near(params[0], off[0])
    assert_near(params[1], on[0])


@richest
def test_l1_does_not_move_a_parameter_at_zero(case, backend):
    values = [torch.zeros(40)]
    grads = [[torch.zeros(40)]] * 2
    case = Case(case.name, {**case.options, "l1": 0.5})
    (param,), _ = train(case.ours, values, grads)
    assert not param.detach().abs().max()


@every_name
@pytest.mark.parametrize("l1", [-1e-9, math.nan])
def test_bad_l1_raises(name, l1):
    with pytest.raises(ValueError, match="Invalid l1 value"):
        Case(name, {"l1": l1}).ours([leaf(torch.ones(2))])


def test_extras_survive_a_checkpoint_and_a_copy(backend):
    case = Case("RMSprop", {"l1": 0.1, "eps_inside_sqrt": True})
    _, opt = train(case.ours, *draw([(5,)], 2))
    fresh = Case("RMSprop", {}).ours([leaf(torch.ones(5))])
    fresh.load_state_dict(opt.state_dict())
    for other in (fresh, copy.deepcopy(opt)):
        assert other.param_groups[0]["l1"] == 0.1
        assert other.param_groups[0]["eps_inside_sqrt"] is True


def test_the_second_step_goes_on_after_a_first_by_the_python_rule(backend):
    """A gradient of another dtype is left to the Python rule; the momentum that it made counts."""
    case = Case("SGD", {"lr": 0.1, "momentum": 0.9})
    values, grads = draw([(7,), (5,)], 3, torch.float64)
    params, exact = [leaf(v) for v in values], [leaf(v) for v in values]
    ours, oracle = case.ours(params), case.exact(exact)
    for step, now in enumerate(grads):
        now = [g.float() for g in now] if step == 0 else now
        for p, q, g in zip(params, exact, now, strict=True):
            if hasattr(p, "grad_dtype"):  # torch 2.10 has it not, and takes any dtype
                p.grad_dtype = None
            p.grad, q.grad = g.clone(), g.double()
        ours.step()
        oracle.step()
    assert_trained_alike(ours, params, oracle, exact)
