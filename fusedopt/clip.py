"""Clipping as a function, as torch has it."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from . import dtensor, memory, tensor_kinds
from .grad_norm import NORM, GradNorm, is_left_to_torch


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Clip the gradients of the parameters, in place, to a norm of at most ``max_norm``.

    .. math::
        g \leftarrow g \cdot \min\!\left(1, \frac{\mathrm{max\_norm}}{\lVert g \rVert + 10^{-6}}
        \right)

    To clip and step, ``max_grad_norm=`` of the optimizers is faster: it does not write the
    gradients.

    Args:
        parameters (Tensor or iterable of Tensor): those without a gradient are left out. If there
            are DTensors among them, all processes must pass the same ones, in the same order.
        max_norm (float): the largest norm.
        norm_type (float): norms other than 2 are left to torch (default: 2).
        error_if_nonfinite (bool): raise if the norm is not finite; waits for the device
            (default: False).
        foreach (bool, optional): as in torch, for scaling the gradients.

    Returns:
        The norm before clipping, a 0-dim tensor; of DTensors that of the whole gradients.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set.
        TypeError: a gradient is neither floating point nor complex.

    Differences from torch.nn.utils.clip_grad_norm_: the norm of float16 and bfloat16 gradients is
    summed in float32 and clips with that accuracy; gradients of sparse layout are measured too;
    DTensors may be on several meshes, and the norm is an ordinary tensor.
    """
    max_norm = float(max_norm)
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    given, parameters = parameters, list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    ordinary = not any(map(is_left_to_torch, grads)) and all(
        type(grad) in (Tensor, torch.nn.Parameter) or dtensor.is_dtensor(grad) for grad in grads
    )
    # Other processes may have gradients where this one has none.
    shared = any(map(dtensor.is_dtensor, parameters))
    if float(norm_type) != 2.0 or not (grads or shared) or not ordinary:
        return torch.nn.utils.clip_grad_norm_(
            parameters or given, max_norm, norm_type, error_if_nonfinite, foreach
        )
    clips = GradNorm(torch.zeros).measure(grads, params=parameters)
    norm = next(iter(clips.values()))[NORM].clone()
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, "
            "so it cannot be clipped. To disable this error and scale the gradients by the "
            "non-finite norm anyway, set `error_if_nonfinite=False`"
        )
    typical = ((p if p.grad is None else p.grad) for p in parameters) if shared else grads
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in typical)).to_real()
    accurate = norm.to(torch.promote_types(dtype, torch.float32))
    factor = (max_norm / (accurate + 1e-6)).clamp(max=1.0)
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in map(dtensor.local, grads):
        if not memory.is_zero(grad):  # which cannot be written, and stays what it is
            by_device.setdefault(grad.device, []).append(grad)
    for device, shards in by_device.items():
        if foreach is False or any(map(tensor_kinds.is_lazy_view, shards)):
            for shard in shards:
                shard.mul_(factor.to(device))
        else:
            torch._foreach_mul_(shards, factor.to(device))
    return norm.to(dtype)
