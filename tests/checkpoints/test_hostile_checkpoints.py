"""Hostile checkpoints do no harm."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import (
    RICHEST,
    RICHEST_OF,
    assert_near,
    draw,
    leaf,
    richest,
    snapshot,
    step_through,
    those_with,
    train,
)

from checkpoints import resumed, through_a_file

SLOT = object()  # stands for the name of a state tensor that the case must have


def _edit(path, value):
    """A state_dict with one entry replaced; a callable value gets the old entry."""

    def apply(saved, slot):
        *walk, last = (slot if key is SLOT else key for key in path)
        at = saved
        for key in walk:
            at = at[key]
        at[last] = value(at[last]) if callable(value) else value
        return saved

    return apply


def _remove(*path):
    def apply(saved, slot):
        *walk, last = (slot if key is SLOT else key for key in path)
        at = saved
        for key in walk:
            at = at[key]
        del at[last]
        return saved

    return apply


HOSTILE = {
    "None": lambda saved, slot: None,
    "a list": lambda saved, slot: [saved],
    "a string": lambda saved, slot: "state_dict",
    "empty": lambda saved, slot: {},
    "a model": lambda saved, slot: {"weight": torch.ones(2, 3)},
    "wrapped": lambda saved, slot: {"optimizer": saved},
    "no state": _remove("state"),
    "no groups": _remove("param_groups"),
    "state is a list": _edit(("state",), lambda s: list(s.values())),
    "state is None": _edit(("state",), None),
    "groups are a dict": _edit(("param_groups",), lambda g: dict(enumerate(g))),
    "no group": _edit(("param_groups",), []),
    "one group too many": _edit(("param_groups",), lambda g: [*g, g[0]]),
    "a group is None": _edit(("param_groups", 1), None),
    "a group without params": _remove("param_groups", 1, "params"),
    "params is a number": _edit(("param_groups", 1, "params"), 3),
    "params is None": _edit(("param_groups", 1, "params"), None),
    "one parameter too many": _edit(("param_groups", 1, "params"), lambda p: [*p, 7]),
    "one parameter too few": _edit(("param_groups", 0, "params"), lambda p: p[:-1]),
    "params cannot be keys": _edit(("param_groups", 1, "params"), lambda p: [[] for _ in p]),
    "an entry is None": _edit(("state", 2), None),
    "an entry is a tensor": _edit(("state", 2), torch.ones(3)),
    "an entry is a list": _edit(("state", 2), [1, 2]),
    "another shape": _edit(("state", 2, SLOT), lambda t: torch.ones(7)),
    "transposed": _edit(("state", 1, SLOT), lambda t: t.t()),
    "broadcastable": _edit(("state", 1, SLOT), lambda t: t[:1]),
    "a state tensor is a list": _edit(("state", 2, SLOT), lambda t: t.tolist()),
    "a state tensor is a number": _edit(("state", 2, SLOT), 1.0),
    "a state tensor is a string": _edit(("state", 2, SLOT), "x"),
    "a state tensor is integer": _edit(("state", 2, SLOT), lambda t: t.long()),
    "a state tensor is bool": _edit(("state", 2, SLOT), lambda t: t.bool()),
    "a state tensor is complex": _edit(("state", 2, SLOT), lambda t: t + 0j),
    "a state tensor is meta": _edit(("state", 2, SLOT), lambda t: t.to("meta")),
    "a state tensor is sparse": _edit(("state", 1, SLOT), lambda t: t.to_sparse()),
    "a required tensor is missing": _remove("state", 2, SLOT),
    "a required tensor is None": _edit(("state", 2, SLOT), None),
    "no step": _remove("state", 2, "step"),
    "step is None": _edit(("state", 2, "step"), None),
    "step is NaN": _edit(("state", 2, "step"), torch.tensor(math.nan)),
    "step is a NaN number": _edit(("state", 2, "step"), math.nan),
    "step is infinite": _edit(("state", 2, "step"), torch.tensor(math.inf)),
    "step is negative": _edit(("state", 2, "step"), torch.tensor(-1.0)),
    "step is a negative number": _edit(("state", 2, "step"), -3),
    "step is a string": _edit(("state", 2, "step"), "three"),
    "step is a list": _edit(("state", 2, "step"), [3]),
    "step is a vector": _edit(("state", 2, "step"), torch.ones(3)),
    "step is empty": _edit(("state", 2, "step"), torch.ones(0)),
    "step is meta": _edit(("state", 2, "step"), torch.ones((), device="meta")),
    "step is complex": _edit(("state", 2, "step"), torch.tensor(1 + 1j)),
}


def _trained(case):
    values, grads = draw([(2,), (3, 4), (3,)], 2)
    params = [leaf(v) for v in values]
    opt = case.ours([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}])
    step_through(opt, params, grads)
    return params, opt


def _harmless(case, damage):
    """SGD counts no steps, its buffer may be missing, and that of sparse gradients is sparse."""
    return not case.table.counts_steps and any(w in damage for w in ("step", "required", "sparse"))


@pytest.mark.parametrize(
    ("case", "damage"),
    [(c, d) for c in RICHEST for d in HOSTILE if not _harmless(c, d)],
    ids=lambda v: v if isinstance(v, str) else v.name,
)
def test_hostile_state_dicts(case, damage, backend):
    """A clear TypeError or ValueError, and the optimizer is what it was and goes on."""
    params, opt = _trained(case)
    _, source = _trained(case)
    saved = HOSTILE[damage](copy.deepcopy(source.state_dict()), case.table.required)
    before = snapshot(opt)
    with pytest.raises((TypeError, ValueError)) as error:
        opt.load_state_dict(saved)
    assert len(str(error.value)) > 20
    assert snapshot(opt) == before
    twin_params, twin = copy.deepcopy((params, opt))
    opt.step()
    assert snapshot(opt) != before
    for p, q in zip(params, twin_params, strict=True):
        q.grad = p.grad
    twin.step()
    assert snapshot(opt) == snapshot(twin)


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [
        (a, b)
        for a in RICHEST
        for b in RICHEST
        if a.name != b.name and {a.name, b.name} != {"Adam", "AdamW"}  # one format
    ],
    ids=lambda case: case.name,
)
def test_the_checkpoint_of_another_optimizer(saved_by, loaded_by, backend):
    _, source = _trained(saved_by)
    _, opt = _trained(loaded_by)
    before = snapshot(opt)
    with pytest.raises((TypeError, ValueError), match=r"checkpoint|state"):
        opt.load_state_dict(source.state_dict())
    assert snapshot(opt) == before


@richest
def test_a_load_hook_that_raises_changes_nothing(case, backend):
    _, opt = _trained(case)
    before = snapshot(opt)

    def hook(o, saved):
        raise ZeroDivisionError

    opt.register_load_state_dict_pre_hook(hook)
    with pytest.raises(ZeroDivisionError):
        opt.load_state_dict(opt.state_dict())
    assert snapshot(opt) == before


@pytest.mark.parametrize(
    ("case", "flag"),
    [(c, "fused") for c in map(RICHEST_OF.get, those_with("fused"))]
    + [(c, "capturable") for c in map(RICHEST_OF.get, those_with("capturable"))],
    ids=lambda v: v if isinstance(v, str) else v.name,
)
def test_a_stock_checkpoint_made_with_other_flags(case, flag, backend):
    """It loads; the groups say what the checkpoint says, as with stock."""
    values, grads = draw([(5,)], 3)
    (param,), stock = train(case.stock, values, grads[:2])
    saved = through_a_file(stock.state_dict())
    saved["param_groups"][0][flag] = True
    (fresh,), ours = resumed(case.ours, [param], saved)
    assert ours.param_groups[0][flag] is True
    ours.param_groups[0][flag] = False
    step_through(ours, [fresh], grads[2:])
    step_through(stock, [param], grads[2:])
    assert_near(fresh, param)
