"""State dicts that are not made of lists and dicts: what torch's load_state_dict takes, and what it
keeps of it."""

from __future__ import annotations

import collections
import copy
import pickle
import types

import pytest
import torch
from cases import (
    RICHEST_OF,
    assert_trained_alike,
    bits,
    draw,
    leaf,
    richest,
    snapshot,
    states,
    step_through,
)

import fusedopt


class Tagged(dict):
    """A dict with a constructor and an attribute of its own."""

    def __init__(self, *args, tag="tag", **kw):
        super().__init__(*args, **kw)
        self.tag = tag


class Items(list):
    pass


MAPPINGS = {
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "defaultdict": lambda items: collections.defaultdict(list, items),
    "UserDict": collections.UserDict,
    "ChainMap": lambda items: collections.ChainMap({}, dict(items)),
    "read-only": lambda items: types.MappingProxyType(dict(items)),
    "subclass": Tagged,
}
LISTS = {
    "list": list,
    "tuple": tuple,
    "UserList": collections.UserList,
    "deque": collections.deque,
    "subclass": Items,
}


def trained(case, steps=2):
    values, grads = draw([(5,), (3, 4), ()], steps)
    params = [leaf(v) for v in values]
    stock = case.stock([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}])
    step_through(stock, params, grads)
    return params, stock.state_dict()


def loaded(build, params, saved):
    params = [leaf(p) for p in params]
    opt = build([{"params": params[:2]}, {"params": params[2:]}])
    opt.load_state_dict(saved)
    return params, opt


def check_as_torch(case, params, change):
    """What ours and torch's make of a changed state dict, and the next steps."""
    _, grads = draw([p.shape for p in params], 2)
    runs = []
    for build in (case.ours, case.stock):
        mine, opt = loaded(build, params, change())
        runs.append((mine, opt))
        types_before = [type(group) for group in opt.param_groups]
        assert type(opt.param_groups) is list
        assert type(opt.state) is collections.defaultdict and opt.state.default_factory is dict
        assert all(type(state) is dict for state in states(opt, mine))
        if set(types_before) == {dict}:
            step_through(opt, mine, grads)
    (mine, ours), (theirs, stock) = runs
    assert [type(g) for g in ours.param_groups] == [type(g) for g in stock.param_groups]
    for group, expected in zip(ours.param_groups, stock.param_groups, strict=True):
        assert [*group] == [*expected]
        assert type(group["params"]) is type(expected["params"]) is list
        assert getattr(group, "tag", None) == getattr(expected, "tag", None)
    assert_trained_alike(ours, mine, stock, theirs)


@richest
@pytest.mark.parametrize("kind", MAPPINGS)
def test_the_state_dict(case, kind, backend):
    params, saved = trained(case)
    check_as_torch(case, params, lambda: MAPPINGS[kind](copy.deepcopy(saved)))


@richest
@pytest.mark.parametrize("kind", MAPPINGS)
def test_the_state(case, kind, backend):
    params, saved = trained(case)

    def change():
        return {**copy.deepcopy(saved), "state": MAPPINGS[kind](copy.deepcopy(saved["state"]))}

    check_as_torch(case, params, change)


@richest
@pytest.mark.parametrize("kind", ["dict", "OrderedDict", "defaultdict", "subclass"])
def test_the_state_of_a_parameter(case, kind, backend):
    """torch takes subclasses of dict, and makes dicts of them."""
    params, saved = trained(case)

    def change():
        state = {key: MAPPINGS[kind](s) for key, s in copy.deepcopy(saved["state"]).items()}
        return {**copy.deepcopy(saved), "state": state}

    check_as_torch(case, params, change)


@richest
@pytest.mark.parametrize("kind", LISTS)
def test_the_list_of_groups(case, kind, backend):
    params, saved = trained(case)

    def change():
        groups = LISTS[kind](copy.deepcopy(saved["param_groups"]))
        return {**copy.deepcopy(saved), "param_groups": groups}

    check_as_torch(case, params, change)


