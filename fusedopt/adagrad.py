"""Adagrad."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import storage
from .optimizer import Created, FusedOptimizer, Group, add_sparse, penalized_grad, scalar


class Adagrad(FusedOptimizer, torch.optim.Adagrad):
    r"""Adagrad: each element has a step size that falls with the squares of its gradients.

    .. math::
        g_t &\leftarrow g_t + \lambda\theta_{t-1} + \lambda_1\,\mathrm{sign}(\theta_{t-1}),
        \qquad s_t = s_{t-1} + g_t^2 \\
        \theta_t &= \theta_{t-1} - \frac{\gamma}{1 + (t-1)\eta}\,\frac{g_t}{\sqrt{s_t}+\epsilon}

    Source: Duchi, Hazan & Singer, *Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization* (JMLR 12, 2011).

    Args:
        params: tensors, ``(name, tensor)`` pairs or dicts of groups; floating point or complex,
            of any shape and strides. Gradients may be sparse (COO) if there are no penalties.
        lr (float or Tensor of one element): step size :math:`\gamma` (default: 1e-2).
        lr_decay (float): :math:`\eta` (default: 0).
        weight_decay (float): L2 coefficient :math:`\lambda` (default: 0).
        initial_accumulator_value (float): :math:`s_0` (default: 0).
        eps (float): :math:`\epsilon` (default: 1e-10).
        foreach, fused: accepted and stored as torch does; the update is always fused.
        maximize (bool): ascend (default: False).
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
        state_dtype (torch.dtype or "8bit", optional): how the sum is stored: as
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

    State per parameter, made by the constructor (by the first step with ``state_dtype``,
    ``master_weights``, ``rounding`` or ``ema``): ``step`` (0-dim) and ``sum``, of the parameter's
    dtype, shape and strides. float16 and bfloat16 are computed in float32.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: at ``step()``, a sparse gradient together with a penalty.

    Differences from torch.optim: the options ``l1``, ``max_grad_norm``, ``amp_fused`` and
    ``capturable``; a ``step`` that a float32 can no longer count goes on as float64; sums keep the
    dtype they were saved in.
    """

    _rule = "adagrad"
    _takes_sparse = True
    _required_slots = _all_slots = _unsigned_slots = ("sum",)
    _own_options = (*FusedOptimizer._own_options, "capturable")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
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
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
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
        for group in self.param_groups:
            for param in group["params"]:
                if storage.is_on(group):
                    # The first step makes all that other storage needs, as it does for the other
                    # optimizers. With a part of it, a sharded checkpoint would be loaded into that.
                    self.state.pop(param, None)
                    continue
                state = self.state[param]
                if not group["fused"] and state["step"].device.type != "cpu":
                    # torch's is on the default device.
                    state["step"] = torch.tensor(0.0, dtype=state["step"].dtype, device="cpu")

    def share_memory(self) -> None:
        """Puts all that is kept for the parameters, but the step counts, into shared memory. What
        the first step would make of it is made now.

        Raises:
            TypeError, ValueError: an option of a group is wrong.
        """
        with self._exclusively("share_memory()"):
            created: Created = {}
            for g, group in enumerate(self.param_groups):
                self._check_options(g)
                for i, param in enumerate(group["params"]):
                    storage.check_param(group, param, functools.partial(self._refuse, g, i))
                    self._complete_state(g, i, created)
            self.state.update(created)
            for group in self.param_groups:
                for param in group["params"]:
                    for key, value in self.state[param].items():
                        if isinstance(value, Tensor) and key != "step":
                            value.share_memory_()

    def _refuse(self, g: int, i: int, error: type[Exception], problem: str) -> NoReturn:
        raise error(f"{self._describe(g, i)}: {problem}")

    def _as_stock(self, group: Group, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        if not state:  # torch's makes its state when it is created, and needs it
            step = self._new_step(group, param).to(param.device if group.get("fused") else "cpu")
            return {"step": step, "sum": self._initial_state(group, param)}
        return super()._as_stock(group, param, state)

    @staticmethod
    def _slots(group: Group) -> tuple[str, ...]:
        return Adagrad._all_slots

    def _initial_state(self, group: Group, param: Tensor) -> Tensor:
        initial = self.defaults["initial_accumulator_value"]
        value = complex(initial, initial) if param.is_complex() else initial
        # float32 where it will be: rounded to the parameter's dtype it would be another number.
        wide = group.get("state_dtype") and param.dtype in (torch.bfloat16, torch.float16)
        dtype = torch.float32 if wide else None
        return torch.full_like(param, value, dtype=dtype, memory_format=torch.preserve_format)

    @staticmethod
    def _numbers(group: Group, step: float) -> dict[str, float]:
        divisor = 1 + (step - 1) * group["lr_decay"]
        if divisor == 0:
            raise ZeroDivisionError(
                f"lr_decay = {group['lr_decay']:g} makes 1 + (step - 1) * lr_decay zero at step "
                f"{step:.0f}; lr cannot be divided by it"
            )
        return {
            "lr / (1 + (step - 1) * lr_decay)": group["lr"] / divisor,
            "weight_decay": group["weight_decay"],
            "l1": group.get("l1") or 0.0,
        }

    @staticmethod
    def _python_rule(
        group: Group, step: float | Tensor, param: Tensor, grad: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        (sum_,) = state
        grad = penalized_grad(group, grad, param)
        lr = scalar(group["lr"]) / (1 + (step - 1) * group["lr_decay"])
        sum_ = sum_ + grad * grad
        return param - lr * grad / (sum_.sqrt() + group["eps"]), sum_

    def _sparse_update(
        self, group: Group, param: Tensor, grad: Tensor, state: dict[str, Any]
    ) -> None:
        """The same equation on the rows that the gradient has."""
        state["step"] += 1
        grad = (-grad if group["maximize"] else grad).coalesce()
        indices, values = grad._indices(), grad._values()

        def sparse(new: Tensor) -> Tensor:
            return torch.sparse_coo_tensor(
                indices, new, grad.shape, dtype=new.dtype, device=new.device, is_coalesced=True
            )

        lr = float(group["lr"]) / (1 + (float(state["step"]) - 1) * group["lr_decay"])
        # As in the dense rule, the update takes the sum as it was before it is rounded.
        sums = state["sum"].to(torch.promote_types(state["sum"].dtype, param.dtype))
        add_sparse(sums, sparse(values.square()))
        std = sums.sparse_mask(grad)._values().sqrt() + group["eps"]
        if sums is not state["sum"]:
            state["sum"].copy_(sums)
        add_sparse(param, sparse(values / std), -lr)
