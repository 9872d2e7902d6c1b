"""What the optimizer keeps of tensors and models between steps: nothing that autograd, the garbage
collector or a swap would notice."""

from __future__ import annotations

import gc
import random
import sys
import weakref

import pytest
import seam
import torch
from cases import (
    NAMES,
    RICHEST_OF,
    TABLES,
    assert_near,
    bits,
    every_name,
    leaf,
    richest_and_stateless,
    snapshot,
)
from torch import Tensor, nn

import fusedopt

OPTIONS = {
    "plain": {},
    "average": {"ema": 0.9},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
    "clipped": {"max_grad_norm": 10.0},
}
with_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def train(opt, loss, steps: int = 2) -> None:
    for _ in range(steps):
        opt.zero_grad()
        loss().backward()
        opt.step()


# Parameters that change under autograd ----------------------------------------------------------


@richest_and_stateless
@with_options
def test_another_shape_through_data(case, options, backend):
    """The next backward makes a gradient of the new shape."""
    shape = random.choice([(2, 3), (12,), (3, 1), (0,), (4, 3, 2)])
    param = leaf(torch.randn(4, 3))
    opt = case.ours([param], **options)
    train(opt, lambda: (param * 2).sum())
    param.data = torch.randn(shape)
    opt.state.clear()
    opt.zero_grad()
    weights = torch.randn(shape)
    (param * weights).sum().backward()
    assert torch.equal(param.grad, weights)
    expected = leaf(param)
    stock = case.stock([expected])
    expected.grad = weights.clone()
    fresh = case.ours([leaf(param)], **options)
    fresh.param_groups[0]["params"][0].grad = weights.clone()
    for each in (opt, stock, fresh):
        if (
            each is opt and case.table.makes_state_at_once
        ):  # which makes its state in the constructor
            opt.state = case.ours([param], **options).state
        each.step()
    assert bits(param) == bits(fresh.param_groups[0]["params"][0])
    if options == {}:
        assert_near(param, expected)


@richest_and_stateless
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_another_dtype_through_data(case, dtype, backend):
    param = leaf(torch.randn(4))
    opt = case.ours([param])
    train(opt, lambda: (param * 2).sum())
    param.data = param.data.to(dtype)
    if case.table.makes_state_at_once:
        opt.state = case.ours([param]).state
    else:
        opt.state.clear()
    expected = leaf(param)
    stock = case.stock([expected])
    for _ in range(2):
        opt.zero_grad()
        (param * 3).abs().sum().backward()
        assert param.grad.dtype is dtype
        expected.grad = param.grad.clone()
        opt.step()
        stock.step()
    assert_near(param, expected)


@richest_and_stateless
@with_options
def test_parameters_swapped_there_and_back(case, options, backend):
    """As modules do under torch.__future__.set_swap_module_params_on_conversion."""
    params = [leaf(torch.randn(3, 2)) for _ in range(2)]
    opt = case.ours(params, **options)
    train(opt, lambda: (params[0] * 2).sum() + params[1].sum())
    other = nn.Parameter(torch.randn(5, dtype=torch.float64))
    opt.zero_grad()
    before = bits(params[0])
    torch.utils.swap_tensors(params[0], other)
    weights = torch.randn(5, dtype=torch.float64)
    (params[0] * weights).sum().backward()
    assert torch.equal(params[0].grad, weights)
    params[0].grad = None
    torch.utils.swap_tensors(params[0], other)
    assert bits(params[0]) == before
    twins = [leaf(p) for p in params]
    train(opt, lambda: (params[0] * 2).sum())
    assert params[0].grad.shape == (3, 2) and twins[0].shape == (3, 2)
    assert bits(params[0]) != before


@every_name
@with_options
def test_state_swapped_there_and_back(name, options, backend):
    case = RICHEST_OF[name]
    param, twin = (leaf(torch.ones(6)) for _ in range(2))
    opts = [case.ours([p], **options) for p in (param, twin)]
    for opt, p in zip(opts, (param, twin), strict=True):
        train(opt, lambda p=p: p.square().sum())
    for key, value in opts[0].state[param].items():
        other = torch.full((3, 3), 7.0)
        before = bits(value)
        torch.utils.swap_tensors(value, other)
        assert value.shape == (3, 3) and bits(other) == before
        torch.utils.swap_tensors(value, other)
        assert bits(value) == before, key
        replacement = value.clone()
        torch.utils.swap_tensors(value, replacement)  # for good, with the same contents
        for opt, p in zip(opts, (param, twin), strict=True):
            train(opt, lambda p=p: p.square().sum(), 1)
    assert bits(param) == bits(twin)


