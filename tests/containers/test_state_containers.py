"""``state`` and its entries as other mappings."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict

import pytest
import torch
from cases import gradient_like, leaf, richest_and_stateless, richest_by_options, snapshot

from containers import OwnDict, Upper, assert_same, assert_same_entries, pair, step_both

STATES = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "defaultdict of OrderedDict": lambda s: defaultdict(OrderedDict, s),
    "defaultdict of a subclass": lambda s: defaultdict(OwnDict, s),
    "defaultdict without a factory": lambda s: defaultdict(None, s),
    "UserDict": UserDict,
    "subclass": OwnDict,
    "subclass with entries elsewhere": Upper,
}


@richest_and_stateless
@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("after", [0, 2])
def test_the_state_of_an_optimizer(case, kind, after, backend):
    opts, both = pair(case, lambda opt: None)
    step_both(opts, both, after)
    replaced = STATES[kind](opts[0].state)
    opts[0].state = replaced
    factory = getattr(replaced, "default_factory", None)
    step_both(opts, both, 2)
    assert opts[0].state is replaced
    assert_same(opts, both)
    if factory is not None and after == 0 and not case.table.makes_state_at_once:
        assert {type(s) for s in replaced.values()} <= {factory}
        assert replaced.default_factory is factory
    if isinstance(replaced, OrderedDict):
        for p in both[0][:2]:
            if p in replaced:
                replaced.move_to_end(p)
        step_both(opts, both, 2)
        replaced.move_to_end(both[0][0], last=False) if both[0][0] in replaced else None
        assert {*map(id, replaced)} == {id(p) for p in replaced.keys()}
        assert len([*reversed(replaced)]) == len(replaced)
    late = leaf(torch.ones(4)), leaf(torch.ones(4))
    for opt, p in zip(opts, late, strict=True):
        opt.add_param_group({"params": [p]})
    step_both(opts, [[*ps, p] for ps, p in zip(both, late, strict=True)], 2)
    assert_same(opts, [[*ps, p] for ps, p in zip(both, late, strict=True)])
    saved = [opt.state_dict() for opt in opts]
    assert len(saved[0]["state"]) == len(saved[1]["state"])
    for index, entries in saved[1]["state"].items():
        assert_same_entries(saved[0]["state"][index], entries)
    opts[0].load_state_dict(saved[1])
    opts[1].load_state_dict(saved[0])
    step_both(opts, [[*ps, p] for ps, p in zip(both, late, strict=True)], 2)
    assert_same(opts, [[*ps, p] for ps, p in zip(both, late, strict=True)])


ENTRIES = {
    "OrderedDict": OrderedDict,
    "defaultdict": lambda s: defaultdict(list, s),
    "subclass": OwnDict,
}


@richest_by_options
@pytest.mark.parametrize("kind", ENTRIES)
def test_the_state_of_a_parameter(case, kind, backend):
    opts, both = pair(case, lambda opt: None)
    step_both(opts, both, 2)
    entries = ENTRIES[kind](opts[0].state[both[0][0]])
    opts[0].state[both[0][0]] = entries
    step_both(opts, both, 2)
    assert opts[0].state[both[0][0]] is entries
    assert_same(opts, both)
    if isinstance(entries, OrderedDict):
        entries.move_to_end([*entries][0])
        step_both(opts, both, 2)
        assert [*entries] == [*reversed([*reversed(entries)])]
    # What an option needs later is added to it.
    for opt in opts:
        for group in opt.param_groups:
            group["ema"] = 0.5
    step_both(opts, both, 2)
    assert opts[0].state[both[0][0]] is entries and "ema" in entries
    assert type(entries) is type(ENTRIES[kind]({}))
    assert_same(opts, both)


@richest_and_stateless
@pytest.mark.parametrize("first", [False, True])
def test_dicts_that_a_user_holds_stay_in_use(case, first, backend):
    opts, both = pair(case, lambda opt: None)
    if not first:
        step_both(opts, both)
    state = opts[0].state
    held = [state[p] for p in both[0]]  # which makes them at the first step
    step_both(opts, both, 2)
    assert opts[0].state is state
    assert [id(state[p]) for p in both[0]] == [*map(id, held)]
    tensors = [id(v) for s in held for v in s.values()]
    step_both(opts, both, 2)
    assert tensors == [id(v) for s in held for v in s.values()]
    assert_same(opts, both)


@richest_by_options
@pytest.mark.parametrize("kind", ["OrderedDict", "UserDict", "subclass with entries elsewhere"])
@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 0.5}, {"ema": 0.9}, {"state_dtype": "8bit"}], ids=str
)
def test_errors_leave_states_of_other_classes_alone(case, kind, options, backend):
    opts, both = pair(case, lambda opt: None, **options)
    opts[0].state = STATES[kind](opts[0].state)
    step_both(opts, both)
    for p in both[0]:
        p.grad = gradient_like(p)
    both[0][1].grad = None
    both[0][1].data = torch.ones(7)
    both[0][1].grad = torch.ones(7)
    before = snapshot(opts[0])
    with pytest.raises(ValueError, match="has shape"):
        opts[0].step()
    assert snapshot(opts[0]) == before
