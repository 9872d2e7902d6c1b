"""Adadelta."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import FusedOptimizer
from .rule import Group, Rule, Shared, Slot, number, penalized_grad, penalty_numbers

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _update(
    group: Group,
    step: float | Tensor,
    param: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    acc_delta: Tensor,
) -> tuple[Tensor, ...]:
    lr, rho, eps = number(group["lr"]), group["rho"], group["eps"]
    grad = penalized_grad(group, grad, param)
    square_avg = rho * square_avg + (1 - rho) * grad * grad
    delta = (acc_delta + eps).sqrt() / (square_avg + eps).sqrt() * grad
    acc_delta = rho * acc_delta + (1 - rho) * delta * delta
    return param - lr * delta, square_avg, acc_delta


def _numbers(group: Group, step: float) -> dict[str, float]:
    return {
        "lr": group["lr"],
        "1 - rho": 1 - group["rho"],
        **penalty_numbers(group),
    }


RULE = Rule(
    name="adadelta",
    slots=(Slot("square_avg", unsigned=True), Slot("acc_delta", unsigned=True)),
    update=_update,
    numbers=_numbers,
)


class Adadelta(FusedOptimizer, torch.optim.Adadelta):
    r"""Adadelta: steps as large as the last ones were, relative to the gradients.

    .. math::
        g_t &\leftarrow g_t + \lambda\theta_{t-1} + \lambda_1\,\mathrm{sign}(\theta_{t-1}),
        \qquad v_t = \rho v_{t-1} + (1-\rho) g_t^2 \\
        d_t &= \frac{\sqrt{u_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}}\,g_t, \qquad
        u_t = \rho u_{t-1} + (1-\rho) d_t^2, \qquad
        \theta_t = \theta_{t-1} - \gamma d_t

    Source: Zeiler, *ADADELTA: An Adaptive Learning Rate Method* (arXiv:1212.5701).

    Args:
        {params}
        lr (float or Tensor of one element): factor :math:`\gamma` of the step (default: 1.0).
        rho (float): decay of the averages, in [0, 1] (default: 0.9).
        eps (float): added under both roots (default: 1e-6).
        weight_decay (float): L2 coefficient :math:`\lambda` (default: 0).
        foreach: accepted and stored as torch does; the update is always fused.
        {capturable}
        {maximize}
        {differentiable}
        {shared}

    State per parameter: ``step`` (0-dim), ``square_avg`` and ``acc_delta``, of the parameter's
    dtype, shape and strides. float16 and bfloat16 are computed in float32.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: at ``step()``, a gradient is sparse.

    Differences from torch.optim: the options
    {options};
    a ``step`` that a float32 can no longer count goes on as float64; averages keep the dtype they
    were saved in.
    """

    _rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(
            params,
            lr,
            rho,
            eps,
            weight_decay,
            foreach,
            capturable=capturable,
            maximize=maximize,
            differentiable=differentiable,
        )
        self._finish_init(shared)
