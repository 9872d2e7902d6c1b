"""Param groups and their lists of parameters as other mappings and sequences."""

from __future__ import annotations

import types
from collections import OrderedDict, UserDict, UserList, defaultdict

import pytest
import torch
from cases import NAMES, Case, assert_near, leaf, richest_and_stateless, richest_by_options
from torch import nn

from containers import OwnDict, Upper, assert_same, pair, step_both


class Scheduled(dict):
    """A group that computes an option when it is read."""

    def __getitem__(self, key):
        return 0.03 if key == "lr" else super().__getitem__(key)


class OwnList(list):
    pass


class Reversed(list):
    """A list that shows another order than the one that the C interface sees."""

    def __iter__(self):
        return iter([self[i] for i in range(len(self))])

    def __getitem__(self, index):
        return list.__getitem__(self, len(self) - 1 - index) if isinstance(index, int) else [*self]


def regroup(make):
    def change(opt):
        opt.param_groups[:] = [make(group) for group in opt.param_groups]

    return change


GROUPS = {
    "subclass": regroup(OwnDict),
    "OrderedDict": regroup(OrderedDict),
    "UserDict": regroup(UserDict),
    "entries elsewhere": regroup(Upper),
    "defaultdict": regroup(lambda g: defaultdict(lambda: None, g)),
}
PARAMS = {
    "tuple": tuple,
    "ParameterList": lambda ps: nn.ParameterList(ps),
    "UserList": UserList,
    "subclass": OwnList,
    "values of a dict": lambda ps: dict(enumerate(ps)).values(),
    "keys of a dict": lambda ps: dict.fromkeys(ps).keys(),
}
LISTS = {"tuple": tuple, "UserList": UserList, "subclass": OwnList}


def with_params(make):
    def change(opt):
        for group in opt.param_groups:
            group["params"] = make(group["params"])

    return change


CHANGES = {f"group: {name}": change for name, change in GROUPS.items()}
CHANGES |= {f"params: {name}": with_params(make) for name, make in PARAMS.items()}
CHANGES |= {
    f"param_groups: {name}": lambda opt, make=make: setattr(
        opt, "param_groups", make(opt.param_groups)
    )
    for name, make in LISTS.items()
}


@richest_and_stateless
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("after", [0, 2])
def test_groups_of_other_classes(case, kind, after, backend):
    """With whatever reads groups: schedulers, zero_grad, state_dict, clipping."""
    if "values" in kind or "keys" in kind:
        more = {}
    else:
        more = {"max_grad_norm": 100.0}
    opts, both = pair(case, lambda opt: None, **more)
    step_both(opts, both, after)
    CHANGES[kind](opts[0])
    containers = opts[0].param_groups, [*opts[0].param_groups]
    params = [group["params"] for group in containers[1]]
    schedulers = [torch.optim.lr_scheduler.StepLR(opt, 1, 0.9) for opt in opts]
    for _ in range(3):
        step_both(opts, both)
        for scheduler in schedulers:
            scheduler.step()
    assert_same(opts, both)
    assert opts[0].param_groups is containers[0]
    assert all(a is b for a, b in zip(opts[0].param_groups, containers[1], strict=True))
    assert all(g["params"] is p for g, p in zip(opts[0].param_groups, params, strict=True))
    opts[0].zero_grad()
    assert all(p.grad is None for p in both[0])
    if "keys" not in kind and "values" not in kind and kind != "params: ParameterList":
        assert opts[0].state_dict()["param_groups"][0]["params"] == [0, 1]


def test_an_option_that_a_group_computes_is_the_one_that_counts(backend):
    for name in NAMES:
        opts, both = pair(Case(name, {"lr": 0.5}), regroup(Scheduled))
        for group in opts[1].param_groups:
            group["lr"] = 0.03
        step_both(opts, both, 3)
        assert_same(opts, both)


def test_a_list_with_another_order(backend):
    """An update for each parameter that the list shows, in its order."""
    opts, both = pair(Case("Adam", {}), with_params(Reversed))
    step_both(opts, both, 3)
    assert_same(opts, both)


def test_a_group_that_only_reads(backend):
    """As a configuration shows it; a program that sets no option needs no more."""
    opts, both = pair(Case("Adam", {"lr": 0.1}), regroup(types.MappingProxyType))
    step_both(opts, both, 3)
    assert_same(opts, both)


@richest_by_options
def test_parameters_added_to_lists_of_other_classes(case, backend):
    opts, both = pair(case, with_params(UserList))
    step_both(opts, both, 2)
    late = leaf(torch.ones(4)), leaf(torch.ones(4))
    for opt, p in zip(opts, late, strict=True):
        opt.param_groups[1]["params"].append(p)
    if case.table.makes_state_at_once:  # as its constructor would
        for opt, p in zip(opts, late, strict=True):
            opt.state[p] = {"step": torch.tensor(0.0), "sum": torch.zeros(4)}
    both = [[*ps, p] for ps, p in zip(both, late, strict=True)]
    step_both(opts, both, 2)
    assert_same(opts, both)


FLAGS = [
    "maximize",
    "amsgrad",
    "nesterov",
    "centered",
    "differentiable",
    "capturable",
    "foreach",
    "fused",
]


@richest_and_stateless
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("after", [0, 2])
def test_flags_that_are_none_are_off(case, flag, after, backend):
    case = Case(case.name, {k: v for k, v in case.options.items() if k not in FLAGS})
    params = [[leaf(torch.ones(4))] for _ in range(2)]
    opts = [case.ours(params[0]), case.stock(params[1])]
    if flag not in opts[0].param_groups[0]:
        return
    step_both(opts, params, after)
    for opt in opts:
        opt.param_groups[0][flag] = None
    opts[1].param_groups[0]["foreach"] = False
    step_both(opts, params, 2)
    assert_near(params[0][0], params[1][0])
