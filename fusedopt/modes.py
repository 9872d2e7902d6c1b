"""Which way parameters take for which there is no native step: torch's own implementations, or the
rule. Decided by what is known of them, without touching a tensor."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _get_capturable_supported_devices
from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices

from .formats import HALVES
from .rule import STORAGE_OPTIONS, Group, Rule


class Mode(enum.Enum):
    """torch's implementations by their names there, and the rule over lists or one by one."""

    FUSED = "fused"
    FOREACH = "foreach"
    LOOP = "for-loop"
    RULE = "rule"
    ALONE = "rule, parameter by parameter"


class Kind(NamedTuple):
    """What parameters have in common that take one way together."""

    device: str
    dtype: torch.dtype
    is_uniform: bool  # gradients and state have this dtype too,
    is_aligned: bool  # and the strides of their parameter, which have no gaps
    counts_on_device: bool
    is_first: bool  # it is this step that gives the state its values
    is_scaled: bool  # gradients are multiplied with a factor first
    is_lazy: bool = False  # gradients are negated, or zeros without memory


@functools.cache
def _has_kernel(operator: str, overload: str, device: str) -> bool:
    packet = getattr(torch.ops.aten, operator, None)
    if packet is None or overload not in packet.overloads():
        return False
    name = f"aten::{operator}" if overload == "default" else f"aten::{operator}.{overload}"
    key = torch._C._dispatch_key_for_device(device)
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, key))


class Torch(NamedTuple):
    """What an installed torch can do."""

    # (aten's name of an operator, of its overload, type of device) -> whether there is a kernel
    has_kernel: Callable[[str, str, str], bool] = _has_kernel
    foreach_devices: tuple[str, ...] = tuple(_get_foreach_kernels_supported_devices())
    # On which the implementations that are not fused take counts.
    counting_devices: tuple[str, ...] = tuple(_get_capturable_supported_devices())


INSTALLED = Torch()


def own_options(rule: Rule, group: Group) -> list[str]:
    """Options that are on and that torch does not compute. (``capturable`` says where steps are
    counted; torch's loop is told that by itself.)"""
    on = [name for name in ("l1", *rule.switches) if group.get(name)]
    on = [name for name in on if name != "capturable"]
    return on + [name for name in STORAGE_OPTIONS if group.get(name) is not None]


def choose(
    rule: Rule, options: frozenset[str] | None, group: Group, kind: Kind, have: Torch = INSTALLED
) -> Mode:
    """The fastest way that is right. ``options``: those of torch's class, None if it has none.

    Half precision is computed in float32, which of torch's implementations only those do that are
    fused; on the CPU the rule then gives the same bits whether gradients are scaled or not.
    """
    tensors = [(name, value) for name, value in _values(group) if isinstance(value, Tensor)]
    on_device = [name for name, value in tensors if not value.is_cpu]
    by_rule = Mode.ALONE if tensors or kind.counts_on_device else Mode.RULE
    if options is None or own_options(rule, group) or kind.is_first or not kind.is_uniform:
        return by_rule
    if kind.device == "cpu" and kind.dtype not in HALVES and _is_one_sum(rule, group):
        return Mode.FOREACH
    if _is_fused(rule, options, group, kind, have) and set(on_device) <= {"lr"}:
        return Mode.FUSED
    can_count = "capturable" in options and kind.device in have.counting_devices
    if kind.dtype in HALVES or (kind.counts_on_device and not can_count):
        return by_rule
    if on_device and not kind.counts_on_device:
        return by_rule
    # torch writes the gradient that looks ahead over the one that it was given.
    overwrites = group.get("nesterov") and not (group["weight_decay"] or group["maximize"])
    is_right = rule.stock_over_lists_is_right and not overwrites
    if kind.device in (*have.foreach_devices, "cpu") and is_right:
        return Mode.FOREACH
    return by_rule if kind.device == "cpu" else Mode.LOOP


def _is_one_sum(rule: Rule, group: Group) -> bool:
    """Whether only a multiple of the gradient is added, for which torch's operator over lists is
    made; the fused one calls its threads to each tensor. A step of 1,000 x 64 takes 2.3 us for each
    of them, and fused 3.1 (two cores of a Zen 4, 2026-11)."""
    has_state = rule.scalars or rule.slots_of(group)
    return not (has_state or group["weight_decay"] or group["maximize"])


def _values(group: Group) -> Iterator[tuple[str, Any]]:
    """The options, of those that are pairs each number."""
    for name, value in group.items():
        if name not in ("params", "param_names"):
            for number in value if isinstance(value, (tuple, list)) else (value,):
                yield name, number


def _is_fused(rule: Rule, options: frozenset[str], group: Group, kind: Kind, have: Torch) -> bool:
    if "fused" not in options or not kind.is_aligned or group.get("amsgrad"):
        return False  # amsgrad: it drops a NaN that the others keep
    if kind.dtype in HALVES and (kind.is_scaled or kind.device in ("cpu", "mps")):
        return False  # scaled gradients may have no place in half precision once they are unscaled
    lr = group["lr"]
    is_on_device = isinstance(lr, Tensor) and not lr.is_cpu
    operator = fused_operator(rule, group)
    return have.has_kernel(operator, "tensor_lr" if is_on_device else "default", kind.device)


def fused_operator(rule: Rule, group: Group) -> str:
    """The name that torch's operator has, where there is one."""
    return f"_fused_{rule.name}{'w' if group.get('decoupled_weight_decay') else ''}_"