@richest_and_stateless
def test_modules_converted_by_swapping(case, backend):
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        results = []
        for build in (case.ours, case.stock):
            torch.manual_seed(3)
            model = nn.Linear(4, 3)
            opt = build(model.parameters())
            x = torch.ones(2, 4)
            train(opt, lambda m=model, x=x: m(x).square().sum())
            opt.zero_grad()
            model.double().float()
            train(opt, lambda m=model, x=x: m(x).square().sum())
            results.append([*model.parameters()])
        for p, q in zip(*results, strict=True):
            assert_near(p, q)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


# What is kept alive -----------------------------------------------------------------------------


@richest_and_stateless
@with_options
def test_no_references_are_kept(case, options, backend):
    """Neither objects nor storages nor nodes of autograd have more owners after a step."""
    params = [leaf(torch.randn(shape)) for shape in [(3, 2), (), (5000,), (0,)]]
    opt = case.ours(params, **options)
    for p in params:
        p.grad = torch.ones_like(p)

    def owners() -> list:
        state = [v for p in params for v in opt.state.get(p, {}).values() if isinstance(v, Tensor)]
        tensors = [*params, *[p.grad for p in params], *state]
        counts = [(sys.getrefcount(t), t._use_count(), storage_users(t)) for t in tensors]
        return counts

    opt.step()
    first = owners()
    for _ in range(3):
        opt.step()
        assert owners() == first
    seam.forget_plan(opt)
    assert owners() == first


def storage_users(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


@richest_and_stateless
def test_accumulate_grad_nodes_are_not_kept_alive(case, backend):
    """The node that sums into a leaf dies with the graph; the next backward has a new one."""
    param = leaf(torch.ones(3))
    opt = case.ours([param])
    train(opt, lambda: param.sum(), 3)
    calls = []
    node = param.view_as(param).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: calls.append(1))
    del node
    train(opt, lambda: param.sum(), 1)
    assert calls == []


CYCLES = {
    "hook of a parameter": lambda model, opt: model.weight.register_hook(lambda g: model and g),
    "hook after accumulation": lambda model, opt: model.weight.register_post_accumulate_grad_hook(
        lambda p: model and None
    ),
    "attribute": lambda model, opt: setattr(model, "optimizer", opt),
    "hook of the module": lambda model, opt: model.register_forward_hook(
        lambda *_: None if opt else None
    ),
    "hook of the optimizer": lambda model, opt: opt.register_step_post_hook(
        lambda *_: model and None
    ),
    "attribute of a parameter": lambda model, opt: setattr(model.weight, "owner", (model, opt)),
    "key of the state": lambda model, opt: opt.state[model.weight].update(model=model, opt=opt),
    "option of a group": lambda model, opt: opt.param_groups[0].update(model=model, opt=opt),
    "scheduler": lambda model, opt: setattr(
        model, "scheduler", torch.optim.lr_scheduler.LambdaLR(opt, lambda e: 1.0 if model else 1.0)
    ),
}


def in_a_cycle(cls, cycle: str, **more) -> list[weakref.ref]:
    """Trains a model that is in a cycle and lets it go. What is watched."""
    model = Model(3, 2)
    opt = cls(model.parameters(), lr=0.1, **more)
    train(opt, lambda: model(torch.ones(1, 3)).sum(), 1)
    CYCLES[cycle](model, opt)
    train(opt, lambda: model(torch.ones(1, 3)).sum(), 2)
    state = [v for s in opt.state.values() for v in s.values() if isinstance(v, Tensor)]
    return [weakref.ref(t) for t in (model, opt, *model.parameters(), *state)]


class Model(nn.Linear):
    """Of which there are weak references."""


@every_name
def test_cycles_are_collected(name, backend):
    options = random.choice([*OPTIONS.values()])
    ours = {cycle: in_a_cycle(getattr(fusedopt, name), cycle, **options) for cycle in CYCLES}
    stock = {cycle: in_a_cycle(TABLES[name].stock, cycle, foreach=False) for cycle in CYCLES}
    gc.collect()
    alive = {
        cycle: [type(ref()).__name__ for ref in watched if ref() is not None]
        for cycle, watched in ours.items()
    }
    for cycle, kinds in alive.items():
        left = sum(ref() is not None for ref in stock[cycle])
        assert not kinds or len(kinds) <= left, (cycle, kinds)


