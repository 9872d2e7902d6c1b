"""RMSprop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import FusedOptimizer, Group, penalized_grad, scalar


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
        params: tensors, ``(name, tensor)`` pairs or dicts of groups; floating point or complex,
            of any shape and strides.
        lr (float or Tensor of one element): step size :math:`\gamma` (default: 1e-2).
        alpha (float): decay of the averages (default: 0.99).
        eps (float): :math:`\epsilon` (default: 1e-8).
        weight_decay (float): L2 coefficient :math:`\lambda` (default: 0).
        momentum (float): :math:`\mu` (default: 0).
        centered (bool): normalise by the estimated variance (default: False).
        capturable (bool): as in torch; needs parameters on an accelerator (default: False).
        foreach: accepted and stored as torch does; the update is always fused.
        maximize (bool): ascend (default: False).
        differentiable (bool): let autograd run through ``step()`` (default: False).
        eps_inside_sqrt (bool): add eps under the root (default: False).
        l1 (float): L1 coefficient :math:`\lambda_1` (default: 0).
        max_grad_norm (float, optional): clip the norm of all gradients of the step together to this
            much, as ``torch.nn.utils.clip_grad_norm_`` before the step would, but without writing
            the gradients; ``grad_norm`` holds the norm afterwards. An attribute of the optimizer,
            which may be changed, and not part of checkpoints (default: None).
        amp_fused (bool): let the step itself unscale, check and skip for ``torch.amp.GradScaler``,
            which then leaves the gradients scaled; on a GPU the step count lives there
            (default: False).
        state_dtype (torch.dtype or "8bit", optional): how the averages are stored: as
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

    State per parameter: ``step`` (0-dim), ``square_avg``, with momentum ``momentum_buffer``, if
    centered ``grad_avg``, of the parameter's dtype, shape and strides. float16 and bfloat16 are
    computed in float32.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: at ``step()``, a gradient is sparse.

    Differences from torch.optim: the options ``eps_inside_sqrt``, ``l1``, ``max_grad_norm`` and
    ``amp_fused``; a ``step`` that a float32 can no longer count goes on as float64; averages keep
    the dtype they were saved in.
    """

    _rule = "rmsprop"
    _required_slots = ("square_avg",)
    _all_slots = ("square_avg", "grad_avg", "momentum_buffer")
    _unsigned_slots = ("square_avg",)
    _own_options = (*FusedOptimizer._own_options, "eps_inside_sqrt")

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
        self._finish_init(
            l1=l1,
            max_grad_norm=max_grad_norm,
            amp_fused=amp_fused,
            eps_inside_sqrt=eps_inside_sqrt,
            state_dtype=state_dtype,
            master_weights=master_weights,
            rounding=rounding,
            ema=ema,
        )

    @staticmethod
    def _slots(group: Group) -> tuple[str, ...]:
        slots = ["square_avg"]
        if group["centered"]:
            slots.append("grad_avg")
        if group["momentum"] > 0:
            slots.append("momentum_buffer")
        return tuple(slots)

    def _state_dtype(self, group: Group, param: Tensor, key: str) -> torch.dtype | None:
        dtype = super()._state_dtype(group, param, key)
        # The variance is a small difference: with codes it would be negative, its root NaN.
        is_part = group["centered"] and key != "momentum_buffer"
        return torch.float32 if is_part and dtype in (torch.int8, torch.uint8) else dtype

    @staticmethod
    def _numbers(group: Group, step: float) -> dict[str, float]:
        return {
            "lr": group["lr"],
            "1 - alpha": 1 - group["alpha"],
            "weight_decay": group["weight_decay"],
            "l1": group.get("l1") or 0.0,
        }

    @staticmethod
    def _python_rule(
        group: Group,
        step: float | Tensor,
        param: Tensor,
        grad: Tensor,
        square_avg: Tensor,
        *optional: Tensor,
    ) -> tuple[Tensor, ...]:
        lr, alpha, eps = scalar(group["lr"]), group["alpha"], group["eps"]
        slots = dict(zip(RMSprop._slots(group), (square_avg, *optional), strict=True))
        grad = penalized_grad(group, grad, param)
        radicand = slots["square_avg"] = alpha * square_avg + (1 - alpha) * grad * grad
        eps_inside, eps_outside = (eps, 0.0) if group.get("eps_inside_sqrt") else (0.0, eps)
        if "grad_avg" in slots:
            slots["grad_avg"] = slots["grad_avg"].lerp(grad, 1 - alpha)
            # A square that leaves the range is its end, so that an infinite v stays infinite.
            square = (slots["grad_avg"] * slots["grad_avg"]).clamp(max=torch.finfo(grad.dtype).max)
            radicand = radicand - square + eps_inside
        else:
            radicand = radicand + eps_inside
        denom = radicand.sqrt() + eps_outside
        if "momentum_buffer" not in slots:
            return param - lr * grad / denom, *slots.values()
        slots["momentum_buffer"] = group["momentum"] * slots["momentum_buffer"] + grad / denom
        return param - lr * slots["momentum_buffer"], *slots.values()
