"""Adagrad."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import checks, options, state
from .optimizer import FusedOptimizer
from .problem import Problem
from .rule import (
    Group,
    Rule,
    Shared,
    Slot,
    add_sparse,
    number,
    penalized_grad,
    penalty_numbers,
    storage_is_on,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _update(
    group: Group, step: float | Tensor, param: Tensor, grad: Tensor, sum_: Tensor
) -> tuple[Tensor, ...]:
    grad = penalized_grad(group, grad, param)
    lr = number(group["lr"]) / (1 + (step - 1) * group["lr_decay"])
    sum_ = sum_ + grad * grad
    return param - lr * grad / (sum_.sqrt() + group["eps"]), sum_


def _sparse_update(group: Group, param: Tensor, grad: Tensor, entries: dict[str, Any]) -> None:
    """The same equation on the rows that the gradient has."""
    entries["step"] += 1
    grad = (-grad if group["maximize"] else grad).coalesce()
    indices, values = grad._indices(), grad._values()

    def sparse(new: Tensor) -> Tensor:
        return torch.sparse_coo_tensor(
            indices, new, grad.shape, dtype=new.dtype, device=new.device, is_coalesced=True
        )

    lr = float(group["lr"]) / (1 + (float(entries["step"]) - 1) * group["lr_decay"])
    # As in the dense rule, the update takes the sum as it was before it is rounded.
    sums = entries["sum"].to(torch.promote_types(entries["sum"].dtype, param.dtype))
    add_sparse(sums, sparse(values.square()))
    std = sums.sparse_mask(grad)._values().sqrt() + group["eps"]
    if sums is not entries["sum"]:
        entries["sum"].copy_(sums)
    add_sparse(param, sparse(values / std), -lr)


def _numbers(group: Group, step: float) -> dict[str, float]:
    divisor = 1 + (step - 1) * group["lr_decay"]
    if divisor == 0:
        raise ZeroDivisionError(
            f"lr_decay = {group['lr_decay']:g} makes 1 + (step - 1) * lr_decay zero at step "
            f"{step:.0f}; lr cannot be divided by it"
        )
    return {
        "lr / (1 + (step - 1) * lr_decay)": group["lr"] / divisor,
        **penalty_numbers(group),
    }


def _initial_sum(param: Tensor, group: Group, defaults: dict[str, Any]) -> Tensor:
    initial = defaults["initial_accumulator_value"]
    value = complex(initial, initial) if param.is_complex() else initial
    # float32 where it will be: rounded to the parameter's dtype it would be another number.
    wide = group.get("state_dtype") and param.dtype in (torch.bfloat16, torch.float16)
    dtype = torch.float32 if wide else None
    return torch.full_like(param, value, dtype=dtype, memory_format=torch.preserve_format)


RULE = Rule(
    name="adagrad",
    slots=(Slot("sum", unsigned=True, initial=_initial_sum),),
    update=_update,
    numbers=_numbers,
    sparse_update=_sparse_update,
    switches=("capturable",),
    stock_starts_with_state=True,
)


class Adagrad(FusedOptimizer, torch.optim.Adagrad):
    r"""Adagrad: each element has a step size that falls with the squares of its gradients.

    .. math::
        g_t &\leftarrow g_t + \lambda\theta_{t-1} + \lambda_1\,\mathrm{sign}(\theta_{t-1}),
        \qquad s_t = s_{t-1} + g_t^2 \\
        \theta_t &= \theta_{t-1} - \frac{\gamma}{1 + (t-1)\eta}\,\frac{g_t}{\sqrt{s_t}+\epsilon}

    Source: Duchi, Hazan & Singer, *Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization* (JMLR 12, 2011).

    Args:
        {params}
            Gradients may be sparse (COO) if there are no penalties.
        lr (float or Tensor of one element): step size :math:`\gamma` (default: 1e-2).
        lr_decay (float): :math:`\eta` (default: 0).
        weight_decay (float): L2 coefficient :math:`\lambda` (default: 0).
        initial_accumulator_value (float): :math:`s_0` (default: 0).
        eps (float): :math:`\epsilon` (default: 1e-10).
        foreach, fused: accepted and stored as torch does; the update is always fused.
        {maximize}
        {differentiable}
        {capturable}
        {shared}

    State per parameter, made by the constructor (by the first step with ``state_dtype``,
    ``master_weights``, ``rounding`` or ``ema``): ``step`` (0-dim) and ``sum``, of the parameter's
    dtype, shape and strides. float16 and bfloat16 are computed in float32.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: at ``step()``, a sparse gradient together with a penalty.

    Differences from torch.optim: the options
    {options}
    and ``capturable``; a ``step`` that a float32 can no longer count goes on as float64; sums keep
    the dtype they were saved in.
    """

    _rule = RULE

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
        capturable: bool = False,
        **shared: Unpack[Shared],
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
        self._finish_init(shared, capturable=capturable)
        for group in self.param_groups:
            for param in group["params"]:
                if storage_is_on(group):
                    # The first step makes all that other storage needs, as it does for the other
                    # optimizers. With a part of it, a sharded checkpoint would be loaded into that.
                    self.state.pop(param, None)
                    continue
                step = self.state[param]["step"]
                if not group["fused"] and step.device.type != "cpu":
                    # torch's is on the default device.
                    self.state[param]["step"] = torch.tensor(0.0, dtype=step.dtype, device="cpu")

    def share_memory(self) -> None:
        """Puts all that is kept for the parameters, but the step counts, into shared memory. What
        the first step would make of it is made now.

        Raises:
            TypeError, ValueError: an option of a group is wrong.
        """
        with self._turn.exclusively(self._name, "share_memory()"):
            members = self._members()
            for g in range(len(members.groups)):
                options.check_group(members, g)
            for record in members.all():
                try:
                    checks.check_storage(record)
                except Problem as problem:
                    raise problem.at(record.describe()) from None
                state.complete(record)
            self.state.update(members.created)
            for record in members.all():
                for key, value in self.state[record.param].items():
                    if isinstance(value, Tensor) and key != "step":
                        value.share_memory_()
