"""Adam and AdamW."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import FusedOptimizer, Group, penalized_grad, scalar


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
        params: tensors, ``(name, tensor)`` pairs or dicts of groups; floating point or complex,
            of any shape and strides.
        lr (float or Tensor of one element): step size (default: 1e-3).
        betas (pair of float or Tensor): decay of the two averages, in [0, 1)
            (default: (0.9, 0.999)).
        eps (float): added to the root (default: 1e-8).
        weight_decay (float): L2 coefficient :math:`\lambda` (default: 0).
        amsgrad (bool): use AMSGrad (default: False).
        foreach, fused: accepted and stored as torch does; the update is always fused.
        maximize (bool): ascend (default: False).
        capturable (bool): as in torch; needs parameters on an accelerator (default: False).
        differentiable (bool): let autograd run through ``step()`` (default: False).
        decoupled_weight_decay (bool): apply the penalties to the parameter, as AdamW
            (default: False).
        l1 (float): L1 coefficient :math:`\lambda_1`; goes where ``weight_decay`` goes (default: 0).
        max_grad_norm (float, optional): clip the norm of all gradients of the step together to this
            much, as ``torch.nn.utils.clip_grad_norm_`` before the step would, but without writing
            the gradients; ``grad_norm`` holds the norm afterwards. An attribute of the optimizer,
            which may be changed, and not part of checkpoints (default: None).
        amp_fused (bool): let the step itself unscale, check and skip for ``torch.amp.GradScaler``,
            which then leaves the gradients scaled; on a GPU the step count lives there
            (default: False).
        state_dtype (torch.dtype or "8bit", optional): how the moments are stored: as
            float32, bfloat16 or float16 whatever the dtype of the parameter, or in 8 bits with a
            float32 scale for every 64 (tensors below 4,096 elements as float32); float64 and
            complex parameters keep theirs (default: None, the parameter's dtype).
        master_weights (str, optional): ``"split"`` trains bfloat16 parameters on an exact float32
            master, whose lower half is the state ``master_remainder``; ``"fp32"`` keeps a whole one
            for bfloat16 and float16 (default: None).
        rounding (str, optional): ``"stochastic"`` rounds bfloat16 parameters up or down at random,
            so that small steps are not lost; the seed comes from torch's generator and is state
            (default: None, to nearest).
        ema (float, optional): decay of an average of the weights, the state ``ema``; see
            ``ema_parameters()`` and ``swap_ema()``. It moves when the parameter is updated, so not
            while that has no gradient (default: None).

    State per parameter: ``step`` (0-dim), ``exp_avg``, ``exp_avg_sq`` and with amsgrad
    ``max_exp_avg_sq``, of the parameter's dtype, shape and strides. float16 and bfloat16 are
    computed in float32.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: at ``step()``, a gradient is sparse.

    Differences from torch.optim: the options ``l1``, ``max_grad_norm`` and ``amp_fused``; a
    ``step`` that a float32 can no longer count goes on as float64; moments keep the dtype they were
    saved in.
    """

    _rule = "adam"
    _required_slots = ("exp_avg", "exp_avg_sq")
    _all_slots = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _unsigned_slots = ("exp_avg_sq", "max_exp_avg_sq")

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
        l1: float = 0,
        max_grad_norm: float | None = None,
        amp_fused: bool = False,
        state_dtype: torch.dtype | str | None = None,
        master_weights: str | None = None,
        rounding: str | None = None,
        ema: float | None = None,
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
        self._finish_init(
            l1=l1,
            max_grad_norm=max_grad_norm,
            amp_fused=amp_fused,
            state_dtype=state_dtype,
            master_weights=master_weights,
            rounding=rounding,
            ema=ema,
        )

    @staticmethod
    def _slots(group: Group) -> tuple[str, ...]:
        return Adam._all_slots if group["amsgrad"] else Adam._required_slots

    @staticmethod
    def _numbers(group: Group, step: float) -> dict[str, float]:
        corrections = []
        for i, beta in enumerate(map(float, group["betas"])):
            name = f"betas[{i}] = {beta:g}"
            try:
                correction = 1 - beta**step
            except OverflowError as error:
                raise OverflowError(
                    f"{name} to the power of step {step:.0f} is no number; set it below 1"
                ) from error
            if correction == 0 or (i == 1 and -math.inf < correction < 0):
                raise (RuntimeError if correction else ZeroDivisionError)(
                    f"{name} makes its bias correction 1 - beta ** step "
                    f"{'negative' if correction else 'zero'} at step {step:.0f}; set it below 1"
                )
            corrections.append(correction)
        lr, l1, weight_decay = group["lr"], group.get("l1") or 0.0, group["weight_decay"]
        decoupled = group["decoupled_weight_decay"]
        beta1, beta2 = group["betas"]
        return {
            "lr / (1 - betas[0] ** step)": lr / corrections[0],
            "1 - betas[0]": 1 - beta1,
            "1 - betas[1]": 1 - beta2,
            "weight_decay": 0.0 if decoupled else weight_decay,
            "lr * l1" if decoupled else "l1": lr * l1 if decoupled and l1 else l1,
        }

    @staticmethod
    def _python_rule(
        group: Group,
        step: float | Tensor,
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        max_exp_avg_sq: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        lr, eps = scalar(group["lr"]), group["eps"]
        beta1, beta2 = map(scalar, group["betas"])
        if group["decoupled_weight_decay"]:
            grad = -grad if group["maximize"] else grad
            l1_step = lr * group["l1"] * param.sign() if group.get("l1") else None
            if group["weight_decay"] != 0:
                param = param * (1 - lr * group["weight_decay"])
            if l1_step is not None:
                param = param - l1_step
        else:
            grad = penalized_grad(group, grad, param)
        exp_avg = exp_avg.lerp(grad, _weight(1 - beta1, grad))
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
        step_size = lr / (1 - beta1**step)
        second_moment = exp_avg_sq
        if max_exp_avg_sq is not None:
            second_moment = max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)
        denom = second_moment.sqrt() / (1 - beta2**step) ** 0.5 + eps
        param = param - step_size * exp_avg / denom
        if max_exp_avg_sq is not None:
            return param, exp_avg, exp_avg_sq, max_exp_avg_sq
        return param, exp_avg, exp_avg_sq


def _weight(weight: float | Tensor, like: Tensor) -> float | Tensor:
    # torch.lerp takes a tensor weight only in the dtype and on the device of its ends.
    return weight.to(like) if isinstance(weight, Tensor) else weight


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
        l1: float = 0,
        max_grad_norm: float | None = None,
        amp_fused: bool = False,
        state_dtype: torch.dtype | str | None = None,
        master_weights: str | None = None,
        rounding: str | None = None,
        ema: float | None = None,
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
        self._finish_init(
            l1=l1,
            max_grad_norm=max_grad_norm,
            amp_fused=amp_fused,
            state_dtype=state_dtype,
            master_weights=master_weights,
            rounding=rounding,
            ema=ema,
        )