@richest
@pytest.mark.parametrize("kind", ["dict", "OrderedDict", "defaultdict", "UserDict", "subclass"])
def test_a_group(case, kind, backend):
    """Its class is kept."""
    params, saved = trained(case)

    def change():
        groups = [MAPPINGS[kind](g) for g in copy.deepcopy(saved["param_groups"])]
        return {**copy.deepcopy(saved), "param_groups": groups}

    check_as_torch(case, params, change)


@richest
@pytest.mark.parametrize("kind", [*LISTS, "range"])
def test_the_parameters_of_a_group(case, kind, backend):
    params, saved = trained(case)

    def change():
        changed = copy.deepcopy(saved)
        for group in changed["param_groups"]:
            ids = group["params"]
            make = LISTS.get(kind, lambda ids: range(ids[0], ids[-1] + 1))
            group["params"] = make(ids)
        return changed

    check_as_torch(case, params, change)


@richest
def test_parameters_by_other_keys(case, backend):
    params, saved = trained(case)
    names = {0: "first", 1: ("second", 2), 2: None}

    def change():
        changed = copy.deepcopy(saved)
        for group in changed["param_groups"]:
            group["params"] = tuple(names[key] for key in group["params"])
        changed["state"] = {names[key]: state for key, state in changed["state"].items()}
        return changed

    check_as_torch(case, params, change)


@richest
def test_the_loaded_state_dict_stays_what_it_is(case, backend):
    params, saved = trained(case)
    saved["param_groups"][0]["note"] = {"a": [1]}
    saved["state"][0]["history"] = [[1.0], {"b": 2}]
    keys = [[*group] for group in saved["param_groups"]]
    _, opt = loaded(case.ours, params, collections.OrderedDict(saved))
    opt.param_groups[0]["note"]["a"].append(2)
    opt.state[opt.param_groups[0]["params"][0]]["history"][0].append(2.0)
    assert saved["param_groups"][0]["note"] == {"a": [1]}
    assert saved["state"][0]["history"] == [[1.0], {"b": 2}]
    assert [[*group] for group in saved["param_groups"]] == keys
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1], [2]]


Point = collections.namedtuple("Point", "x y")


@richest
def test_containers_that_a_program_keeps_in_the_state(case, backend):
    """Of their own class, as torch keeps them; dicts become dicts."""
    (first, *_), saved = trained(case)
    more = {
        "list": Items([torch.ones(2), 1]),
        "tuple": (torch.ones(2), "text", None),
        "named": Point(torch.ones(1), 2),
        "deque": collections.deque([1.0, 2.0]),
        "set": {1, 2},
        "size": torch.Size([1, 2]),
        "mapping": Tagged(a=collections.OrderedDict(b=[torch.zeros(1)])),
        "text": "text",
        "bytes": b"bytes",
    }
    saved["state"][0].update(more)
    mine, opt = loaded(case.ours, [first, *_], saved)
    state = opt.state[mine[0]]
    for key in more:
        assert type(state[key]) is (dict if key == "mapping" else type(more[key]))
        assert str(state[key]) == str(
            {"a": {"b": [torch.zeros(1)]}} if key == "mapping" else more[key]
        )
    assert type(state["mapping"]["a"]) is dict
    fresh = opt.state_dict()
    mine[0].grad = torch.ones(5)
    opt.step()
    assert fresh["state"][0]["named"] == Point(torch.ones(1), 2)


