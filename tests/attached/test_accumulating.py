"""Gradients of several backwards in one step: ``optimizer.accumulating()``."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import richest, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedopt
from attached import ADAMW, assert_same, attach, batches, both, gradients, loss, network


class Experts(nn.Module):
    """A batch reaches the trunk and some of the others."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 2) for _ in range(4)])
        self.double()

    def forward(self, inputs, chosen):
        x = self.trunk(inputs).tanh()
        return sum(self.experts[i](x).square().mean() for i in chosen)


def ordinary_round(model, opt, losses):
    opt.zero_grad()
    for each in losses:
        each(model).backward()
    opt.step()


def attached_round(model, opt, losses):
    before = snapshot(opt)
    with opt.accumulating():
        for each in losses[:-1]:
            each(model).backward()
            assert snapshot(opt) == before and gradients(model)
    losses[-1](model).backward()
    assert not gradients(model)


@richest
@pytest.mark.parametrize("bucket_bytes", [0, 100, 2**20])
def test_the_bits_of_the_ordinary_optimizer(case, bucket_bytes, backend):
    """Also of parameters that the last batch does not reach, and of those that none does."""
    model = Experts()
    twin = copy.deepcopy(model)
    here = model, attach(case, model, bucket_bytes=bucket_bytes)
    there = twin, case.ours(twin.parameters())
    for chosen in ([[0, 1], [1], [2, 1]], [[3], [0]], [[1]], [[0, 1, 2], [0]], [[0, 1, 2, 3]]):
        losses = [
            lambda model, inputs=inputs, some=some: model(inputs, some)
            for inputs, some in zip(batches(len(chosen)), chosen, strict=True)
        ]
        attached_round(*here, losses)
        ordinary_round(*there, losses)
        assert_same(*here, *there)


def test_contexts_within_contexts_and_errors_in_them(backend):
    here, there = both(ADAMW, network())
    model, opt = here
    for inputs in zip(*[batches(3)] * 3, strict=True):
        with pytest.raises(ZeroDivisionError), opt.accumulating():
            with opt.accumulating():
                loss(model, inputs[0]).backward()
            loss(model, inputs[1]).backward()
            raise ZeroDivisionError
        loss(model, inputs[2]).backward()
        ordinary_round(*there, [lambda model, i=i: loss(model, i) for i in inputs])
    assert_same(*here, *there)


def test_a_step_inside(backend):
    """``step()`` is ``step()``, and gradients that are cleared are gone."""
    here, there = both(ADAMW, network())
    model, opt = here
    first, second, third, fourth = batches(4)
    with opt.accumulating():
        loss(model, first).backward()
        loss(model, second).backward()
        opt.step()
        opt.zero_grad()
        loss(model, third).backward()
    opt.zero_grad()
    loss(model, fourth).backward()
    for inputs in ([first, second], [fourth]):
        ordinary_round(*there, [lambda model, i=i: loss(model, i) for i in inputs])
    assert_same(*here, *there)


def test_what_is_accumulated_is_left_to_step_if_no_backward_follows(backend):
    here, there = both(ADAMW, network())
    model, opt = here
    inputs = batches(2)
    with opt.accumulating():
        for each in inputs:
            loss(model, each).backward()
    opt.step()
    ordinary_round(*there, [lambda model, i=i: loss(model, i) for i in inputs])
    assert_same(*here, *there)


@pytest.mark.parametrize("attached", [False, True])
def test_an_ordinary_optimizer(attached, backend):
    """Accumulates anyway, also one that was detached inside."""
    model = network()
    opt = attach(ADAMW, model) if attached else ADAMW.ours(model.parameters())
    twin = copy.deepcopy(model)
    other = ADAMW.ours(twin.parameters())
    inputs = batches(3)
    with opt.accumulating():
        loss(model, inputs[0]).backward()
        if attached:
            fusedopt.detach(opt)
    loss(model, inputs[1]).backward()
    assert len(gradients(model)) == 3
    opt.step()
    ordinary_round(twin, other, [lambda model, i=i: loss(model, i) for i in inputs[:2]])
    assert_same(model, opt, twin, other)


@pytest.mark.parametrize("reentrant", [False, True], ids=["replayed", "reentrant"])
def test_checkpointed_segments(reentrant, backend):
    """What the last backward reaches no more is stepped at its end, or in ``step()``."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
            self.spare = nn.Linear(4, 4)
            self.double()

        def forward(self, x, spare):
            x = x.requires_grad_()
            for layer in self.layers:
                x = checkpoint(lambda x, f=layer: f(x).tanh(), x, use_reentrant=reentrant)
            return (self.spare(x) if spare else x).square().mean()

    here, there = both(ADAMW, Checkpointed())
    for inputs in zip(batches(2), batches(2), strict=True):
        losses = [
            lambda model, x=x, spare=spare: model(x, spare)
            for x, spare in zip(inputs, (True, False), strict=True)
        ]
        model, opt = here
        with opt.accumulating():
            losses[0](model).backward()
        losses[1](model).backward()
        assert len(gradients(model)) == (2 if reentrant else 0)
        opt.step()
        opt.zero_grad()
        ordinary_round(*there, losses)
    assert_same(*here, *there)

    # What the last backward has reached is none of the next one's business.
    with opt.accumulating():
        losses[0](model).backward()
    losses[1](model).backward()
    weight = model.layers[0].weight
    weight.grad = by_hand = torch.ones(4, 4, dtype=torch.float64)
    model.layers[1].bias.sum().backward()
    assert weight.grad is by_hand
