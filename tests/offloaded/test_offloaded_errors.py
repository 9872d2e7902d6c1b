"""What cannot be offloaded, and errors in the middle."""

from __future__ import annotations

import copy
import random
import re

import pytest
import seam
import torch
from attached import attach
from cases import bits, leaf, richest, snapshot
from torch import nn

import fusedopt
from offloaded import ADAMW, assert_same, batches, both, faulty_links, loss, network, offload, step


class DistributedDataParallel(nn.Sequential):
    """What offload() knows of torch's is its name."""


class OwnStep(fusedopt.SGD):
    def step(self, closure=None):
        raise AssertionError


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "gradients must be one of 'host', 'device', got 'x'", {"gradients": "x"}),
        (ValueError, "overlap must be one of .*None, got True", {"overlap": True}),
        (ValueError, "chunk must be an int of at least 1, got 0", {"chunk": 0}),
        (ValueError, "chunk must be an int of at least 1, got 2.0", {"chunk": 2.0}),
        (ValueError, "keep_below must be an int of at least 0, got -1", {"keep_below": -1}),
        (ValueError, "num_threads must be an int of at least 1, got 0", {"num_threads": 0}),
        (ValueError, "device must be 'cuda' or 'cpu', got 'tpu'", {"device": "tpu"}),
        (ValueError, "no parameter is on a CUDA device .*on: cpu.*steps them", {"device": "cuda"}),
        (ValueError, "group 0: capturable=True does not go", {"capturable": True}),
        (ValueError, "group 0: differentiable=True does not go", {"differentiable": True}),
        (TypeError, "unexpected keyword argument 'chunks'", {"chunks": 3}),
        (TypeError, "takes one of fusedopt's classes.* got 'SGD'", {"cls": torch.optim.SGD}),
        (TypeError, r"OwnStep has a step\(\) of its own", {"cls": OwnStep}),
        (ValueError, "DistributedDataParallel reduces.*device", {"model": DistributedDataParallel}),
        (ValueError, "forward.*needs the module", {"overlap": "forward", "model": list}),
        (ValueError, "parameter 0 .*not materialized.*run a forward", {"model": "lazy"}),
    ],
)
def test_what_cannot_be_offloaded(error, message, change):
    model = network()
    wrap = change.get("model", lambda model: model)
    if wrap == "lazy":
        wrapped = nn.LazyLinear(3)
    else:
        wrapped = wrap(model) if wrap is not list else [*model.parameters()]
    change = {"device": "cpu", **{k: v for k, v in change.items() if k != "model"}}
    with pytest.raises(error, match=message):
        fusedopt.offload(wrapped, change.pop("cls", fusedopt.AdamW), **change)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    here, there = both(ADAMW, model)  # nothing is left of it
    for each in (here, there):
        step(*each, batches(1)[0])


def test_a_wrapper_that_reduces_later_may_have_gradients_on_the_device(monkeypatch):
    faulty_links(monkeypatch)
    here, there = both(ADAMW, DistributedDataParallel(network()), gradients="device")
    for inputs in batches(2):
        for each in (here, there):
            step(*each, inputs)
    assert_same(*here, *there)


def test_a_parameter_of_another_optimizer():
    model = network()
    others = [attach(ADAMW, [model[4].weight])]
    for _ in range(2):
        with pytest.raises(ValueError, match="parameter 4 .*attached to another.*detach"):
            offload(ADAMW, model)
        fusedopt.detach(others.pop())
        others.append(offload(ADAMW, [model[4].weight]))
        with pytest.raises(ValueError, match="parameter 0 .*attached to another.*detach"):
            attach(ADAMW, [model[4].weight])


