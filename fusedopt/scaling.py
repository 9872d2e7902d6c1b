"""What a step multiplies gradients with, and whether it is skipped: from a ``GradScaler``, which
sets ``grad_scale`` and ``found_inf`` for the step, and from clipping."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import backend, dtensor, memory, options, tensor_kinds
from .grad_norm import FACTOR, SKIP, GradNorm

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer
    from .record import Members

# found_inf, loss scale and clip tensor (see grad_norm), or None where there is none.
OfDevice = tuple[Tensor | None, Tensor | None, Tensor | None]
Scaling = dict[torch.device, OfDevice]


def repeat_clipped(plan: Any, members: Members, norm: GradNorm) -> bool:
    """Takes a native step that is the last one once more, in one call that measures what clips it
    too. False if it is not that, or there is more to it than clipping; then nothing has changed."""
    core, max_norm = members.optimizer._core, members.optimizer.max_grad_norm
    if plan is None or max_norm is None or core.amp_fused or members.hidden_grads():
        return False
    options.check_max_grad_norm(max_norm)
    core._clips = norm.on_host()
    if core._clips is None:
        return False
    (clip,) = core._clips.values()
    threads = torch.get_num_threads()
    done: bool = plan.repeat_clipped(members.groups, members.state, threads, clip, max_norm)
    return done


@torch.no_grad()
def read(
    optimizer: FusedOptimizer, norm: GradNorm, params: list[Any] | None = None
) -> Scaling | None:
    """Of the step that begins. Measures the norm of all gradients where that is asked for.
    ``params``: whose gradients these are, if not the optimizer's.

    Raises:
        RuntimeError: ``found_inf`` or ``grad_scale`` has no memory, or a gradient cannot be
            measured.
    """
    core, max_norm = optimizer._core, optimizer.max_grad_norm
    core._clips = None
    if max_norm is None and not core.amp_fused:
        return None
    options.check_max_grad_norm(max_norm)
    if params is None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
    if max_norm is not None and not core.amp_fused:
        core._clips = norm.measure_ordinary(params, max_norm)
        if core._clips is not None:
            return {device: (None, None, clip) for device, clip in core._clips.items()}
    grads = [grad for p in params if (grad := p.grad) is not None]
    devices = dict.fromkeys(grad.device for grad in grads)

    def on_devices(name: str) -> dict[torch.device, Tensor]:
        value = getattr(optimizer, name, None) if core.amp_fused else None
        if value is None:
            return {}
        if (problem := memory.reading_problem(value)) is not None:
            raise RuntimeError(f"fusedopt.{type(optimizer).__name__}: {name} {problem}")
        if dtensor.is_dtensor(value):
            value = value.full_tensor()
        scalars = {d: torch.as_tensor(value, dtype=torch.float32, device=d) for d in devices}
        return {d: memory.materialized(scalar).reshape(()) for d, scalar in scalars.items()}

    found_inf, scale = on_devices("found_inf"), on_devices("grad_scale")
    clips: dict[torch.device, Tensor] = {}
    if max_norm is not None:
        clips = norm.measure(grads, max_norm, scale, core.amp_fused, params)
        core._clips = clips
    return {d: (found_inf.get(d), scale.get(d), clips.get(d)) for d in devices}


def on(device: torch.device, scales: Scaling) -> OfDevice:
    """The scales of a step on a device, which may have none of its own. What is measured or set
    for the next step does not change them."""
    of_device = scales.get(device) or next(iter(scales.values()), (None, None, None))
    found_inf, scale = (t if t is None else t.to(device, copy=True) for t in of_device[:2])
    clip = of_device[2]
    return found_inf, scale, None if clip is None else backend.moved(clip.clone(), device)


def on_host(scales: Scaling | None) -> Scaling | None:
    """The scales of a step for what is taken on the CPU."""
    cpu = torch.device("cpu")
    return None if scales is None else {cpu: on(cpu, scales)}


def skips(of_device: OfDevice) -> bool:
    found_inf, _, clip = of_device
    return any(
        flag is not None and tensor_kinds.number(flag) not in (None, 0)
        for flag in (found_inf, None if clip is None else clip[SKIP])
    )


def is_skipped(scales: Scaling | None) -> bool:
    return scales is not None and any(map(skips, scales.values()))


def grad_factor(of_device: OfDevice) -> Tensor | None:
    _, loss_scale, clip = of_device
    factor = None if clip is None else clip[FACTOR]
    if loss_scale is not None:
        factor = backend.widened(loss_scale).reciprocal() * (1.0 if factor is None else factor)
    return None if factor is None else memory.materialized(factor)
