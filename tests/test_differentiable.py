"""Gradients of a differentiable step in float64 are those of the equations, to its roundings."""

from __future__ import annotations

import pytest
import torch
from cases import RICHEST, Case, assert_near, richest_by_options

FEW = [
    *RICHEST,
    Case("Adam", {"lr": 0.1, "betas": (torch.tensor(0.9), torch.tensor(0.999))}),
    Case("Adagrad", {"lr": torch.tensor(0.1, dtype=torch.float64), "lr_decay": 0.3}),
    Case("RMSprop", {"lr": 0.1, "alpha": 0.9}),
]
STEPS = 5


def equations(case, p, grads):
    """The parameter after all steps, with every count and power of it in Python's float."""
    o = {"momentum": 0.0, "nesterov": False, "centered": False, "amsgrad": False, "alpha": 0.99}
    o |= {"betas": (0.9, 0.999), "lr_decay": 0.0, "weight_decay": 0.0}
    o |= {"eps": 1e-10 if case.name == "Adagrad" else 1e-8} | case.options
    lr, wd, (b1, b2) = float(o["lr"]), o["weight_decay"], map(float, o["betas"])
    a = b = c = torch.zeros_like(p)
    for t, grad in enumerate(grads, 1):
        if case.name == "AdamW":
            p = p * (1 - lr * wd)
        g = grad if case.name == "AdamW" else grad + wd * p
        if case.name == "SGD":
            a = g.detach() if t == 1 else o["momentum"] * a + g
            p = p - lr * (g + o["momentum"] * a)
        elif case.name == "Adagrad":
            a = a + g * g
            p = p - lr / (1 + (t - 1) * o["lr_decay"]) * g / (a.sqrt() + o["eps"])
        elif case.name == "RMSprop":
            a, b = o["alpha"] * a + (1 - o["alpha"]) * g * g, b + (1 - o["alpha"]) * (g - b)
            d = g / ((a - b * b if o["centered"] else a).sqrt() + o["eps"])
            c = o["momentum"] * c + d
            p = p - lr * c
        else:
            a, b = a + (1 - b1) * (g - a), b2 * b + (1 - b2) * g * g
            c = torch.maximum(c, b) if o["amsgrad"] else b
            p = p - lr / (1 - b1**t) * a / ((c / (1 - b2**t)).sqrt() + o["eps"])
    return p


@pytest.mark.parametrize("case", FEW, ids=str)
def test_gradients_through_some_steps(case, backend):
    start = torch.rand(6, dtype=torch.float64)
    slopes = [torch.rand(6, dtype=torch.float64) + 0.5 for _ in range(STEPS)]
    results = []
    for ours in (True, False):
        inputs = [t.clone().requires_grad_() for t in (start, *slopes)]
        p, *grads = (t.clone() for t in inputs)
        if ours:
            opt = case.ours([p], differentiable=True)
            for grad in grads:
                p.grad = grad
                opt.step()
        else:
            p = equations(case, p, grads)
        results.append([p.detach(), *torch.autograd.grad(p.square().sum(), inputs)])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-11, atol=1e-11)


@richest_by_options
def test_float32_is_no_further_than_its_roundings(case, backend):
    """And the parameter, its gradients and the state keep their dtype."""
    start = torch.rand(6)
    slopes = [torch.rand(6) + 0.5 for _ in range(STEPS)]
    inputs = [t.clone().requires_grad_() for t in (start, *slopes)]
    p, *grads = (t.clone() for t in inputs)
    opt = case.ours([p], differentiable=True)
    for grad in grads:
        p.grad = grad
        opt.step()
    assert p.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in opt.state[p].values())
    exact = equations(case, start.double(), [slope.double() for slope in slopes])
    assert_near(p.detach(), exact)
