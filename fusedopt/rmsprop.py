"""RMSprop."""

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
    group: Group, step: float | Tensor, param: Tensor, grad: Tensor, *slots: Tensor
) -> tuple[Tensor, ...]:
    lr, alpha, eps = number(group["lr"]), group["alpha"], group["eps"]
    now = dict(zip((slot.name for slot in RULE.slots_of(group)), slots, strict=True))
    grad = penalized_grad(group, grad, param)
    radicand = now["square_avg"] = alpha * now["square_avg"] + (1 - alpha) * grad * grad
    eps_inside, eps_outside = (eps, 0.0) if group.get("eps_inside_sqrt") else (0.0, eps)
    if "grad_avg" in now:
        now["grad_avg"] = now["grad_avg"].lerp(grad, 1 - alpha)
        # A square that leaves the range is its end, so that an infinite v stays infinite.
        square = (now["grad_avg"] * now["grad_avg"]).clamp(max=torch.finfo(grad.dtype).max)
        radicand = radicand - square + eps_inside
    else:
        radicand = radicand + eps_inside
    denom = radicand.sqrt() + eps_outside
    if "momentum_buffer" not in now:
        return param - lr * grad / denom, *now.values()
    now["momentum_buffer"] = group["momentum"] * now["momentum_buffer"] + grad / denom
    return param - lr * now["momentum_buffer"], *now.values()


def _numbers(group: Group, step: float) -> dict[str, float]:
    return {
        "lr": group["lr"],
        "1 - alpha": 1 - group["alpha"],
        **penalty_numbers(group),
    }


def _is_centered(group: Group) -> bool:
    return bool(group["centered"])


def _is_not_centered(group: Group) -> bool:
    # The variance is a small difference: with codes it would be negative, its root NaN.
    return not group["centered"]


RULE = Rule(
    name="rmsprop",
    slots=(
        Slot("square_avg", unsigned=True, fits_8bit=_is_not_centered),
        Slot("grad_avg", when=_is_centered, fits_8bit=_is_not_centered),
        Slot("momentum_buffer", when=lambda group: bool(group["momentum"] > 0)),
    ),
    update=_update,
    numbers=_numbers,
    switches=("eps_inside_sqrt",),
)


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    r"""RMSprop, plain, centered and with momentum.

    .. math::
        g_t &\leftarrow g_t + \lambda\theta_{t-1} + \lambda_1\,\mathrm{sign}(\theta_{t-1}) \\
        v_t &= \alpha v_{t-1} + (1-\alpha) g_t^2, \qquad
        \text{centered:}\; a_t = \alpha a_{t-1} + (1-\alpha) g_t,\;
        \tilde v_t = v_t - a_t^2 \\
        b_t &= \mu b_{t-1} + g_t / (\sqrt{\tilde v_t} + \epsilon), \qquad
        \theta_t = \theta_{t-1} - \gamma b_t

    With ``eps_inside_sqrt=True`` the denominator is :math:`\sqrt{\tilde v_t + \epsilon}`, as in
    TensorFlow, Keras and timm's RMSpropTF.

    Source: Hinton, *Neural Networks for Machine Learning*, lecture 6e (2012); Graves, *Generating
    Sequences With Recurrent Neural Networks* (arXiv:1308.0850) for ``centered``.

    Args:
        {params}
        lr (float or Tensor of one element): step size :math:`\gamma` (default: 1e-2).
        alpha (float): decay of the averages (default: 0.99).
        eps (float): :math:`\epsilon` (default: 1e-8).
        weight_decay (float): L2 coefficient :math:`\lambda` (default: 0).
        momentum (float): :math:`\mu` (default: 0).
        centered (bool): normalise by the estimated variance (default: False).
        {capturable}
        foreach: accepted and stored as torch does; the update is always fused.
        {maximize}
        {differentiable}
        eps_inside_sqrt (bool): add eps under the root (default: False).
        {shared}

    State per parameter: ``step`` (0-dim), ``square_avg``, with momentum ``momentum_buffer``, if
    centered ``grad_avg``, of the parameter's dtype, shape and strides. float16 and bfloat16 are
    computed in float32.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: at ``step()``, a gradient is sparse.

    Differences from torch.optim: the options
    {options}
    and ``eps_inside_sqrt``; a ``step`` that a float32 can no longer count goes on as float64;
    averages keep the dtype they were saved in.
    """

    _rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        eps_inside_sqrt: bool = False,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            capturable,
            foreach,
            maximize,
            differentiable,
        )
        self._finish_init(shared, eps_inside_sqrt=eps_inside_sqrt)