@richest
@pytest.mark.parametrize("kind", ["OrderedDict", "defaultdict", "UserDict", "subclass"])
@pytest.mark.parametrize("is_stock", [False, True])
def test_saving_from_other_containers(case, kind, is_stock, backend):
    """The live optimizer may have them; its checkpoint is that of one that has not."""
    values, grads = draw([(5,), (70, 71)], 2)
    params = [leaf(v) for v in values]
    opt = case.ours(params, state_dtype="8bit")
    step_through(opt, params, grads)
    opt.state["nobody"] = {}
    expected = copy.deepcopy(opt.state_dict(stock=is_stock))
    inner = dict if kind == "UserDict" else MAPPINGS[kind]
    opt.state = MAPPINGS[kind]({key: inner(state) for key, state in opt.state.items()})
    saved = opt.state_dict(stock=is_stock)
    assert saved.keys() == expected.keys() and [*saved["state"]] == [*expected["state"]]
    for key, state in expected["state"].items():
        assert {k: bits(v) for k, v in saved["state"][key].items()} == {
            k: bits(v) for k, v in state.items()
        }
    before = snapshot(opt)
    opt.load_state_dict(saved if not is_stock else opt.state_dict())
    assert snapshot(opt) == before
    assert type(opt.state) is collections.defaultdict


@richest
def test_copies_of_other_containers(case, backend):
    params, saved = trained(case)
    changed = {
        "state": collections.OrderedDict(saved["state"]),
        "param_groups": tuple(map(collections.OrderedDict, saved["param_groups"])),
    }
    _, opt = loaded(case.ours, params, changed)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert snapshot(other) == snapshot(opt)
        assert [type(g) for g in other.param_groups] == [collections.OrderedDict] * 2


@richest
def test_a_value_that_groups_share_is_shared(case, backend):
    """As torch's deepcopy of the groups keeps it."""
    params, saved = trained(case)
    lr = torch.tensor(0.25)
    for group in saved["param_groups"]:
        group["lr"] = lr
    for build in (case.ours, case.stock):
        _, opt = loaded(build, params, collections.OrderedDict(saved))
        first, second = (group["lr"] for group in opt.param_groups)
        assert first is second and first is not lr


REFUSED = {
    "groups in a dict": lambda saved: {
        **saved,
        "param_groups": dict(enumerate(saved["param_groups"])),
    },
    "groups in a text": lambda saved: {**saved, "param_groups": "ab"},
    "a list of states": lambda saved: {**saved, "state": [*saved["state"].values()]},
    "a read-only group": lambda saved: {
        **saved,
        "param_groups": [types.MappingProxyType(g) for g in saved["param_groups"]],
    },
    "a list": lambda saved: [saved],
    "a UserDict for a parameter": lambda saved: {
        **saved,
        "state": {key: collections.UserDict(s) for key, s in saved["state"].items()},
    },
}


@richest
@pytest.mark.parametrize("change", REFUSED)
def test_what_torch_refuses_too(case, change, backend):
    params, saved = trained(case)
    _, opt = loaded(case.ours, params, saved)
    before = snapshot(opt)
    with pytest.raises(TypeError) as error:
        opt.load_state_dict(REFUSED[change](copy.deepcopy(saved)))
    assert len(str(error.value)) > 20
    assert snapshot(opt) == before
    stock = case.stock([{"params": params[:2]}, {"params": params[2:]}])
    with pytest.raises((TypeError, ValueError, AttributeError, KeyError, IndexError)):
        stock.load_state_dict(REFUSED[change](copy.deepcopy(saved)))


def test_a_pre_hook_may_return_another_mapping(backend):
    case = RICHEST_OF["Adam"]
    params, saved = trained(case)
    params, opt = loaded(case.ours, params, saved)
    expected = snapshot(opt)
    opt.register_load_state_dict_pre_hook(lambda _, loaded: collections.UserDict(loaded))
    opt.load_state_dict(saved)
    assert snapshot(opt) == expected
    opt.register_load_state_dict_pre_hook(lambda _, loaded: [])
    with pytest.raises(TypeError, match="state_dict"):
        opt.load_state_dict(saved)
    assert isinstance(opt, fusedopt.Adam) and snapshot(opt) == expected
