from typing import Any

import torch

from . import FLAG, ZERO_OR_UNIT, Between, Options, Slot, Table


class EpsInsideSqrt(torch.optim.RMSprop):
    """p -= lr * g / sqrt(v + eps), written out."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            alpha, sign = group["alpha"], -1 if group["maximize"] else 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                for key in ("square_avg", "grad_avg", "momentum_buffer"):
                    state.setdefault(key, torch.zeros_like(p))
                state.setdefault("step", torch.tensor(0.0)).add_(1)  # others may share it
                g = sign * p.grad
                if group["weight_decay"]:  # as torch: zero times infinity is no number
                    g = g + group["weight_decay"] * p
                v = state["square_avg"].mul_(alpha).add_((1 - alpha) * g * g)
                if group["centered"]:
                    a = state["grad_avg"].lerp_(g, 1 - alpha)
                    v = v.addcmul(a, a, value=-1)  # as torch: the square does not overflow
                g = g / (v + group["eps"]).sqrt()
                if group["momentum"] > 0:
                    g = state["momentum_buffer"].mul_(group["momentum"]).add_(g)
                p.sub_(group["lr"] * g)


def settle(options: Options) -> None:
    if options.pop("eps_inside_sqrt"):
        options |= {"eps_inside_sqrt": True, "eps": 1e-3}
        options.pop("l1", None)


def is_plain(group: Options) -> bool:
    """Of a centered group the variance is a small difference: with codes it would be negative."""
    return not group.get("centered")


TABLE = Table(
    "RMSprop",
    cases=[
        {},
        {"lr": 0.1, "alpha": 0.4, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.05, "momentum": 0.9},
        {"lr": 0.05, "centered": True, "alpha": 0.9},
        {"lr": 0.05, "centered": True, "alpha": 0.5, "momentum": 0.5, "weight_decay": 0.1},
        {"lr": torch.tensor(0.05), "centered": True, "momentum": 0.5, "maximize": True},
        {"lr": 0.05, "l1": 0.02},
        {"lr": 0.05, "eps": 0.01, "eps_inside_sqrt": True, "centered": True, "momentum": 0.5},
    ],
    richest={"lr": 0.05, "centered": True, "momentum": 0.5, "weight_decay": 0.1},
    slots={
        "square_avg": Slot(coded=is_plain, unsigned=True),
        "grad_avg": Slot(lambda group: group.get("centered"), coded=is_plain),
        "momentum_buffer": Slot(lambda group: group.get("momentum", 0) > 0),
    },
    required="square_avg",
    numbers=("lr", "alpha", "eps", "weight_decay", "momentum"),
    extras=("eps_inside_sqrt",),
    oracle=lambda options: EpsInsideSqrt if options.get("eps_inside_sqrt") else None,
    drawn={
        "alpha": (0.99, 0.9, 0.5),
        "eps": (1e-8, 1e-3),
        "centered": (False, False, True),
        "momentum": (0.0, 0.9),
        "eps_inside_sqrt": (False, False, False, False, True),
    },
    mild={
        "alpha": Between(0.6, 0.99),
        "centered": FLAG,
        "momentum": ZERO_OR_UNIT,
        "eps_inside_sqrt": FLAG,
    },
    settle=settle,
    extremes=[
        {"alpha": 0.99999},
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"eps": 1e-30},
        {"eps": 0.0},
        {"eps": 1e-30, "eps_inside_sqrt": True},
        {"lr": 1e10, "momentum": 0.99999},
    ],
)
