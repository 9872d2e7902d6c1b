"""RAdam."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import FusedOptimizer
from .rule import Group, Rule, Shared, Slot, bias_corrections, number, penalized, penalty_numbers

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _update(
    group: Group,
    step: float | Tensor,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
) -> tuple[Tensor, ...]:
    lr, eps, (beta1, beta2) = number(group["lr"]), group["eps"], group["betas"]
    grad, param = penalized(group, grad, param, group["decoupled_weight_decay"])
    exp_avg = exp_avg.lerp(grad, 1 - beta1)
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    mean, denom = exp_avg / (1 - beta1**step), exp_avg_sq.sqrt() + eps
    correction2 = 1 - beta2**step
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / correction2
    if isinstance(rho, Tensor):
        factor = _rectification(rho.clamp(min=5.0), rho_inf) * correction2**0.5
        update = torch.where(rho > 5.0, mean * factor / denom, mean).to(param.dtype)
    elif rho > 5.0:
        update = mean * (_rectification(rho, rho_inf) * correction2**0.5) / denom
    else:
        update = mean
    return param - lr * update, exp_avg, exp_avg_sq


def _rectification(rho: float | Tensor, rho_inf: float) -> float | Tensor:
    square = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    root: float | Tensor = square**0.5
    return root


def _numbers(group: Group, step: float) -> dict[str, float]:
    lr, (beta1, beta2) = group["lr"], group["betas"]
    return {
        "lr / (1 - betas[0] ** step)": lr / bias_corrections(group["betas"], step)[0],
        "1 - betas[0]": 1 - beta1,
        "1 - betas[1]": 1 - beta2,
        **penalty_numbers(group, group["decoupled_weight_decay"]),
    }


RULE = Rule(
    name="radam",
    slots=(Slot("exp_avg"), Slot("exp_avg_sq", unsigned=True)),
    update=_update,
    numbers=_numbers,
    # What a step does not use is multiplied with 0 there: a square beyond the range becomes NaN.
    stock_over_lists_is_right=False,
)


class RAdam(FusedOptimizer, torch.optim.RAdam):
    r"""RAdam: Adam that begins as momentum, until the second moment can be trusted.

    With the moments of :class:`Adam`:

    .. math::
        \rho_\infty &= \frac{2}{1-\beta_2} - 1, \qquad
        \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1-\beta_2^t}, \qquad
        \hat m_t = \frac{m_t}{1-\beta_1^t} \\
        \theta_t &= \theta_{t-1} - \gamma\,\hat m_t \cdot
        \sqrt{\frac{(\rho_t-4)(\rho_t-2)\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\rho_t}}\,
        \frac{\sqrt{1-\beta_2^t}}{\sqrt{v_t}+\epsilon} \quad\text{if } \rho_t > 5, \quad
        \text{else}\quad \theta_{t-1} - \gamma\,\hat m_t

    Source: Liu et al., *On the Variance of the Adaptive Learning Rate and Beyond*
    (arXiv:1908.03265).

    Args:
        {params}
        lr (float or Tensor of one element): step size :math:`\gamma` (default: 1e-3).
        betas (pair of float): decay of the two averages, in [0, 1) (default: (0.9, 0.999)).
        eps (float): added to the root (default: 1e-8).
        weight_decay (float): L2 coefficient :math:`\lambda` (default: 0).
        decoupled_weight_decay (bool): apply the penalties to the parameter, as AdamW
            (default: False).
        foreach: accepted and stored as torch does; the update is always fused.
        {maximize}
        {capturable}
        {differentiable}
        {shared}

    State per parameter: ``step`` (0-dim), ``exp_avg`` and ``exp_avg_sq``, of the parameter's dtype,
    shape and strides. float16 and bfloat16 are computed in float32.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: at ``step()``, a gradient is sparse.

    Differences from torch.optim: the options
    {options};
    a ``step`` that a float32 can no longer count goes on as float64; moments keep the dtype they
    were saved in.
    """

    _rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
        self._finish_init(shared)
