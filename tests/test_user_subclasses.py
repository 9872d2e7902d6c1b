"""Classes that a user derives from ours, with constructors, options and state of their own."""

from __future__ import annotations

import copy
import functools
import inspect

import pytest
import seam
import torch
from cases import (
    TABLES,
    bits,
    draw,
    every_name,
    every_torch_name,
    gradient_like,
    leaf,
    richest,
    snapshot,
    step_through,
)

import fusedopt

# Every option that torch lacks; capturable needs an accelerator to step.
OPTIONS = {"l1": 0.01, "state_dtype": torch.float16, "master_weights": "fp32", "ema": 0.9}


def passing_on(base):
    class Mine(base):
        def __init__(self, params, **kw):
            super().__init__(params, **kw)

    return Mine


def of_any_arguments(base):
    class Mine(base):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)

    return Mine


def of_few_arguments(base):
    class Mine(base):
        def __init__(self, model, settings):
            super().__init__(model.values() if isinstance(model, dict) else model, **settings)

    return lambda params, **kw: Mine(params, kw)


def of_more_arguments(base):
    class Mine(base):
        def __init__(self, params, lr=0.5, warmup=3, *, l1=0.25, **kw):
            super().__init__(params, lr=lr, l1=l1, **kw)
            self.warmup = warmup

    return Mine


def partial(base):
    class Mine(base):
        __init__ = functools.partialmethod(base.__init__)

    return Mine


def of_other_names(base):
    class Mine(base):
        def __init__(self, params, step_size=0.1, average=None, sparsity=0.0, **kw):
            kw = {"lr": step_size, "ema": average, "l1": sparsity} | kw
            super().__init__(params, **kw)

    return Mine


def deep(base):
    return passing_on(of_any_arguments(passing_on(base)))


def mixed(base):
    class Logging:
        def __init__(self, *args, log=None, **kw):
            super().__init__(*args, **kw)
            self.log = log

    class Mine(Logging, base):
        pass

    return Mine


def mixed_behind(base):
    class Logging(torch.optim.Optimizer):
        log = None

    class Mine(base, Logging):
        def __init__(self, params, **kw):
            super().__init__(params, **kw)

    return Mine


CLASSES = [
    passing_on,
    of_any_arguments,
    of_few_arguments,
    of_more_arguments,
    partial,
    of_other_names,
    deep,
    mixed,
    mixed_behind,
]
every_class = pytest.mark.parametrize("derive", CLASSES, ids=lambda f: f.__name__)


def options_of(case):
    more = dict.fromkeys(case.table.extras, True)
    return {**case.options, **OPTIONS, **more}


def frozen(value):
    if isinstance(value, torch.Tensor):
        return bits(value)
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return [frozen(item) for item in value] if isinstance(value, (list, tuple)) else value


@richest
def test_the_options_that_torch_lacks(case):
    """The table of each class says what the two constructors say."""
    cls = getattr(fusedopt, case.name)
    ours, stock = (set(inspect.signature(c).parameters) for c in (cls, case.table.stock))
    not_of_groups = {"max_grad_norm", "amp_fused", "decoupled_weight_decay"}
    assert seam.own_options(cls) == ours - stock - not_of_groups
    assert stock <= {"params", *seam.torch_options(cls)}


@richest
@every_class
@pytest.mark.parametrize("by_group", [False, True])
def test_a_stock_checkpoint_leaves_the_options_on(case, derive, by_group, backend):
    values, grads = draw([(5,), (70, 71)], 4, torch.bfloat16)
    base = getattr(fusedopt, case.name)
    runs = []
    for build in (base, derive(base)):
        torch.manual_seed(0)
        params = [leaf(v) for v in values]
        stock = case.stock(params)
        step_through(stock, params, grads[:2])
        if by_group:
            stock.add_param_group({"params": [leaf(values[0])]})
            more = {"params": [leaf(values[0])], "ema": 0.5, "l1": 0.125}
            opt = build([{"params": params, **options_of(case)}, more])
        else:
            opt = build(params, **options_of(case))
        opt.load_state_dict(copy.deepcopy(stock.state_dict()))
        assert opt.param_groups[0].items() >= options_of(case).items()
        if by_group:
            assert opt.param_groups[1].items() >= {"ema": 0.5, "l1": 0.125}.items()
        step_through(opt, params, grads[2:])
        runs.append(snapshot(opt))
    assert runs[0] == runs[1]


@richest
@every_class
def test_a_checkpoint_for_torch_has_none_of_the_options(case, derive, backend):
    values, grads = draw([(5,), (70, 71)], 2, torch.bfloat16)
    base = getattr(fusedopt, case.name)
    saved = []
    for build in (base, derive(base)):
        params = [leaf(v) for v in values]
        opt = build(params, **options_of(case))
        step_through(opt, params, grads)
        saved.append(opt.state_dict(stock=True))
    stock = case.stock([leaf(v) for v in values])
    assert saved[0]["param_groups"][0].keys() == stock.state_dict()["param_groups"][0].keys()
    assert frozen(saved[0]) == frozen(saved[1])
    stock.load_state_dict(saved[1])


@richest
@pytest.mark.parametrize("option", ["capturable", "eps_inside_sqrt"])
def test_switches_of_one_class(case, option):
    base = getattr(fusedopt, case.name)
    if option not in seam.own_options(base):
        return
    opt = passing_on(base)([torch.zeros(3, requires_grad=True)], **{option: True})
    stock = case.stock([torch.zeros(3, requires_grad=True)])
    assert option not in opt.state_dict(stock=True)["param_groups"][0]
    opt.load_state_dict(stock.state_dict())
    assert opt.param_groups[0][option] is True


