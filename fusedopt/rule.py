"""An optimizer as a value: what it keeps, which options it takes, and its update.

Each class of fusedopt's has one :class:`Rule`, from which checks, state, checkpoints, conversion
and the native plan take all that they need to know of it.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

import torch
from torch import Tensor

Group = dict[str, Any]


class Shared(TypedDict, total=False):
    """Options that all classes of fusedopt's share, and torch's do not have; all by name.

    Args:
        l1 (float): L1 coefficient :math:`\\lambda_1`; goes where ``weight_decay`` goes
            (default: 0).
        max_grad_norm (float, optional): clip the norm of all gradients of the step together to this
            much, as ``torch.nn.utils.clip_grad_norm_`` before the step would, but without writing
            the gradients; ``grad_norm`` holds the norm afterwards. An attribute of the optimizer,
            which may be changed, and not part of checkpoints (default: None).
        amp_fused (bool): let the step itself unscale, check and skip for ``torch.amp.GradScaler``,
            which then leaves the gradients scaled; on a GPU a step count lives there
            (default: False).
        state_dtype (torch.dtype or "8bit", optional): how state tensors are stored: as float32,
            bfloat16 or float16 whatever the dtype of the parameter, or in 8 bits with a float32
            scale for every 64 (tensors below 4,096 elements as float32); float64 and complex
            parameters keep theirs (default: None, the parameter's dtype).
        master_weights (str, optional): ``"split"`` trains bfloat16 parameters on an exact float32
            master, whose lower half is the state ``master_remainder``; ``"fp32"`` keeps a whole one
            for bfloat16 and float16 (default: None).
        rounding (str, optional): ``"stochastic"`` rounds bfloat16 parameters up or down at random,
            so that small steps are not lost; the seed comes from torch's generator and is state
            (default: None, to nearest).
        ema (float, optional): decay of an average of the weights, the state ``ema``; see
            ``ema_parameters()`` and ``swap_ema()``. It moves when the parameter is updated, so not
            while that has no gradient (default: None).
    """

    l1: float
    max_grad_norm: float | None
    amp_fused: bool
    state_dtype: torch.dtype | str | None
    master_weights: str | None
    rounding: str | None
    ema: float | None


SHARED_DEFAULTS = dict.fromkeys(Shared.__annotations__) | {"l1": 0, "amp_fused": False}


def with_shared_parameters(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a constructor with the shared options by name: other code asks for them."""
    signature = inspect.signature(function)
    shared = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=SHARED_DEFAULTS[name],
            annotation=annotation.__forward_arg__,
        )
        for name, annotation in Shared.__annotations__.items()
    ]
    own = [p for p in signature.parameters.values() if p.name != "shared"]
    return signature.replace(parameters=[*own, *shared])


# What classes say alike of arguments of torch's.
_ARGUMENTS = {
    "{params}": """params: tensors, ``(name, tensor)`` pairs or dicts of groups; floating point or
    complex, of any shape and strides.""",
    "{maximize}": "maximize (bool): ascend (default: False).",
    "{capturable}": """capturable (bool): the step can be captured into a CUDA graph; needs
    parameters on an accelerator (default: False).""",
    "{differentiable}": "differentiable (bool): let autograd run through ``step()`` "
    "(default: False).",
}


def with_shared(docstring: str) -> str:
    """The docstring of a class with what the classes share in the places that it has for that."""
    assert Shared.__doc__
    shared = textwrap.dedent(Shared.__doc__.split("Args:\n", 1)[1].rstrip())
    names = textwrap.fill(", ".join(f"``{name}``" for name in Shared.__annotations__), 96)
    for place, text in {**_ARGUMENTS, "{shared}": shared, "{options}": names}.items():
        for line in [line for line in docstring.splitlines() if line.lstrip().startswith(place)]:
            indent = line[: -len(line.lstrip())]
            docstring = docstring.replace(indent + place, textwrap.indent(text, indent))
    return docstring


# Those of a param group that decide how values are stored. None is off; an ema of 0 is on.
STORAGE_OPTIONS = ("state_dtype", "master_weights", "rounding", "ema")
# All those of a param group.
GROUP_OPTIONS = ("l1", *STORAGE_OPTIONS)


def storage_is_on(group: Group) -> bool:
    return any(group.get(name) is not None for name in STORAGE_OPTIONS)


def _always(group: Group) -> bool:
    return True


def _zeros(param: Tensor, group: Group, defaults: dict[str, Any]) -> Tensor:
    return torch.zeros_like(param, memory_format=torch.preserve_format)


@dataclass(frozen=True)
class Slot:
    """A state tensor with an element for each of the parameter's."""

    name: str
    unsigned: bool = False  # never negative: its 8-bit codes have no sign
    when: Callable[[Group], bool] = _always  # the groups that keep it
    fits_8bit: Callable[[Group], bool] = _always  # the groups whose update bears its codes
    initial: Callable[[Tensor, Group, dict[str, Any]], Tensor] = _zeros


@dataclass(frozen=True)
class Scalar:
    """A number that is kept for each parameter, as a 0-dim tensor."""

    name: str
    initial: float = 0.0


STEP = Scalar("step")


