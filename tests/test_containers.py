"""``state``, its entries, param groups and their lists of parameters may be of other classes than
those that torch makes: the step is the same, and what a user holds stays in use."""

from __future__ import annotations

import types
from collections import OrderedDict, UserDict, UserList, defaultdict

import pytest
import torch
from cases import (
    NAMES,
    Case,
    assert_near,
    gradient_like,
    leaf,
    richest_and_stateless,
    richest_by_options,
    snapshot,
)
from torch import Tensor, nn

SHAPES = [(3, 2), (5,), ()]


class OwnDict(dict):
    pass


class Upper(dict):
    """Keeps its entries elsewhere than where the C interface of dicts looks."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.inner = dict(*args, **kwargs)

    def __getitem__(self, key):
        return self.inner[key]

    def __setitem__(self, key, value):
        self.inner[key] = value

    def __contains__(self, key):
        return key in self.inner

    def __iter__(self):
        return iter(self.inner)

    def __len__(self):
        return len(self.inner)

    def __delitem__(self, key):
        del self.inner[key]

    def keys(self):
        return self.inner.keys()

    def values(self):
        return self.inner.values()

    def items(self):
        return self.inner.items()

    def get(self, key, default=None):
        return self.inner.get(key, default)

    def setdefault(self, key, default=None):
        return self.inner.setdefault(key, default)

    def update(self, *args, **kwargs):
        self.inner.update(*args, **kwargs)

    def pop(self, *args):
        return self.inner.pop(*args)

    def clear(self):
        self.inner.clear()

    def copy(self):
        return Upper(self.inner)


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


def build(case, **options):
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    return params, case.ours([{"params": params[:2]}, {"params": params[2:]}], **options)


def step_both(opts, both, times: int = 1) -> None:
    for _ in range(times):
        for p, q in zip(*both, strict=True):
            p.grad = gradient_like(p)
            q.grad = p.grad.clone()
        for opt in opts:
            opt.step()


def pair(case, change, **options):
    """Ours with containers of other classes, and ours with torch's."""
    both, opts = [], []
    seed = torch.seed()
    for _ in range(2):
        torch.manual_seed(seed)
        params, opt = build(case, **options)
        both.append(params)
        opts.append(opt)
    change(opts[0])
    return opts, both


def assert_same(opts, both) -> None:
    """But for the last bit: some containers take the Python rule."""
    for p, q in zip(*both, strict=True):
        assert_near(p, q)
        mine, theirs = (opt.state.get(t, {}) for opt, t in zip(opts, (p, q), strict=True))
        assert_same_entries(mine, theirs)


def assert_same_entries(mine, theirs) -> None:
    assert sorted(mine) == sorted(theirs)
    for key, value in theirs.items():
        assert mine[key].dtype is value.dtype
        assert_near(mine[key], value, key)


# state ------------------------------------------------------------------------------------------


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


# Param groups -----------------------------------------------------------------------------------


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


# What the kernels never take --------------------------------------------------------------------

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@richest_and_stateless
@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"ema": 0.9}], ids=str)
def test_float8_gradients(case, dtype, options, backend):
    """As gradients of the values that they have."""
    params = [leaf(torch.ones(6)) for _ in range(2)]
    opts = [case.ours(params[:1], **options), case.ours(params[1:], **options)]
    grad_dtypes = hasattr(params[0], "grad_dtype")
    for at in range(4):
        grad = torch.randn(6).to(dtype)
        for p, g in zip(params, (grad, grad.float()), strict=True):
            if grad_dtypes:
                p.grad = None
                p.grad_dtype = None
            p.grad = g if at != 2 else grad.float()
        for opt in opts:
            opt.step()
    assert_near(*params)
    for key, value in opts[0].state.get(params[0], {}).items():
        if isinstance(value, Tensor):
            assert_near(value, opts[1].state[params[1]][key], key)


@richest_and_stateless
def test_the_message_about_threads_is_for_threads(case, backend):
    """All at once: unusual containers with unusual tensors."""
    params = [leaf(torch.randn(4)), torch.randn(4, 4)[:, ::2].requires_grad_()]
    params += [torch.randn(3, dtype=torch.complex64).requires_grad_(), leaf(torch.randn(3))]
    twins = [leaf(p) for p in params]
    opts = [case.ours(params), case.stock(twins)]
    opts[0].state = OrderedDict(opts[0].state)
    opts[0].param_groups = tuple(map(UserDict, opts[0].param_groups))
    opts[0].param_groups[0]["params"] = tuple(params)
    for _ in range(4):
        step_both(opts, [params, twins])
        opts[0].state.move_to_end([*opts[0].state][0]) if opts[0].state else None
    for p, q in zip(params, twins, strict=True):
        assert_near(p, q)
