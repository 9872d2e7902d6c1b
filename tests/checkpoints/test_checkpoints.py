"""Checkpoints travel between stock and fusedopt in both directions."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import (
    CASES,
    EXTRAS,
    RICHEST_OF,
    SCALARS,
    Case,
    assert_near,
    assert_trained_alike,
    bits,
    counting,
    draw,
    every_case,
    gradient_like,
    leaf,
    richest,
    snapshot,
    states,
    step_through,
    train,
)

from checkpoints import resumed, through_a_file

PLAIN = [case for case in CASES if not set(case.options) & set(EXTRAS)]
SHAPES = [(5,), (17, 33), (), (0, 2)]


@pytest.mark.parametrize("case", PLAIN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_moving_between_stock_and_ours(case, dtype, backend):
    """Two steps with one, two with the other, and back."""
    values = [torch.randn(s).to(dtype) for s in SHAPES]
    grads = [[gradient_like(v) for v in values] for _ in range(6)]
    expected, reference = train(case.stock, values, grads)
    for path in ([case.stock, case.ours, case.stock], [case.ours, case.stock, case.ours]):
        params, opt = train(path[0], values, grads[:2])
        for at, build in enumerate(path[1:], 1):
            params, opt = resumed(build, params, through_a_file(opt.state_dict()))
            step_through(opt, params, grads[2 * at : 2 * at + 2])
        narrow = torch.complex64 if dtype.is_complex else torch.float32
        assert_trained_alike(opt, params, reference, expected, narrow)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resuming_changes_no_bit(case, dtype, backend):
    values, grads = draw(SHAPES, 4, dtype)
    _, uninterrupted = train(case.ours, values, grads)
    params, opt = train(case.ours, values, grads[:2])
    params, opt = resumed(case.ours, params, through_a_file(opt.state_dict()))
    step_through(opt, params, grads[2:])
    assert snapshot(opt) == snapshot(uninterrupted)


@richest
def test_loading_into_an_optimizer_that_has_stepped(case, backend):
    """The tensors of the last step are forgotten."""
    values, grads = draw(SHAPES, 4)
    params, opt = train(case.ours, values, grads[:2])
    saved, at_save = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in params]
    expected = [snapshot_after(opt, params, grads[2:])]
    for p, value in zip(params, at_save, strict=True):
        p.data.copy_(value)
    opt.load_state_dict(saved)
    expected.append(snapshot_after(opt, params, grads[2:]))
    assert expected[0] == expected[1]


def snapshot_after(opt, params, grads):
    step_through(opt, params, grads)
    return snapshot(opt)


@richest
def test_moments_keep_the_dtype_they_were_saved_in(case, backend):
    """Float32 moments on bfloat16 parameters; torch's own load_state_dict would round them."""
    values, grads = draw([(35,), (4, 5)], 3)
    _, wide = train(case.ours, values, grads)
    saved = through_a_file(wide.state_dict())
    params = [leaf(v, torch.bfloat16) for v in values]
    opt = case.ours(params)
    opt.load_state_dict(saved)
    for state, expected in zip(states(opt, params), saved["state"].values(), strict=True):
        assert {k: bits(v) for k, v in state.items()} == {k: bits(v) for k, v in expected.items()}
    step_through(opt, params, grads[:1])
    for state in states(opt, params):
        assert all(v.dtype == torch.float32 for v in state.values())
    again = opt.state_dict()["state"]
    assert all(v.dtype == torch.float32 for state in again.values() for v in state.values())


