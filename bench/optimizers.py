"""The optimizers under test, and the ways in which stock torch can run each of them."""

from __future__ import annotations

import inspect

import torch

NAMES = {name.lower(): name for name in ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad")}


def stock_modes(name: str) -> dict[str, dict[str, bool]]:
    """Constructor arguments of every implementation in `torch.optim.<name>`, slowest first."""
    parameters = inspect.signature(getattr(torch.optim, name)).parameters
    fused = "fused" in parameters
    modes = {
        "forloop": {"foreach": False, "fused": False} if fused else {"foreach": False},
        "foreach": {"foreach": True},
    }
    return modes | {"fused": {"fused": True}} if fused else modes


def best_stock_mode(name: str) -> tuple[str, dict[str, bool]]:
    """What torch recommends: `fused` where the class has it, else `foreach`."""
    return list(stock_modes(name).items())[-1]
