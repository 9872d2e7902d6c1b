"""Lion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import FusedOptimizer
from .rule import Group, Rule, Shared, Slot, number, penalized, penalty_numbers

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _update(
    group: Group, step: float | Tensor, param: Tensor, grad: Tensor, exp_avg: Tensor
) -> tuple[Tensor, ...]:
    lr, (beta1, beta2) = number(group["lr"]), map(number, group["betas"])
    grad, param = penalized(group, grad, param, is_decoupled=True)
    direction = (beta1 * exp_avg + (1 - beta1) * grad).sign()
    exp_avg = beta2 * exp_avg + (1 - beta2) * grad
    return param - lr * direction, exp_avg


def _numbers(group: Group, step: float) -> dict[str, float]:
    beta1, beta2 = group["betas"]
    return {
        "lr": group["lr"],
        "1 - betas[0]": 1 - beta1,
        "1 - betas[1]": 1 - beta2,
        **penalty_numbers(group, is_decoupled=True),
    }


RULE = Rule(
    name="lion",
    slots=(Slot("exp_avg"),),
    update=_update,
    numbers=_numbers,
    scalars=(),
)


class Lion(FusedOptimizer):
    r"""Lion: each element moves by the learning rate, in the direction of the sign of a momentum.

    .. math::
        c_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad
        m_t = \beta_2 m_{t-1} + (1-\beta_2) g_t \\
        \theta_t &= \theta_{t-1} - \gamma\,(\mathrm{sign}(c_t) + \lambda\theta_{t-1}
        + \lambda_1\,\mathrm{sign}(\theta_{t-1}))

    Source: Chen et al., *Symbolic Discovery of Optimization Algorithms* (arXiv:2302.06675). It asks
    for a learning rate that is 3 to 10 times smaller than AdamW's, and a weight decay that is as
    much larger.

    Args:
        params: tensors, ``(name, tensor)`` pairs or dicts of groups; floating point or complex, of
            which real and imaginary part move by themselves; of any shape and strides.
        lr (float or Tensor of one element): step size :math:`\gamma` (default: 1e-4).
        betas (pair of float or Tensor): weight of the momentum in the direction, and its decay, in
            [0, 1) (default: (0.9, 0.99)).
        weight_decay (float): decoupled coefficient :math:`\lambda` (default: 0).
        foreach: accepted and stored as torch's classes do; the update is always fused.
        {maximize}
        {capturable}
        {differentiable}
        {shared}

    State per parameter: ``exp_avg``, of the parameter's dtype, shape and strides. float16 and
    bfloat16 are computed in float32.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: at ``step()``, a gradient is sparse.

    Differences from torch.optim: torch has no Lion.
    """

    _rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **shared: Unpack[Shared],
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        torch.optim.Optimizer.__init__(self, params, defaults)
        self._finish_init(shared)
