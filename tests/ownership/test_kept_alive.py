"""What an optimizer keeps alive, and what the garbage collector may take."""

from __future__ import annotations

import gc
import random
import sys
import weakref

import seam
import torch
from cases import NAMES, TABLES, bits, every_name, leaf, richest_and_stateless
from torch import Tensor, nn

import fusedopt
from ownership import OPTIONS, train, with_options


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
