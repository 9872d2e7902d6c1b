"""``ema=``: parameters that hold their averages for a while, and averages of idle parameters."""

from __future__ import annotations

import torch
from cases import bits, gradient_like
from torch import nn


def make_model(dtype=torch.float32):
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, 2)).to(dtype)


def draw_grads(params):
    for p in params:
        p.grad = gradient_like(p.detach())


def train(case, model, steps=3, **options):
    opt = case.ours(model.parameters(), ema=0.5, **options)
    for _ in range(steps):
        draw_grads(model.parameters())
        opt.step()
    return opt


def weights(model):
    return [bits(p) for p in model.parameters()]