@dataclass(frozen=True)
class Rule:
    """What there is to know of an optimizer."""

    name: str  # that of the native module for the same update
    slots: tuple[Slot, ...]  # in the order of the native update
    # (group, *scalars, param, grad, *slots) -> new values of the parameter and its slots, out of
    # place. The scalars are those of this step; a rule that counts none is given 1 at the first
    # step and 2 at the others.
    update: Callable[..., tuple[Tensor, ...]]
    # (group, *scalars) -> the numbers that the update takes in the dtype of the parameter, by what
    # they are. Raises where torch's for-loop cannot compute one.
    numbers: Callable[..., dict[str, float]]
    scalars: tuple[Scalar, ...] = (STEP,)
    # (group, step, *others): the scalars beside the count, out of place, as this step has them.
    advance: Callable[..., tuple[Any, ...]] = lambda group, step: ()
    # Without state, the step is the first one: it gives the state its values.
    first_step_fills_state: bool = False
    # (group, param, grad, state): updates the parameter from a sparse gradient, in place.
    sparse_update: Callable[[Group, Tensor, Tensor, dict[str, Any]], None] | None = None
    sparse_advice: str = ""  # for those who have one all the same
    # Options of this class alone that torch's class lacks, which are off or on.
    switches: tuple[str, ...] = ()
    # torch's constructor makes the state, so that its step() expects to find it.
    stock_starts_with_state: bool = False
    # torch's implementation over lists gives what its for-loop gives, whatever the values are.
    stock_over_lists_is_right: bool = True

    @cached_property
    def by_name(self) -> dict[str, Slot]:
        return {slot.name: slot for slot in self.slots}

    @cached_property
    def scalar_by_name(self) -> dict[str, Scalar]:
        return {scalar.name: scalar for scalar in self.scalars}

    @cached_property
    def counts_steps(self) -> bool:
        return STEP in self.scalars

    def slots_of(self, group: Group) -> list[Slot]:
        """The state tensors that a group keeps."""
        return [slot for slot in self.slots if slot.when(group)]

    @cached_property
    def required(self) -> list[str]:
        """Keys that the state of a parameter has in any group, once there was a step."""
        if self.first_step_fills_state:
            return []
        always = [slot.name for slot in self.slots if slot.when is _always]
        return [*self.scalar_by_name, *always]


# What updates are made of -------------------------------------------------------------------------


def penalized_grad(group: Group, grad: Tensor, param: Tensor) -> Tensor:
    """``(-grad if maximize else grad) + weight_decay * param + l1 * sign(param)``."""
    if group["maximize"]:
        grad = -grad
    if group["weight_decay"] != 0:
        grad = grad + group["weight_decay"] * param
    if group.get("l1"):
        grad = grad + group["l1"] * param.sign()
    return grad


def penalized(
    group: Group, grad: Tensor, param: Tensor, is_decoupled: bool
) -> tuple[Tensor, Tensor]:
    """Gradient and parameter with the penalties in the one or in the other."""
    if is_decoupled:
        return -grad if group["maximize"] else grad, decayed(group, param)
    return penalized_grad(group, grad, param), param


def penalty_numbers(group: Group, is_decoupled: bool = False) -> dict[str, float]:
    """What an update multiplies penalties with, see Rule.numbers."""
    l1 = group.get("l1") or 0.0
    if is_decoupled:
        return {"weight_decay": 0.0, "lr * l1": group["lr"] * l1 if l1 else l1}
    return {"weight_decay": group["weight_decay"], "l1": l1}


def decayed(group: Group, param: Tensor) -> Tensor:
    """``param - lr * (weight_decay * param + l1 * sign(param))``: decoupled penalties."""
    lr = number(group["lr"])
    l1_step = lr * group["l1"] * param.sign() if group.get("l1") else None
    if group["weight_decay"] != 0:
        param = param * (1 - lr * group["weight_decay"])
    return param if l1_step is None else param - l1_step


def number(value: float | Tensor) -> float | Tensor:
    """A hyperparameter as a number or a 0-dim tensor, no integer one: divided by a number, that
    would have torch's default dtype."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return value
    is_integer = not (value.is_floating_point() or value.is_complex())
    return value.squeeze().to(torch.float32 if is_integer else value.dtype)


def numbers_as_scalars(group: Group) -> Group:
    """The group with its tensors of one element, of whatever shape, as 0-dim tensors: any other
    would broadcast a 0-dim parameter."""
    return {
        name: number(value) if isinstance(value, Tensor) and value.numel() == 1 else value
        for name, value in group.items()
    }


def lerp_weight(weight: float | Tensor, like: Tensor) -> float | Tensor:
    """torch.lerp takes a tensor weight only in the dtype and on the device of its ends."""
    return weight.to(like) if isinstance(weight, Tensor) else weight


def bias_corrections(betas: Iterable[float | Tensor], step: float) -> list[float]:
    """``1 - beta ** step`` for the decay of the first and of the second moment.

    Raises:
        ArithmeticError, RuntimeError: one has no meaning; the second is the radicand of a root.
    """
    corrections = []
    for i, beta in enumerate(map(float, betas)):
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
    return corrections


def add_sparse(tensor: Tensor, other: Tensor, alpha: float = 1.0) -> None:
    """``tensor.add_(other, alpha=alpha)`` for a sparse ``other``. If ``tensor`` is a view or has
    unusual strides, torch's own writes to memory beside it (torch 2.13)."""
    if tensor.is_sparse or not other.is_sparse:
        tensor.add_(other, alpha=alpha)
        return
    other = other.coalesce()
    indices, values = other._indices(), other._values().to(tensor.dtype)
    if len(indices) == 1:
        tensor.index_add_(0, indices[0], values, alpha=alpha)
    elif len(indices) == 0:
        tensor.add_(values.sum(0), alpha=alpha)
    else:
        tensor.index_put_(tuple(indices), alpha * values, accumulate=True)
