"""Which parameters an attached optimizer steps, and when."""

from __future__ import annotations

import copy

import pytest
import seam
import torch
from cases import bits, leaf, richest, snapshot
from torch import nn

import fusedopt
from attached import ADAMW, assert_same, attach, batches, both, gradients, loss, network, step


def test_a_module_gives_the_parameters_that_require_a_gradient(backend):
    model = network()
    model[0].weight.requires_grad_(False)
    opt = attach(ADAMW, model)
    assert [len(group["params"]) for group in opt.param_groups] == [2]
    before = bits(model[0].weight)
    loss(model, *batches(1)).backward()
    assert bits(model[0].weight) == before and len(opt.state) == 2


@richest
def test_parameters_that_freeze_and_thaw(case, backend):
    """Frozen at first, at the end, or in between."""
    here, there = (
        (model, build(case, [*model.parameters()]))
        for build in (attach, lambda case, params: case.ours(params))
        for model in [network_with_frozen_weight()]
    )
    assert not here[0][0].weight.requires_grad and here[0][0].weight.is_leaf
    for at, inputs in enumerate(batches(6)):
        for model, opt in (here, there):
            model[0].weight.requires_grad_(at >= 2)
            model[0].bias.requires_grad_(at < 4)
            model[2].weight.requires_grad_(at not in (2, 3))
            opt.zero_grad()
            loss(model, inputs).backward()
            assert not seam.is_attached(opt) or not gradients(model)
            if not seam.is_attached(opt):
                opt.step()
    assert_same(*here, *there)


def network_with_frozen_weight():
    torch.manual_seed(0)
    model = network()
    model[0].weight.requires_grad_(False)
    return model


def test_integer_parameters_are_left_alone():
    params = [leaf(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.int8), False)]
    fusedopt.attach(params, fusedopt.SGD, lr=0.5)
    with torch.inference_mode():
        frozen = torch.ones(3)
    opt = fusedopt.attach([*params[1:], frozen, other := leaf(torch.ones(3))], fusedopt.SGD, lr=0.5)
    other.sum().backward()
    assert other.tolist() == [0.5] * 3
    fusedopt.detach(opt)


@richest
def test_parameters_without_a_gradient_in_a_step(case, backend):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    here, there = both(case, model.double())
    for at, inputs in enumerate(batches(6)):
        for model, opt in (here, there):
            opt.zero_grad()
            loss(model["ab"[at % 2]], inputs).backward()
            opt.step()
    assert_same(*here, *there)
    assert not here[1].state.keys() & {*model["c"].parameters()} or case.table.makes_state_at_once


@richest
def test_a_group_that_is_added(case, backend):
    here, there = both(case, network(), groups=lambda model: model[0].parameters())
    for at, inputs in enumerate(batches(4)):
        for model, opt in (here, there):
            if at == 2:
                opt.add_param_group({"params": model[2].parameters(), "lr": 0.03})
            if at < 2:
                model[2].requires_grad_(False)
            else:
                model[2].requires_grad_()
            step(model, opt, inputs)
    assert_same(*here, *there)


def test_parameters_that_the_backward_does_not_reach():
    model = network()
    opt = attach(ADAMW, model)
    before = [*map(bits, model.parameters())]
    loss(model, *batches(1)).backward(inputs=[model[0].weight])
    assert [*map(bits, model.parameters())][1:] == before[1:]
    assert [*opt.state] == [model[0].weight]


def test_gradients_that_are_computed_but_not_accumulated(backend):
    """``torch.autograd.grad`` does not step; gradients set by hand are left to ``step()``."""
    here, there = both(ADAMW, network())
    for inputs in batches():
        for model, opt in (here, there):
            before = snapshot(opt)
            grads = torch.autograd.grad(loss(model, inputs), [*model.parameters()])
            for param, grad in zip(model.parameters(), grads, strict=True):
                param.grad = grad
            assert snapshot(opt) == before
            opt.step()
            assert snapshot(opt) != before
            opt.zero_grad()
            step(model, opt, inputs)
    assert_same(*here, *there)


def test_a_gradient_from_before_is_part_of_the_sum(backend):
    model = network()
    first, second = batches(2)
    loss(model, first).backward()
    twin = copy.deepcopy(model)
    for param, grad in zip(twin.parameters(), gradients(model), strict=True):
        param.grad = grad.clone()
    opt, other = attach(ADAMW, model), ADAMW.ours(twin.parameters())
    loss(model, second).backward()
    loss(twin, second).backward()
    other.step()
    assert_same(model, opt, twin, other)


@pytest.mark.parametrize(
    "change",
    [lambda groups: groups.pop(0), lambda groups: groups.pop(), list.reverse, list.clear],
    ids=["first", "last", "order", "all"],
)
def test_groups_that_are_changed_by_hand_are_an_error(change):
    """Rather than the options of another group."""
    model = network()
    opt = attach(ADAMW, [{"params": [p]} for p in model.parameters()])
    before, groups = snapshot(opt), opt.param_groups.copy()
    change(opt.param_groups)
    with pytest.raises(RuntimeError, match=r"no longer where it was in param_groups; detach\(\)"):
        loss(model, *batches(1)).backward(inputs=[model[0].weight, model[2].weight])
    opt.param_groups[:] = groups
    assert snapshot(opt) == before


@richest
def test_state_that_is_deleted_starts_anew(case, backend):
    here, there = both(case, network())
    for at, inputs in enumerate(batches(5)):
        for model, opt in (here, there):
            if at == 2:
                opt.state.pop(model[0].weight, None)
            if at == 3:
                opt.state.clear()
            step(model, opt, inputs)
    assert_same(*here, *there)
