"""State dicts, files and live state that somebody damaged: an error that changes nothing, or a step
that every backend and torch agree on. Never a crash."""

from __future__ import annotations

from typing import Any

import torch
from cases import Case, leaf, snapshot
from torch import Tensor

import fusedopt

NATIVE = fusedopt.backend.native
# What a bad value may raise. A missing option is a KeyError, as in torch; numbers that no
# constructor takes may divide by zero or overflow in Python, as in torch.
REFUSALS = (TypeError, ValueError, RuntimeError, KeyError, ArithmeticError)


def trained(case: Case, stored: dict[str, Any], number: int) -> tuple[list[Tensor], Any]:
    """Two steps of an optimizer with two groups, and the gradients of a third."""
    generator = torch.Generator().manual_seed(number)
    dtype = torch.bfloat16 if set(stored) & {"master_weights", "rounding"} else torch.float32
    shapes = [(5,), (4099,), (2, 3)] if stored.get("state_dtype") == "8bit" else [(5,), (), (2, 3)]
    params = [leaf(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    opt = case.ours([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], **stored)
    for step in range(3):
        for p in params:
            p.grad = (torch.randn(p.shape, generator=generator) + 3).to(dtype)
        if step < 2:
            opt.step()
    return params, opt


def refused(action: Any, opt: Any) -> str | None:
    """The error of an action, which then has changed nothing; None if there is none."""
    before = snapshot(opt)
    try:
        action()
    except REFUSALS as error:
        assert len(str(error)) > 10, repr(error)
        assert same(snapshot(opt), before), f"{error!r}, but something has changed"
        return f"{type(error).__name__}: {error}"
    return None


def same(a: Any, b: Any) -> bool:
    """Equality of snapshots with NaNs and arrays in them."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or repr(a) == repr(b)


def numbers(opt: Any) -> list[Tensor]:
    return [p.detach().double() for group in opt.param_groups for p in group["params"]]


def agree(one: Any, other: Any, tolerance: float = 1e-3) -> None:
    """Where both are numbers: with hostile options 0/0 may be a rounding away."""
    for a, b in zip(numbers(one), numbers(other), strict=True):
        both = a.isfinite() & b.isfinite() & (a.abs() < 1e3)
        torch.testing.assert_close(a[both], b[both], rtol=tolerance, atol=tolerance)