def with_options_of_its_own(base):
    class Mine(base):
        def __init__(self, params, scale=2.0, note="a", **kw):
            super().__init__(params, **kw)
            more = {"scale": scale, "note": note}
            self.defaults.update(more)
            for group in self.param_groups:
                for name, value in more.items():
                    group.setdefault(name, value)

        def step(self, closure=None):
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.grad.mul_(group["scale"])
            return super().step(closure)

    return Mine


@richest
def test_options_that_a_subclass_adds(case, backend):
    """They are the user's: in both kinds of checkpoint, and not lost by one that lacks them."""
    values, grads = draw([(5,), (3, 4)], 4)
    cls = with_options_of_its_own(getattr(fusedopt, case.name))
    params = [leaf(v) for v in values]
    stock = case.stock(params)
    step_through(stock, params, grads[:2])
    saved = copy.deepcopy(stock.state_dict())
    groups = [{"params": params, "scale": 4.0, "note": None}]
    opt = cls(groups, **case.options)
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["scale"] == 4.0 and opt.param_groups[0]["note"] is None
    step_through(opt, params, grads[2:])
    for is_stock in (False, True):
        group = opt.state_dict(stock=is_stock)["param_groups"][0]
        assert group["scale"] == 4.0 and group["note"] is None
        other = cls([leaf(p) for p in params], **case.options)
        other.load_state_dict(opt.state_dict(stock=is_stock))
        assert other.param_groups[0]["scale"] == 4.0
    case.stock([leaf(p) for p in params]).load_state_dict(opt.state_dict(stock=True))


@richest
@pytest.mark.parametrize("value", [None, "text", [1, 2], "deleted"], ids=str)
def test_nobody_checks_what_a_subclass_adds(case, value, backend):
    """A default that is a number says nothing about what its class does with it."""
    values, grads = draw([(5,)], 2)
    cls = with_options_of_its_own(getattr(fusedopt, case.name))
    params = [leaf(v) for v in values]
    opt = cls(params, **case.options)
    opt.defaults["mine"] = 3
    if value != "deleted":
        opt.param_groups[0]["mine"] = value
    step_through(opt, params, grads)
    opt.load_state_dict(opt.state_dict())
    opt.step()


@richest
def test_state_that_a_subclass_keeps(case, backend):
    """Integers, too, and under any name: they are no codes."""
    values, grads = draw([(5,)], 1)
    (param,), cls = [leaf(v) for v in values], passing_on(getattr(fusedopt, case.name))
    opt = cls([param], **case.options)
    step_through(opt, [param], grads)
    more = {
        "mask": torch.randint(0, 2, (5,), dtype=torch.uint8),
        "sign": torch.ones(2, dtype=torch.int8),
        "mask_scale": torch.ones(1),
        "history": [torch.ones(2), {"at": (torch.zeros(1), 3)}],
    }
    opt.state[param].update(more)
    opt.state["counts"] = {}
    for is_stock in (False, True):
        saved = opt.state_dict(stock=is_stock)
        assert saved["state"]["counts"] == {}
        assert {key: saved["state"][0][key] for key in more} == more
        other = cls([leaf(values[0])], **case.options)
        other.load_state_dict(saved)
        loaded = other.state[other.param_groups[0]["params"][0]]
        assert frozen({key: loaded[key] for key in more}) == frozen(more)
        assert loaded["history"] is not more["history"]  # the lists are its own
        opt.step()


@every_name
@every_class
def test_in_the_backward(name, derive, backend):
    base = getattr(fusedopt, name)
    cls = derive(base)
    if not isinstance(cls, type):
        return  # attach() calls the class with keywords
    values, inputs = torch.randn(3, 5), torch.randn(4, 5)
    runs = []
    for each in (base, cls):
        param = leaf(values)
        opt = fusedopt.attach([param], each, lr=0.1, ema=0.5, l1=0.01)
        for _ in range(2):
            (inputs @ param.T).square().sum().backward()
        stock = TABLES[name].stock([leaf(values)])
        opt.load_state_dict(stock.state_dict())
        (inputs @ param.T).square().sum().backward()
        assert opt.param_groups[0]["ema"] == 0.5
        runs.append(snapshot(opt))
    assert runs[0] == runs[1]


@every_torch_name
def test_to_torch_knows_every_option(name):
    """An average with a decay of 0 is one."""
    opt = getattr(fusedopt, name)([leaf(torch.ones(3))], ema=0.0)
    with pytest.raises(ValueError, match="ema"):
        fusedopt.to_torch(opt)
    assert type(opt) is getattr(fusedopt, name)


@every_name
@every_class
def test_copies(name, derive, backend):
    cls = derive(getattr(fusedopt, name))
    param = leaf(torch.randn(5))
    opt = cls([param], lr=0.1, ema=0.5)
    param.grad = gradient_like(param)
    opt.step()
    other = copy.deepcopy(opt)
    (copied,) = other.param_groups[0]["params"]
    copied.grad = param.grad.clone()
    other.load_state_dict(TABLES[name].stock([leaf(param)]).state_dict())
    assert other.param_groups[0]["ema"] == 0.5
