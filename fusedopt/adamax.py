"""Adamax."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import FusedOptimizer
from .rule import (
    Group,
    Rule,
    Shared,
    Slot,
    bias_corrections,
    number,
    penalized_grad,
    penalty_numbers,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _update(
    group: Group,
    step: float | Tensor,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_inf: Tensor,
) -> tuple[Tensor, ...]:
    lr, (beta1, beta2) = number(group["lr"]), group["betas"]
    grad = penalized_grad(group, grad, param)
    exp_avg = exp_avg.lerp(grad, 1 - beta1)
    exp_inf = (beta2 * exp_inf).maximum(grad.abs() + group["eps"])
    return param - lr / (1 - beta1**step) * exp_avg / exp_inf, exp_avg, exp_inf


def _numbers(group: Group, step: float) -> dict[str, float]:
    beta1, beta2 = group["betas"]
    return {
        "lr / (1 - betas[0] ** step)": group["lr"] / bias_corrections((beta1,), step)[0],
        "1 - betas[0]": 1 - beta1,
        **penalty_numbers(group),
    }


RULE = Rule(
    name="adamax",
    slots=(Slot("exp_avg"), Slot("exp_inf", unsigned=True)),
    update=_update,
    numbers=_numbers,
)


class Adamax(FusedOptimizer, torch.optim.Adamax):
    r"""Adamax: Adam with the largest decayed gradient in place of the mean square.

    .. math::
        g_t &\leftarrow g_t + \lambda\theta_{t-1} + \lambda_1\,\mathrm{sign}(\theta_{t-1}) \\
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad
        u_t = \max(\beta_2 u_{t-1},\; |g_t| + \epsilon) \\
        \theta_t &= \theta_{t-1} - \frac{\gamma}{1-\beta_1^t}\,\frac{m_t}{u_t}

    Source: Kingma & Ba, *Adam: A Method for Stochastic Optimization* (arXiv:1412.6980), section 7.

    Args:
        {params}
        lr (float or Tensor of one element): step size :math:`\gamma` (default: 2e-3).
        betas (pair of float): decay of the average and of the maximum, in [0, 1)
            (default: (0.9, 0.999)).
        eps (float): added to the absolute gradient (default: 1e-8).
        weight_decay (float): L2 coefficient :math:`\lambda` (default: 0).
        foreach: accepted and stored as torch does; the update is always fused.
        {maximize}
        {differentiable}
        {capturable}
        {shared}

    State per parameter: ``step`` (0-dim), ``exp_avg`` and ``exp_inf``, of the parameter's dtype,
    shape and strides. float16 and bfloat16 are computed in float32.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: at ``step()``, a gradient is sparse.

    Differences from torch.optim: the options
    {options};
    a ``step`` that a float32 can no longer count goes on as float64; state keeps the dtype it was
    saved in.
    """

    _rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )
        self._finish_init(shared)
