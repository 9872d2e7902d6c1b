"""The optimizers under test, and the ways in which stock torch can run each of them."""

from __future__ import annotations

import functools
import inspect

import torch

import fusedopt
from bench import published_lion

# Those that a benchmark tries unless it is told otherwise, to be done in minutes.
WIDELY_USED = ("adam", "adamw", "sgd", "rmsprop", "adagrad")
# By the names of the command line: every class that fusedopt has, those first.
NAMES = dict.fromkeys(WIDELY_USED, "") | {
    name.lower(): name
    for name in sorted(fusedopt.__all__)
    if inspect.isclass(getattr(fusedopt, name))
}


def stock(name: str) -> type[torch.optim.Optimizer]:
    """`torch.optim.<name>`, or the published form of what torch does not have."""
    cls: type[torch.optim.Optimizer] = getattr(torch.optim, name, None) or published_lion.Lion
    return cls


def stock_modes(name: str) -> dict[str, dict[str, bool]]:
    """Constructor arguments of every implementation of `stock(name)`, slowest first."""
    parameters = inspect.signature(stock(name)).parameters
    fused = "fused" in parameters
    modes = {
        "forloop": {"foreach": False, "fused": False} if fused else {"foreach": False},
        "foreach": {"foreach": True},
    }
    return modes | {"fused": {"fused": True}} if fused else modes


@functools.cache
def runs(name: str, mode: str, device: torch.device) -> bool:
    """Whether that mode of `torch.optim.<name>` takes parameters on the device.

    Before torch 2.12, Adagrad's fused mode does not on a GPU.
    """
    param = torch.nn.Parameter(torch.zeros(1, device=device))
    param.grad = torch.zeros_like(param)
    try:
        stock(name)([param], **stock_modes(name)[mode]).step()
    except RuntimeError:
        return False
    return True


def best_stock_mode(name: str) -> tuple[str, dict[str, bool]]:
    """What torch recommends: `fused` where the class has it, else `foreach`."""
    return list(stock_modes(name).items())[-1]
