"""Tensors that share memory: each parameter is updated in the order of the groups, as a loop over
them would, whatever overlaps with what. Nothing depends on the number of threads."""

from __future__ import annotations

import random

import torch
from cases import assert_near, gradient_like
from torch import Tensor


def rand(*shape, dtype=torch.float64) -> Tensor:
    """Wide enough that rounding does not hide which value was read."""
    return torch.randn(*shape, dtype=dtype)


def both(build, seed: int):
    """Twice the same tensors, each with its aliases."""
    made = []
    for _ in range(2):
        torch.manual_seed(seed)
        made.append(build())
    return made


def near(ours: Tensor, theirs: Tensor, what: str, dtype) -> None:
    """Who reads another value is off by about 1. Where the variance of a centered RMSprop is nearly
    zero, a rounding of float64 becomes more than what float64 is compared with elsewhere."""
    if dtype is None and ours.dtype == torch.float64:
        ours, theirs = (t.detach().to(torch.float64, copy=True) for t in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=lambda m: f"{what}: {m}")
    else:
        assert_near(ours, theirs, what, dtype)


def compare(case, build, steps: int = 3, dtype=None, **options) -> None:
    """``build`` returns parameters, a function that sets their gradients, and the memory that all
    of this is in."""
    seed = random.randrange(2**31)
    (ours, our_grads, our_memory), (theirs, their_grads, their_memory) = both(build, seed)
    opt, stock = case.ours(groups(ours), **options), case.stock(groups(theirs))
    for at in range(steps):
        torch.manual_seed(at)
        our_grads(at)
        torch.manual_seed(at)
        their_grads(at)
        opt.step()
        stock.step()
    for i, (mine, other) in enumerate(zip(our_memory, their_memory, strict=True)):
        near(mine, other, f"memory {i}", dtype)
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        near(p, q, f"parameter {i}", dtype)
        for key, value in opt.state[p].items():
            if isinstance(value, Tensor) and key in stock.state[q]:
                near(value, stock.state[q][key], f"{key} of parameter {i}", dtype)


def groups(params):
    """The last parameters in a group of their own."""
    half = (len(params) + 1) // 2
    return [{"params": part} for part in (params[:half], params[half:]) if part]


def leaf_of(view: Tensor) -> Tensor:
    return view.detach().requires_grad_()


def fresh(*params: Tensor):
    def set_grads(at: int) -> None:
        for p in params:
            p.grad = gradient_like(p)

    return set_grads