@richest
def test_moments_in_lower_precision_than_the_parameter(case, backend):
    values, grads = draw([(35,), (4, 5)], 5)
    _, low = train(case.ours, values, grads[:2], torch.bfloat16)
    runs = []
    for build, dtype in ((case.ours, torch.float32), (case.stock, torch.float32)):
        params = [leaf(v, dtype) for v in values]
        opt = build(params)
        opt.load_state_dict(through_a_file(low.state_dict()))
        step_through(opt, params, grads[2:3])
        runs.append((opt, params))
    (opt, params), (_, exact) = runs
    for p, q in zip(params, exact, strict=True):
        assert_near(p, q)  # the bfloat16 moments are read exactly, and rounded only when stored
        assert all(v.dtype == torch.bfloat16 for k, v in opt.state[p].items() if k not in SCALARS)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Case("Adam", {}), {"amsgrad": True}),
        (Case("AdamW", {}), {"amsgrad": True}),
        (Case("RMSprop", {}), {"momentum": 0.9}),
        (Case("RMSprop", {}), {"centered": True}),
        (Case("RMSprop", {"momentum": 0.9}), {"centered": True}),
        (Case("SGD", {}), {"momentum": 0.9}),
    ],
    ids=str,
)
@pytest.mark.parametrize("saved_by", ["stock", "ours"])
def test_options_switched_on_at_resume(before, after, saved_by, backend):
    """The state that they need starts as it does in a new run; the rest is kept."""
    values, grads = draw([(35,)], 5)
    (param,), opt = train(getattr(before, saved_by), values, grads[:2])
    (param,), opt = resumed(before.ours, [param], opt.state_dict())
    old = {key: bits(value) for key, value in opt.state[param].items()}
    opt.param_groups[0].update(after)

    exact = [leaf(param, torch.float64)]
    oracle = Case(before.name, {**before.options, **after}).exact(exact)
    if before.name != "SGD":
        step_through(oracle, exact, [[torch.zeros(35)]])  # makes all of the state
        for key, value in oracle.state[exact[0]].items():
            value.copy_(opt.state[param].get(key, torch.zeros(())))
        exact[0].data.copy_(param.detach())
    assert {key: bits(value) for key, value in opt.state[param].items()} == old
    step_through(opt, [param], grads[2:])
    step_through(oracle, exact, grads[2:])
    assert_trained_alike(opt, [param], oracle, exact, torch.float32)


SWITCHES = [
    (RICHEST_OF["Adam"], {"amsgrad": False}),
    (RICHEST_OF["AdamW"], {"amsgrad": False}),
    (RICHEST_OF["RMSprop"], {"centered": False}),
    (RICHEST_OF["RMSprop"], {"momentum": 0.0}),
    (RICHEST_OF["SGD"], {"momentum": 0.0, "nesterov": False}),
]


@pytest.mark.parametrize(("case", "off"), SWITCHES, ids=str)
def test_options_switched_off_and_on_within_a_run(case, off, backend):
    """Is what a run does that is saved and loaded at each change."""
    values, grads = draw([(35,), (3, 4)], 6)
    on = {key: case.options[key] for key in off}

    def go(reload):
        params = [leaf(v) for v in values]
        opt = Case(case.name, {**case.options, **off}).ours(params)
        for part, options in ((grads[:2], on), (grads[2:4], off), (grads[4:], on)):
            step_through(opt, params, part)
            if reload:
                params, opt = resumed(case.ours, params, opt.state_dict())
            opt.param_groups[0].update(options)
        step_through(opt, params, grads[:1])
        return snapshot(opt)

    assert go(reload=False) == go(reload=True)


@pytest.mark.parametrize("case", PLAIN, ids=str)
@pytest.mark.parametrize("number", [int, float], ids=["int", "float"])
def test_old_checkpoints(case, number, backend):
    """Steps that are numbers, and groups without the keys of later versions of torch."""
    values, grads = draw([(5,), (3, 4)], 4)
    params, opt = train(case.stock, values, grads[:2])
    expected = case.stock(copied := [leaf(p) for p in params])
    saved = copy.deepcopy(opt.state_dict())
    expected.load_state_dict(through_a_file(saved))
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = number(state["step"])
    newer = ("maximize", "foreach", "capturable", "differentiable", "fused", "nesterov", "amsgrad")
    for group in saved["param_groups"]:
        for key in (*newer, "centered", "momentum", "decoupled_weight_decay"):
            if not group.get(key):
                group.pop(key, None)
    params, ours = resumed(case.ours, params, saved)
    if "step" in ours.state[params[0]]:
        assert ours.state[params[0]]["step"].dtype == torch.float32
    assert ours.param_groups[0].keys() == expected.param_groups[0].keys()
    step_through(ours, params, grads[2:])
    step_through(expected, copied, grads[2:])
    assert_trained_alike(ours, params, expected, copied)