@pytest.mark.parametrize("way", [{}, {"overlap": None}, {"max_grad_norm": 1.0}], ids=str)
def test_parameters_of_other_kinds_stay(way, monkeypatch):
    """Complex ones are stepped where they are, those of integers are not."""
    links = faulty_links(monkeypatch)
    made = []
    for build in (lambda params, **more: offload(ADAMW, params, **more), ADAMW.ours):
        torch.manual_seed(1)
        params = [
            leaf(torch.randn(8, dtype=torch.complex64)),
            nn.Parameter(torch.arange(8), requires_grad=False),
            leaf(torch.randn(4, 8)[:, ::2]),
            leaf(torch.randn(8)),
        ]
        options = way if len(made) == 0 else {k: v for k, v in way.items() if k != "overlap"}
        opt = build(params, **options)
        for _ in range(3):
            opt.zero_grad()
            (sum(p.abs().square().sum() for p in params if p.requires_grad)).backward()
            opt.step()
        made.append(snapshot(opt)[:2])
    assert made[0] == made[1] and links[0].copies


@pytest.mark.parametrize("when", ["at first", "later"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_no_memory_to_be_had(when, after, monkeypatch):
    links = faulty_links(monkeypatch)
    model = network()
    here, there = both(ADAMW, model, groups=lambda model: model[0].parameters(), chunk=1)
    make = type(links[0]).memory
    left = [after]

    def memory(self, size):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("no memory can be pinned")
        return make(self, size)

    with monkeypatch.context() as patch:
        patch.setattr(type(links[0]), "memory", memory)
        with pytest.raises(RuntimeError, match="no memory can be pinned"):
            if when == "at first":
                offload(ADAMW, model[2:], chunk=1)
            else:
                here[1].add_param_group({"params": model[2].parameters()})
    assert len(here[1].param_groups) == 1
    assert not any(p._post_accumulate_grad_hooks for p in model[2].parameters())
    for at, inputs in enumerate(batches(3)):
        for each, opt in (here, there):
            each[2].requires_grad_(at > 0)
            if at == 1:
                opt.add_param_group({"params": each[2].parameters()})
            step(each, opt, inputs)
    assert_same(*here, *there)


@pytest.mark.parametrize("way", [{}, {"overlap": None}, {"gradients": "device"}], ids=str)
@pytest.mark.parametrize("steps", [0, 2])
def test_an_option_that_is_no_number(steps, way, monkeypatch):
    faulty_links(monkeypatch)
    groups = lambda model: [{"params": part.parameters()} for part in (model[4], model[0])]  # noqa: E731
    (model, opt), (twin, other) = both(ADAMW, network(), groups=groups, chunk=1, **way)
    inputs = batches(steps + 1)
    for each in inputs[:steps]:
        step(model, opt, each)
        step(twin, other, each)
    before = snapshot(opt)
    opt.param_groups[1]["lr"] = "fast"
    with pytest.raises(TypeError, match="group 1: 'lr' must be a number.*got 'fast'"):
        step(model, opt, inputs[-1])
    opt.param_groups[1]["lr"] = 0.1
    assert snapshot(opt) == before
    step(model, opt, inputs[-1])
    step(twin, other, inputs[-1])
    assert_same(model, opt, twin, other)


@richest
def test_an_error_on_the_host(case, backend, monkeypatch):
    """Comes out of step(), what is in its chunk is as before, and all goes on."""
    faulty_links(monkeypatch)
    ways = ({}, {"overlap": "forward"}, {"gradients": "device"}, {"max_grad_norm": 1.0})
    way = random.choice(ways)
    model = network()
    opt = offload(case, model, chunk=1, **way)
    first, second, third = batches(3)
    step(model, opt, first)
    opt.synchronize()
    before, weight = [*map(bits, model.parameters())], model[2].weight
    key = next(iter(case.table.slots))
    good = opt.state[weight]
    opt.state[weight] = {**good, key: torch.ones(2, 2)}
    named = re.escape(f"fusedopt.{case.name}, param group 0, parameter 2 (shape (6, 5)")
    with pytest.raises(ValueError, match=rf"{named}.*state\['{key}'\] has shape \(2, 2\)"):
        step(model, opt, second)
        opt.synchronize()
    opt.state[weight] = good
    after = [*map(bits, model.parameters())]
    assert [a == b for a, b in zip(before, after, strict=True)] == [
        False,
        False,
        True,
        False,
        False,
    ]
    twin = network()
    twin.load_state_dict(model.state_dict())
    ordinary = {name: value for name, value in way.items() if name == "max_grad_norm"}
    other = case.ours(twin.parameters(), **ordinary)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for each in ((model, opt), (twin, other)):
        step(*each, third)
    assert_same(model, opt, twin, other)


@pytest.mark.parametrize("gradients", ["host", "device"])
def test_a_step_again_after_an_error(gradients, native, monkeypatch):
    """What was wrong is put right, the gradients are still there, and each counts once."""
    faulty_links(monkeypatch)
    here, there = both(ADAMW, network(), gradients=gradients, chunk=1, overlap="forward")
    model, opt = here
    first, second = ([torch.randn_like(p) for p in model.parameters()] for _ in range(2))
    for each, its in (here, there):
        for param, grad in zip(each.parameters(), first, strict=True):
            param.grad = grad.clone()
        if its is there[1]:
            its.step()
    with seam.failing_on_the_host(opt, model[0].weight, ZeroDivisionError("in the worker")):
        opt.step()
        seam.finish_worker(opt)
    for each, _ in (here, there):
        for param, grad in zip(each.parameters(), second, strict=True):
            param.grad = grad.clone()
    with pytest.raises(ZeroDivisionError, match="in the worker"):
        opt.step()
    opt.step()
    there[1].step()
    opt.synchronize()
    assert opt.state[model[0].weight]["step"] == 1
    ours, theirs = ([*map(bits, each.parameters())] for each, _ in (here, there))
    assert ours[1:] == theirs[1:] and ours[0] != theirs[0]


def test_a_second_backward_before_the_step(native, monkeypatch):
    """Where gradients wait on the host, it has no sum to add to."""
    faulty_links(monkeypatch)
    here, there = both(ADAMW, network(), max_grad_norm=0.01)
    model, opt = here
    first, second, third = batches(3)
    loss(model, first).backward()
    with pytest.raises(RuntimeError, match=r"parameter \d.*second backward.*accumulating\(\)"):
        loss(model, second).backward()
    opt.zero_grad()
    for each in (here, there):
        step(*each, third)
    assert_same(*here, *there)


def test_every_backward_is_a_step(native, monkeypatch):
    """Where they do not wait; also of a graph that is kept, if it did not save the parameters."""
    faulty_links(monkeypatch)
    values, inputs = torch.randn(3, 4), torch.randn(3, 4)
    params, others = ([leaf(values), leaf(values[0, :2])] for _ in range(2))
    opt, ordinary = offload(ADAMW, params), ADAMW.ours(others)
    graph = (params[0] * inputs).sum() + (params[1] * inputs[0, :2]).sum()
    for _ in range(3):
        graph.backward(retain_graph=True)
        for other, grad in zip(others, (inputs, inputs[0, :2]), strict=True):
            other.grad = grad.clone()
        ordinary.step()
    opt.step()
    assert snapshot(opt) == snapshot(ordinary)


@pytest.mark.parametrize("way", [{"overlap": None}, {"max_grad_norm": 1.0}, {}], ids=str)
def test_a_backward_that_fails(way, native, monkeypatch):
    """After zero_grad() nothing is left of it, but of chunks that were stepped already."""
    faulty_links(monkeypatch)
    here, there = both(ADAMW, network(), **way)
    (model, opt), inputs = here, batches(3)
    step(model, opt, inputs[0])
    step(*there, inputs[0])

    def fail(grad):
        raise ZeroDivisionError

    output = model[:2](inputs[1])
    output.register_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model[2:](output).sum().backward()
    opt.zero_grad()
    for each in (here, there):
        step(*each, inputs[2])
    assert_same(*here, *there)


def test_groups_that_are_changed_by_hand_are_an_error(monkeypatch):
    faulty_links(monkeypatch)
    model = network()
    opt = offload(ADAMW, [{"params": [p]} for p in model.parameters()], chunk=1)
    before, groups = snapshot(opt), opt.param_groups.copy()
    opt.param_groups.reverse()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no longer where it was in param_groups; detach"):
            step(model, opt, *batches(1))
    opt.param_groups[:] = groups
    opt.zero_grad()
    opt.synchronize()
    assert snapshot(opt) == before
