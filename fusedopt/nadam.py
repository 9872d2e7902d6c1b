"""NAdam."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, optim
from torch.optim.optimizer import ParamsT

from .optimizer import FusedOptimizer
from .rule import (
    STEP,
    Group,
    Rule,
    Scalar,
    Shared,
    Slot,
    bias_corrections,
    number,
    penalized,
    penalty_numbers,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _momentum(group: Group, step: float | Tensor) -> float | Tensor:
    decay = 0.96 ** (step * group["momentum_decay"])
    momentum: float | Tensor = group["betas"][0] * (1 - 0.5 * decay)
    return momentum


def _advance(group: Group, step: Any, mu_product: Any) -> tuple[Any, ...]:
    return (mu_product * _momentum(group, step),)


def _sizes(
    group: Group, step: float | Tensor, mu_product: float | Tensor
) -> tuple[float | Tensor, float | Tensor]:
    """What the gradient and its average are multiplied with."""
    lr, mu, mu_next = number(group["lr"]), _momentum(group, step), _momentum(group, step + 1)
    return lr * (1 - mu) / (1 - mu_product), lr * mu_next / (1 - mu_product * mu_next)


def _update(
    group: Group,
    step: float | Tensor,
    mu_product: float | Tensor,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
) -> tuple[Tensor, ...]:
    beta1, beta2 = group["betas"]
    grad, param = penalized(group, grad, param, group["decoupled_weight_decay"])
    exp_avg = exp_avg.lerp(grad, 1 - beta1)
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    denom = exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5 + group["eps"]
    of_grad, of_avg = _sizes(group, step, mu_product)
    return param - (of_grad * grad + of_avg * exp_avg) / denom, exp_avg, exp_avg_sq


def _numbers(group: Group, step: float, mu_product: float) -> dict[str, float]:
    beta1, beta2 = group["betas"]
    bias_corrections((0.0, beta2), step)
    try:
        of_grad, of_avg = map(float, _sizes(group, step, mu_product))
    except ZeroDivisionError as error:
        raise ZeroDivisionError(
            f"mu_product = {mu_product:g} makes 1 - mu_product zero at step {step:.0f}; "
            "it is the product of betas[0] * (1 - 0.5 * 0.96 ** (step * momentum_decay)) over all "
            "steps"
        ) from error
    return {
        "lr * (1 - mu) / (1 - mu_product)": of_grad,
        "lr * mu / (1 - mu_product), of the next step,": of_avg,
        "1 - betas[0]": 1 - beta1,
        "1 - betas[1]": 1 - beta2,
        **penalty_numbers(group, group["decoupled_weight_decay"]),
    }


RULE = Rule(
    name="nadam",
    slots=(Slot("exp_avg"), Slot("exp_avg_sq", unsigned=True)),
    update=_update,
    numbers=_numbers,
    scalars=(STEP, Scalar("mu_product", initial=1.0)),
    advance=_advance,
)


class NAdam(FusedOptimizer, optim.NAdam):
    r"""NAdam: Adam with Nesterov's momentum, which grows to :math:`\beta_1`.

    With the moments :math:`m_t` and :math:`v_t` of :class:`Adam` and :math:`\psi`
    (``momentum_decay``):

    .. math::
        \mu_t &= \beta_1\left(1 - \tfrac{1}{2}\,0.96^{\,t\psi}\right), \qquad
        \hat v_t = \frac{v_t}{1-\beta_2^t} \\
        \theta_t &= \theta_{t-1} - \frac{\gamma}{\sqrt{\hat v_t}+\epsilon}\left(
        \frac{(1-\mu_t)\,g_t}{1-\prod_{i=1}^{t}\mu_i}
        + \frac{\mu_{t+1}\,m_t}{1-\prod_{i=1}^{t+1}\mu_i}\right)

    Source: Dozat, *Incorporating Nesterov Momentum into Adam* (2016).

    Args:
        {params}
        lr (float or Tensor of one element): step size :math:`\gamma` (default: 2e-3).
        betas (pair of float): decay of the two averages, in [0, 1) (default: (0.9, 0.999)).
        eps (float): added to the root (default: 1e-8).
        weight_decay (float): L2 coefficient :math:`\lambda` (default: 0).
        momentum_decay (float): :math:`\psi` (default: 4e-3).
        decoupled_weight_decay (bool): apply the penalties to the parameter, as AdamW
            (default: False).
        foreach: accepted and stored as torch does; the update is always fused.
        {maximize}
        {capturable}
        {differentiable}
        {shared}

    State per parameter: ``step`` and ``mu_product``, the product of all :math:`\mu` so far (both
    0-dim), ``exp_avg`` and ``exp_avg_sq``, of the parameter's dtype, shape and strides. float16 and
    bfloat16 are computed in float32.

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
        momentum_decay: float = 4e-3,
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
            momentum_decay,
            decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
        self._finish_init(shared)