@counting
@pytest.mark.parametrize("count", [2**24 - 1, 2**24, 2**24 + 1, 2**30])
@pytest.mark.parametrize("kind", ["float32", "float64", "int"])
def test_large_step_counts_go_on(case, count, kind, backend):
    """A float32 cannot count beyond 2**24; nothing may stand still there."""
    (param,), opt = train(case.ours, *draw([(5,)], 1))
    saved = opt.state_dict()
    step = count if kind == "int" else torch.tensor(count, dtype=getattr(torch, kind))
    saved["state"][0]["step"] = step
    start = int(torch.tensor(count, dtype=torch.float32) if kind != "float64" else count)
    (param,), opt = resumed(case.ours, [param], saved)
    param.grad = torch.ones(5)
    for at in range(1, 4):
        opt.step()
        assert opt.state[param]["step"].item() == start + at


@richest
def test_named_checkpoints(case, backend):
    values, grads = draw([(5,), (3,)], 2)
    params = [leaf(v) for v in values]
    opt = case.ours([("a", params[0]), ("b", params[1])])
    step_through(opt, params, grads)
    saved = through_a_file(opt.state_dict())
    for build in (case.ours, case.stock):
        unnamed = build([leaf(v) for v in values])
        unnamed.load_state_dict(saved)
        named = build([("c", leaf(values[0])), ("d", leaf(values[1]))])
        named.load_state_dict(saved)
        results = unnamed.param_groups[0].get("param_names"), named.param_groups[0]["param_names"]
        if build == case.ours:
            ours = results
    assert ours == results
    plain = case.ours([leaf(v) for v in values])
    named = case.ours([("c", leaf(values[0])), ("d", leaf(values[1]))])
    named.load_state_dict(plain.state_dict())
    assert named.param_groups[0]["param_names"] == ["c", "d"]


@richest
def test_extra_entries_survive(case, backend):
    """What a program keeps in the groups and in the state is loaded, too."""
    (param,), opt = train(case.ours, *draw([(5,)], 1))
    opt.param_groups[0]["tag"] = {"a": 1}
    opt.state[param]["note"] = "kept"
    opt.state[param]["ema"] = torch.arange(3)
    (fresh,), other = resumed(case.ours, [param], through_a_file(opt.state_dict()))
    assert other.param_groups[0]["tag"] == {"a": 1}
    assert other.state[fresh]["note"] == "kept"
    assert torch.equal(other.state[fresh]["ema"], torch.arange(3))
    param.grad = fresh.grad = torch.ones(5)
    opt.step()
    other.step()
    assert snapshot(other) == snapshot(opt)


@richest
def test_a_checkpoint_of_another_memory_format(case, backend):
    values = [torch.randn(2, 3, 4, 5)]
    grads = [[torch.randn(2, 3, 4, 5) + 3] for _ in range(4)]
    params, opt = train(case.ours, values, grads[:2])
    exact, oracle = train(case.exact, values, grads, torch.float64)
    moved = [p.detach().to(memory_format=torch.channels_last).requires_grad_() for p in params]
    assert moved[0].stride() != params[0].stride()
    other = case.ours(moved)
    other.load_state_dict(opt.state_dict())
    step_through(other, moved, grads[2:])
    assert_trained_alike(other, moved, oracle, exact, torch.float32)


@richest
def test_partly_filled_checkpoints(case, backend):
    """Parameters that had no gradient yet have no state yet."""
    values, grads = draw([(5,), (3,)], 4)
    for now in grads[:2]:
        now[1] = None
    params, opt = train(case.ours, values, grads[:2])
    params, opt = resumed(case.ours, params, through_a_file(opt.state_dict()))
    step_through(opt, params, grads[2:])
    exact, oracle = train(case.exact, values, grads, torch.float64)
    assert_trained_alike(opt, params, oracle, exact, torch.float32)
