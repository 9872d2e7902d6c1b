"""The optimizer in the backward: the bits of the ordinary one, without its gradients."""

from __future__ import annotations

import copy

import seam
import torch
from cases import Case, same_bits, snapshot
from torch import nn

import fusedopt

ADAMW = Case("AdamW", {"lr": 0.1})


def attach(case, params, **more):
    """As ``case.ours``, in the backward."""
    options = {**copy.deepcopy(case.options), **more}
    return fusedopt.attach(params, getattr(fusedopt, case.name), **options)


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()


def batches(count=4):
    return [torch.randn(6, 4, dtype=torch.float64) for _ in range(count)]


def loss(model, inputs):
    return model(inputs).square().mean()


def gradients(model):
    return [p.grad for p in model.parameters() if p.grad is not None]


def step(model, opt, inputs):
    """One round of a loop that does not know whether the optimizer is in the backward."""
    opt.zero_grad()
    loss(model, inputs).backward()
    assert not seam.is_attached(opt) or not gradients(model)
    opt.step()


def assert_same(model, opt, other_model, other):
    """Parameters, buffers, state and groups, bit for bit."""
    assert snapshot(opt) == snapshot(other)
    there = other_model.state_dict()
    assert all(same_bits(value, there[name]) for name, value in model.state_dict().items())


def both(case, model, *, groups=lambda model: model.parameters(), **more):
    """(model, optimizer), attached and ordinary, from the same weights."""
    twin = copy.deepcopy(model)
    ours = case.ours(groups(twin), **copy.deepcopy(more))
    return (model, attach(case, groups(model), **more)), (twin, ours)
