"""SGD with momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import FusedOptimizer, Group, add_sparse, penalized_grad, scalar


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
        params: tensors, ``(name, tensor)`` pairs or dicts of groups; floating point or complex,
            of any shape and strides. Gradients may be sparse (COO) if there are no penalties.
        lr (float or Tensor of one element): step size :math:`\gamma` (default: 1e-3).
        momentum (float): :math:`\mu` (default: 0).
        dampening (float): :math:`\tau` (default: 0).
        weight_decay (float or Tensor): L2 coefficient :math:`\lambda` (default: 0).
        nesterov (bool): Nesterov's momentum (default: False).
        maximize (bool): ascend (default: False).
        foreach, fused: accepted and stored as torch does; the update is always fused.
        differentiable (bool): let autograd run through ``step()`` (default: False).
        l1 (float): L1 coefficient :math:`\lambda_1` (default: 0).
        max_grad_norm (float, optional): clip the norm of all gradients of the step together to this
            much, as ``torch.nn.utils.clip_grad_norm_`` before the step would, but without writing
            the gradients; ``grad_norm`` holds the norm afterwards. An attribute of the optimizer,
            which may be changed, and not part of checkpoints (default: None).
        amp_fused (bool): let the step itself unscale, check and skip for ``torch.amp.GradScaler``,
            which then leaves the gradients scaled; on a GPU the step count lives there
            (default: False).
        capturable (bool): the step can be captured into a CUDA graph; needs parameters on an
            accelerator (default: False).
        state_dtype (torch.dtype or "8bit", optional): how the momentum buffer is stored: as
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

    State per parameter: ``momentum_buffer`` if momentum is not 0, of the parameter's dtype, shape
    and strides. float16 and bfloat16 are computed in float32.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: at ``step()``, a sparse gradient together with a penalty.

    Differences from torch.optim: the options ``l1``, ``max_grad_norm``, ``amp_fused`` and
    ``capturable``; the momentum buffer keeps the dtype it was saved in.
    """

    _rule = "sgd"
    _has_step = False
    _takes_sparse = True
    _all_slots = ("momentum_buffer",)
    _own_options = (*FusedOptimizer._own_options, "capturable")

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
        l1: float = 0,
        max_grad_norm: float | None = None,
        amp_fused: bool = False,
        state_dtype: torch.dtype | str | None = None,
        master_weights: str | None = None,
        rounding: str | None = None,
        ema: float | None = None,
        capturable: bool = False,
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
        self._finish_init(
            l1=l1,
            max_grad_norm=max_grad_norm,
            amp_fused=amp_fused,
            capturable=capturable,
            state_dtype=state_dtype,
            master_weights=master_weights,
            rounding=rounding,
            ema=ema,
        )

    @staticmethod
    def _slots(group: Group) -> tuple[str, ...]:
        return SGD._all_slots if group["momentum"] != 0 else ()

    @staticmethod
    def _numbers(group: Group, step: float) -> dict[str, float]:
        dampens = group["momentum"] != 0 and step != 1
        return {
            "lr": group["lr"],
            "1 - dampening": 1 - group["dampening"] if dampens else 1.0,
            "weight_decay": group["weight_decay"],
            "l1": group.get("l1") or 0.0,
        }

    @staticmethod
    def _python_rule(
        group: Group,
        step: float | Tensor,
        param: Tensor,
        grad: Tensor,
        momentum_buffer: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        lr, momentum = scalar(group["lr"]), group["momentum"]
        grad = penalized_grad(group, grad, param)
        if momentum_buffer is None:
            return (param - lr * grad,)
        if step == 1:
            momentum_buffer = grad.detach()
        else:
            momentum_buffer = momentum * momentum_buffer + (1 - group["dampening"]) * grad
        direction = grad + momentum * momentum_buffer if group["nesterov"] else momentum_buffer
        return param - lr * direction, momentum_buffer

    def _sparse_update(
        self, group: Group, param: Tensor, grad: Tensor, state: dict[str, Any]
    ) -> None:
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
