"""What happens to an attached optimizer in the middle of a backward, while gradients wait."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import bits, same_bits, snapshot
from torch import nn

import fusedopt
from attached import ADAMW, assert_same, attach, batches, gradients, loss, step

# Two layers of 16 values are together, in float64.
TOGETHER = 256


def layers():
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(6))).double()


class Midway(torch.autograd.Function):
    """The identity; calls something in the backward."""

    @staticmethod
    def forward(ctx, x, call):
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.call()
        return grad, None


def backward_with(model, inputs, call, at):
    """Calls it when the gradients of the layers from ``at`` on are there."""
    x = inputs
    for i, layer in enumerate(model):
        x = layer(Midway.apply(x, call) if i == at else x)
    x.square().mean().backward()


@pytest.fixture(params=[0, 2], ids=["at once", "planned"])
def pair(request, backend):
    """(model, attached), (model, ordinary), before and after they have plans."""
    model = layers()
    twin = copy.deepcopy(model)
    here = model, attach(ADAMW, model, bucket_bytes=TOGETHER)
    there = twin, ADAMW.ours(twin.parameters())
    for inputs in batches(request.param):
        for each in (here, there):
            step(*each, inputs)
    return here, there


def changed(model, before):
    return [bits(p) != b for p, b in zip(model.parameters(), before, strict=True)]


def fail():
    raise ZeroDivisionError("midway")


@pytest.mark.parametrize("at", [1, 2])
def test_an_error_of_the_backward(at, pair):
    """Buckets that were full are updated, the others are as before; their gradients are there."""
    (model, opt), (twin, other) = pair
    before = [*map(bits, model.parameters())]
    with pytest.raises(ZeroDivisionError, match="midway"):
        backward_with(model, batches(1)[0], fail, at)
    assert changed(model, before) == [i >= 2 for i in range(6)]
    assert [p.grad is not None for p in model.parameters()] == [at <= i < 2 for i in range(6)]
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.zero_grad()
    for inputs in batches(2):
        for each in pair:
            step(*each, inputs)
    assert_same(model, opt, twin, other)


def test_what_an_error_left_over_is_for_step(pair):
    (model, opt), _ = pair
    with pytest.raises(ZeroDivisionError):
        backward_with(model, batches(1)[0], fail, 1)
    before = [*map(bits, model.parameters())]
    opt.step()
    assert changed(model, before) == [i == 1 for i in range(6)]


def test_an_error_of_the_last_step(pair):
    """Which is taken when the backward has ended."""
    (model, opt), _ = pair
    backward_with(model, batches(1)[0], int, 1)
    good = opt.state[model[1].weight]
    opt.state[model[1].weight] = {**good, "exp_avg": torch.ones(2, 2, dtype=torch.float64)}
    before = [*map(bits, model.parameters())]
    x = batches(1)[0]
    with pytest.raises(ValueError, match=r"parameter 1.*state\['exp_avg'\] has shape \(2, 2\)"):
        # Of the last bucket only one has a gradient.
        loss(model[1:], x).backward()
    assert changed(model, before) == [i >= 2 for i in range(6)]
    assert model[1].weight.grad is not None


def test_gradients_that_are_changed_moved_or_cleared_while_they_wait(pair):
    (model, opt), (twin, other) = pair
    for change in (
        lambda p: p.grad.mul_(0.5),
        lambda p: setattr(p, "grad", p.grad * 0.5),
        lambda p: setattr(p, "grad", p.grad.t().contiguous().t()),
        lambda p: setattr(p.grad, "data", p.grad.clone()),
        lambda p: setattr(p, "grad", None),
        lambda p: p.grad.zero_(),
    ):
        inputs = batches(1)[0]
        backward_with(model, inputs, lambda change=change: change(model[1].weight), 1)
        assert not gradients(model)
        other.zero_grad()
        loss(twin, inputs).backward()
        change(twin[1].weight)
        other.step()
    assert_same(model, opt, twin, other)


def test_zero_grad(pair):
    """Nothing is stepped whose gradient is gone."""
    (model, opt), _ = pair
    before = bits(model[1].weight)
    backward_with(model, batches(1)[0], opt.zero_grad, 1)
    assert bits(model[1].weight) == before and not gradients(model)


def counts(model, opt):
    return [int(opt.state[p]["step"]) if p in opt.state else 0 for p in model.parameters()]


def test_state_dict(pair):
    """Says what has been stepped. What waits is stepped with the state that is loaded meanwhile."""
    (model, opt), (twin, other) = pair
    before, saved = counts(model, opt), copy.deepcopy(opt.state_dict())
    inputs = batches(1)[0]

    def save_and_load():
        state = opt.state_dict()["state"]
        assert [int(state[i]["step"]) if i in state else 0 for i in range(6)] == [
            count + (i >= 2) for i, count in enumerate(before)
        ]
        opt.load_state_dict(saved)

    backward_with(model, inputs, save_and_load, 1)
    assert counts(model, opt) == [count + (i < 2) for i, count in enumerate(before)]
    other.zero_grad()
    loss(twin, inputs).backward()
    other.step()
    assert all(map(same_bits, model.parameters(), twin.parameters()))


def test_detach(pair):
    """What waits is left to ``step()``."""
    (model, opt), (twin, other) = pair
    inputs = batches(1)[0]
    backward_with(model, inputs, lambda: fusedopt.detach(opt), 1)
    assert [p.grad is not None for p in model.parameters()] == [True] * 2 + [False] * 4
    opt.step()
    other.zero_grad()
    loss(twin, inputs).backward()
    other.step()
    assert_same(model, opt, twin, other)


def test_the_optimizer_goes_away(backend):
    """While gradients wait for it: an error, as in a hook."""
    model = layers()
    keep = [attach(ADAMW, model)]
    with pytest.raises(RuntimeError, match=r"that attach\(\) or offload\(\) returned is gone"):
        backward_with(model, batches(1)[0], keep.clear, 1)


def test_a_backward_within_a_backward(pair):
    """Has an end of its own, at which what it has gathered is stepped."""
    (model, opt), (twin, other) = pair
    spare = nn.Linear(4, 1, bias=False).double()
    opt.add_param_group({"params": spare.parameters()})
    inputs = batches(1)[0]
    seen = []

    def inner():
        with torch.enable_grad():
            spare(inputs).square().mean().backward()
        seen.append((spare.weight.grad, bits(model[1].weight), opt.state[spare.weight]["step"]))

    before = bits(model[1].weight)
    backward_with(model, inputs, inner, 1)
    assert seen == [(None, before, 1)] and not gradients(model)
    other.zero_grad()
    loss(twin, inputs).backward()
    other.step()
    assert all(map(same_bits, model.parameters(), twin.parameters()))


def test_two_backwards_of_one_graph(backend):
    """If it has not saved the parameters, both are steps."""
    values = torch.randn(4, 3)
    here, there = ([nn.Parameter(v.clone()) for v in values] for _ in range(2))
    opt, other = attach(ADAMW, here, bucket_bytes=30), ADAMW.ours(there)
    scale = torch.randn(12)
    kept, expected = ((torch.cat(params) * scale).sum() for params in (here, there))
    for _ in range(3):
        kept.backward(retain_graph=True)
        expected.backward(retain_graph=True)
        other.step()
        other.zero_grad()
    assert snapshot(opt) == snapshot(other)


def test_hooks_called_by_hand(pair):
    """A step of their parameter, at once."""
    (model, opt), (twin, other) = pair
    grad = torch.randn(4, 4, dtype=torch.float64)
    other.zero_grad()
    for each in (model, twin):
        each[2].weight.grad = grad.clone()
    for hook in model[2].weight._post_accumulate_grad_hooks.values():
        hook(model[2].weight)
    assert not gradients(model)
    other.step()
    assert_same(model, opt, twin, other)