def test_cycles_with_attached_optimizers_are_collected(backend):
    def run(name):
        model = Model(3, 2)
        model.optimizer = fusedopt.attach(model, getattr(fusedopt, name), lr=0.1)
        for _ in range(3):
            model(torch.ones(1, 3)).sum().backward()
        return [weakref.ref(model), weakref.ref(model.optimizer), weakref.ref(model.weight)]

    watched = {name: run(name) for name in NAMES}
    gc.collect()
    for name, refs in watched.items():
        assert [ref() for ref in refs] == [None] * 3, name


def test_cycles_with_closures_are_collected(backend):
    def run(name):
        model = Model(3, 2)
        opt = getattr(fusedopt, name)(model.parameters(), lr=0.1)

        def closure():
            opt.zero_grad()
            loss = model(torch.ones(1, 3)).sum()
            loss.backward()
            return loss

        opt.closure = closure
        opt.step(closure)
        opt.step(closure)
        return [weakref.ref(model), weakref.ref(opt)]

    watched = {name: run(name) for name in NAMES}
    gc.collect()
    for name, refs in watched.items():
        assert [ref() for ref in refs] == [None, None], name


def test_collection_in_the_middle_of_training(backend):
    """A plan that is alive loses nothing."""
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        param, twin = leaf(torch.ones(5)), leaf(torch.ones(5))
        opt = fusedopt.Adam([param], lr=0.1, state_dtype=torch.bfloat16, ema=0.5)
        train(opt, lambda: param.square().sum(), 4)
        gc.collect()
        train(opt, lambda: param.square().sum(), 2)
    finally:
        gc.set_threshold(*threshold)
    other = fusedopt.Adam([twin], lr=0.1, state_dtype=torch.bfloat16, ema=0.5)
    train(other, lambda: twin.square().sum(), 6)
    assert bits(param) == bits(twin)


# Modes ------------------------------------------------------------------------------------------

MODES = {
    "inference": lambda step: torch.inference_mode()(step)(),
    "no grad": lambda step: torch.no_grad()(step)(),
    "enabled grad": lambda step: torch.enable_grad()(step)(),
    "grad": lambda step: torch.func.grad(lambda x: (step(), x.sum())[1])(torch.ones(2)),
    "jvp": lambda step: torch.func.jvp(
        lambda x: (step(), x * 2)[1], (torch.ones(2),), (torch.ones(2),)
    ),
    "vmap": lambda step: torch.func.vmap(lambda x: (step(), x * 2)[1])(torch.ones(2)),
    "functionalize": lambda step: torch.func.functionalize(lambda x: (step(), x * 2)[1])(
        torch.ones(2)
    ),
    "saved tensors": lambda step: _with_saved_tensor_hooks(step),
}


def _with_saved_tensor_hooks(step):
    with torch.autograd.graph.save_on_cpu():
        step()


@richest_and_stateless
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
def test_a_step_in_a_mode(case, mode, first, backend):
    """Once, before and after steps without."""
    if first and mode in ("inference", "functionalize"):
        return  # the state that is made there is torch's to refuse later
    params = [leaf(torch.randn(4)), leaf(torch.randn(2, 3))]
    expected = [leaf(p) for p in params]
    opts = [case.ours(params), case.stock(expected)]
    for at in range(4):
        for p, q in zip(params, expected, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        if at != (0 if first else 2):
            opts[0].step()
            opts[1].step()
        elif mode not in ("grad", "jvp"):
            MODES[mode](opts[0].step)
            MODES[mode](opts[1].step)
        else:  # where torch may refuse to write what is from outside
            before = snapshot(opts[0])
            try:
                MODES[mode](opts[0].step)
            except RuntimeError:
                assert snapshot(opts[0]) == before
                opts[0].step()
            opts[1].step()
    for p, q in zip(params, expected, strict=True):
        assert_near(p, q)
        (p * 2).sum().backward()  # autograd goes on
        assert p.grad.shape == p.shape


@richest_and_stateless
def test_training_in_inference_mode_after_steps_without(case, backend):
    """All steps from some point on; what autograd saved before notices them."""
    param = leaf(torch.ones(3))
    opt = case.ours([param])
    train(opt, lambda: param.square().sum())
    loss = param.square().sum()
    param.grad = torch.ones(3)
    with torch.inference_mode():
        for _ in range(3):
            opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
