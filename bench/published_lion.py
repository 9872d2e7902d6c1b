"""Lion as published, by torch's operators: what it is compared with, since torch.optim has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import ParamsT


class Lion(torch.optim.Optimizer):
    """Program 1 of arXiv:2302.06675: a loop over the parameters, or one over its operators."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        foreach: bool = False,
    ):
        hyperparameters = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, {**hyperparameters, "foreach": foreach})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                if not self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param)
            averages = [self.state[param]["exp_avg"] for param in params]
            if group["foreach"]:
                _update_together(group, params, averages)
            else:
                for param, exp_avg in zip(params, averages, strict=True):
                    _update(group, param, exp_avg)


def _update(group: dict[str, Any], param: torch.Tensor, exp_avg: torch.Tensor) -> None:
    lr, (beta1, beta2), grad = group["lr"], group["betas"], param.grad
    assert grad is not None
    if group["weight_decay"]:
        param.mul_(1 - lr * group["weight_decay"])
    param.add_((exp_avg * beta1).add_(grad, alpha=1 - beta1).sign_(), alpha=-lr)
    exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)


def _update_together(
    group: dict[str, Any], params: list[torch.Tensor], averages: list[torch.Tensor]
) -> None:
    lr, (beta1, beta2), grads = group["lr"], group["betas"], [param.grad for param in params]
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    directions = torch._foreach_mul(averages, beta1)
    torch._foreach_add_(directions, grads, alpha=1 - beta1)
    torch._foreach_sign_(directions)
    torch._foreach_add_(params, directions, alpha=-lr)
    torch._foreach_mul_(averages, beta2)
    torch._foreach_add_(averages, grads, alpha=1 - beta2)
