"""SGD with momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import FusedOptimizer
from .rule import Group, Rule, Shared, Slot, add_sparse, number, penalized_grad, penalty_numbers

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _update(
    group: Group, step: float | Tensor, param: Tensor, grad: Tensor, *momentum_buffer: Tensor
) -> tuple[Tensor, ...]:
    lr, momentum = number(group["lr"]), group["momentum"]
    grad = penalized_grad(group, grad, param)
    if not momentum_buffer:
        return (param - lr * grad,)
    if step == 1:
        buffer = grad.detach()
    else:
        buffer = momentum * momentum_buffer[0] + (1 - group["dampening"]) * grad
    direction = grad + momentum * buffer if group["nesterov"] else buffer
    return param - lr * direction, buffer


def _sparse_update(group: Group, param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
    grad = -grad if group["maximize"] else grad
    momentum = group["momentum"]
    if momentum != 0:
        buffer = state.get("momentum_buffer")
        if buffer is None:
            buffer = state["momentum_buffer"] = grad.detach().clone()
        else:
            add_sparse(buffer.mul_(momentum), grad, 1 - group["dampening"])
        if group["nesterov"]:
            add_sparse(ahead := buffer * momentum, grad)
            buffer = ahead
        grad = buffer
    add_sparse(param, grad, -float(group["lr"]))


def _numbers(group: Group, step: float) -> dict[str, float]:
    dampens = group["momentum"] != 0 and step != 1
    return {
        "lr": group["lr"],
        "1 - dampening": 1 - group["dampening"] if dampens else 1.0,
        **penalty_numbers(group),
    }


RULE = Rule(
    name="sgd",
    slots=(Slot("momentum_buffer", when=lambda group: bool(group["momentum"] != 0)),),
    update=_update,
    numbers=_numbers,
    scalars=(),
    first_step_fills_state=True,
    sparse_update=_sparse_update,
    switches=("capturable",),
)


class SGD(FusedOptimizer, torch.optim.SGD):
    r"""Stochastic gradient descent, with momentum and Nesterov's momentum.

    .. math::
        g_t &\leftarrow g_t + \lambda\theta_{t-1} + \lambda_1\,\mathrm{sign}(\theta_{t-1}) \\
        b_1 &= g_1, \qquad b_t = \mu b_{t-1} + (1-\tau) g_t \\
        \theta_t &= \theta_{t-1} - \gamma b_t, \quad\text{with nesterov}\quad
        \theta_t = \theta_{t-1} - \gamma\,(g_t + \mu b_t)

    Without momentum :math:`b_t` is :math:`g_t`.

    Source: Polyak, *Some methods of speeding up the convergence of iteration methods* (1964);
    Sutskever et al., *On the importance of initialization and momentum in deep learning* (2013).

    Args:
        {params}
            Gradients may be sparse (COO) if there are no penalties.
        lr (float or Tensor of one element): step size :math:`\gamma` (default: 1e-3).
        momentum (float): :math:`\mu` (default: 0).
        dampening (float): :math:`\tau` (default: 0).
        weight_decay (float or Tensor): L2 coefficient :math:`\lambda` (default: 0).
        nesterov (bool): Nesterov's momentum (default: False).
        {maximize}
        foreach, fused: accepted and stored as torch does; the update is always fused.
        {differentiable}
        {capturable}
        {shared}

    State per parameter: ``momentum_buffer`` if momentum is not 0, of the parameter's dtype, shape
    and strides. float16 and bfloat16 are computed in float32.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: at ``step()``, a sparse gradient together with a penalty.

    Differences from torch.optim: the options
    {options}
    and ``capturable``; the momentum buffer keeps the dtype it was saved in.
    """

    _rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._finish_init(shared, capturable=capturable)
