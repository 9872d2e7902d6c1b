"""Adam and AdamW."""

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
    lerp_weight,
    number,
    penalized,
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
    exp_avg_sq: Tensor,
    *max_exp_avg_sq: Tensor,
) -> tuple[Tensor, ...]:
    lr, eps = number(group["lr"]), group["eps"]
    beta1, beta2 = map(number, group["betas"])
    grad, param = penalized(group, grad, param, group["decoupled_weight_decay"])
    exp_avg = exp_avg.lerp(grad, lerp_weight(1 - beta1, grad))
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    step_size = lr / (1 - beta1**step)
    largest = tuple(seen.maximum(exp_avg_sq) for seen in max_exp_avg_sq)
    (second_moment,) = largest or (exp_avg_sq,)
    denom = second_moment.sqrt() / (1 - beta2**step) ** 0.5 + eps
    return param - step_size * exp_avg / denom, exp_avg, exp_avg_sq, *largest


def _numbers(group: Group, step: float) -> dict[str, float]:
    corrections = bias_corrections(group["betas"], step)
    lr, (beta1, beta2) = group["lr"], group["betas"]
    return {
        "lr / (1 - betas[0] ** step)": lr / corrections[0],
        "1 - betas[0]": 1 - beta1,
        "1 - betas[1]": 1 - beta2,
        **penalty_numbers(group, group["decoupled_weight_decay"]),
    }


ADAM = Rule(
    name="adam",
    slots=(
        Slot("exp_avg"),
        Slot("exp_avg_sq", unsigned=True),
        Slot("max_exp_avg_sq", unsigned=True, when=lambda group: bool(group["amsgrad"])),
    ),
    update=_update,
    numbers=_numbers,
    sparse_advice=", please consider SparseAdam instead",
)


class Adam(FusedOptimizer, torch.optim.Adam):
    r"""Adam; with ``decoupled_weight_decay=True`` AdamW.

    With gradient :math:`g_t`, step size :math:`\gamma` (``lr``) and :math:`t` counted from 1:

    .. math::
        g_t &\leftarrow g_t + \lambda\theta_{t-1} + \lambda_1\,\mathrm{sign}(\theta_{t-1}) \\
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma\,\frac{m_t / (1-\beta_1^t)}
        {\sqrt{v_t / (1-\beta_2^t)} + \epsilon}

    AMSGrad takes the largest :math:`v` seen so far in the last line.

    Source: Kingma & Ba, *Adam: A Method for Stochastic Optimization* (arXiv:1412.6980); Reddi,
    Kale & Kumar, *On the Convergence of Adam and Beyond* (2018) for ``amsgrad``.

    Args:
        {params}
        lr (float or Tensor of one element): step size (default: 1e-3).
        betas (pair of float or Tensor): decay of the two averages, in [0, 1)
            (default: (0.9, 0.999)).
        eps (float): added to the root (default: 1e-8).
        weight_decay (float): L2 coefficient :math:`\lambda` (default: 0).
        amsgrad (bool): use AMSGrad (default: False).
        foreach, fused: accepted and stored as torch does; the update is always fused.
        {maximize}
        {capturable}
        {differentiable}
        decoupled_weight_decay (bool): apply the penalties to the parameter, as AdamW
            (default: False).
        {shared}

    State per parameter: ``step`` (0-dim), ``exp_avg``, ``exp_avg_sq`` and with amsgrad
    ``max_exp_avg_sq``, of the parameter's dtype, shape and strides. float16 and bfloat16 are
    computed in float32.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: at ``step()``, a gradient is sparse.

    Differences from torch.optim: the options
    {options};
    a ``step`` that a float32 can no longer count goes on as float64; moments keep the dtype they
    were saved in.
    """

    _rule = ADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._finish_init(shared)


class AdamW(Adam, torch.optim.AdamW):
    r"""AdamW: :class:`Adam` with weight decay that does not pass through the moments.

    .. math::
        \theta_{t-1} \leftarrow \theta_{t-1} - \gamma\,(\lambda\theta_{t-1}
        + \lambda_1\,\mathrm{sign}(\theta_{t-1}))

    and then the update of Adam with the plain gradient. Source: Loshchilov & Hutter, *Decoupled
    Weight Decay Regularization* (arXiv:1711.05101).

    Args, state, dtypes and errors are those of :class:`Adam`; ``weight_decay`` is 1e-2 by default.

    Differences from torch.optim: those of :class:`Adam`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        super(FusedOptimizer, self).__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._finish_init(shared)
