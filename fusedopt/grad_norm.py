"""The norm of all gradients together, measured in one native call per device."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import backend, dtensor, memory, tensor_kinds

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# What a clip tensor begins with (float64, one per device); the native module keeps more behind it.
NORM, FACTOR, SKIP = range(3)
_HEADER = 4


# Gradients that are measured together: on one device and, if they are DTensors, on one mesh, of
# which as many processes hold the same elements.
Bucket = tuple[torch.device, "DeviceMesh | None", int]


class GradNorm:
    r"""Measures :math:`\lVert g \rVert_2` over all gradients of a step, and what clips it.

    The results stay on the devices of the gradients: nothing waits for a GPU.
    """

    def __init__(self, zeros: Callable[..., Tensor] = backend.lasting_zeros) -> None:
        self._zeros = zeros
        # Kept from step to step, and what has become too small too: a captured graph goes on using
        # the memory.
        self._clip: dict[Bucket, Tensor] = {}
        self._outgrown: list[Tensor] = []
        self._streams: dict[Tensor, int] = {}

    def measure(
        self,
        grads: Iterable[Tensor],
        max_norm: float = float("inf"),
        loss_scale: dict[torch.device, Tensor] | None = None,
        skip_nonfinite: bool = False,
        params: Iterable[Tensor] = (),
    ) -> dict[torch.device, Tensor]:
        """The clip tensor of each device: norm, factor (:math:`\\min(1, \\mathrm{max\\_norm} /
        (\\mathrm{norm} + 10^{-6}))`), and whether to skip the step because the norm is not finite.

        ``loss_scale``: what the gradients of a device are to be divided by first.
        ``params``: the parameters, also those without a gradient. They decide with whom this
        process communicates, in which order, so that all do the same whatever gradients they have.
        """
        grads, params = list(grads), list(params)
        meshes = dtensor.meshes(itertools.chain(params, grads))
        buckets: dict[Bucket, list[Tensor]] = {}
        for grad in grads:
            # Where there are no meshes, none of them is a DTensor.
            shard, mesh, copies = dtensor.measurable(grad) if meshes else (grad, None, 1)
            buckets.setdefault((shard.device, mesh, copies), []).append(shard)
        if meshes and not buckets:
            buckets[dtensor.local(params[0]).device, None, 1] = []
        clips = {}
        for bucket, shards in buckets.items():
            scale = (loss_scale or {}).get(bucket[0])
            clips[bucket] = self._measure(bucket, shards, max_norm, scale, skip_nonfinite)
        if len(clips) > 1 or meshes:
            norm = _norm_over(meshes, clips)
            combined = _clip_of(norm, max_norm, skip_nonfinite)
            for clip in clips.values():
                clip[:_HEADER].copy_(combined, non_blocking=clip.is_cuda)
        return {device: clip for (device, _, _), clip in clips.items()}

    def _measure(
        self,
        bucket: Bucket,
        grads: list[Tensor],
        max_norm: float,
        loss_scale: Tensor | None,
        skip_nonfinite: bool,
    ) -> Tensor:
        device = bucket[0]

        def by_torch() -> Tensor:
            norm = _norm(grads, loss_scale)
            self._clip[bucket][:_HEADER] = _clip_of(norm, max_norm, skip_nonfinite)
            return self._clip[bucket]

        # What these make does not outlive the step.
        if any(map(_is_left_to_torch, grads)) or (grads and tensor_kinds.is_transforming()):
            clip = _clip_of(_norm(grads, loss_scale), max_norm, skip_nonfinite)
            return memory.materialized(clip)
        if bucket not in self._clip:
            self._clip[bucket] = self._zeros(_HEADER, dtype=torch.float64, device=device)
        if not grads:
            self._clip[bucket][:_HEADER] = 0
            return self._clip[bucket]
        if not backend.runs_on(device) or not any(grad.numel() for grad in grads):
            return by_torch()
        backend.use_on_stream(self._clip[bucket], self._streams)
        answer = backend.native.grad_norm(
            grads,
            self._clip[bucket],
            loss_scale,
            max_norm,
            skip_nonfinite,
            torch.get_num_threads(),
        )
        if answer is None:
            return self._clip[bucket]
        if answer is False:
            return by_torch()
        if isinstance(answer, int):
            self._outgrown.append(self._clip[bucket])
            self._clip[bucket] = self._zeros(answer, dtype=torch.float64, device=device)
        else:
            unusual = set(answer)
            grads = [_flat(grad) if i in unusual else grad for i, grad in enumerate(grads)]
        return self._measure(bucket, grads, max_norm, loss_scale, skip_nonfinite)


def _flat(grad: Tensor) -> Tensor:
    """The same elements in memory of their own."""
    if (problem := memory.reading_problem(grad)) is not None:
        raise RuntimeError(f"a gradient of shape {tuple(grad.shape)} {problem}")
    grad = grad.detach()
    if grad.layout is torch._mkldnn:  # type: ignore[attr-defined]
        grad = grad.to_dense()
    elif grad.layout is not torch.strided:
        grad = (grad.coalesce() if grad.layout is torch.sparse_coo else grad).values()
    if grad.is_complex():
        grad = torch.view_as_real(grad.resolve_conj())
    if not grad.is_floating_point():
        raise TypeError(f"gradients of dtype {grad.dtype} have no norm")
    if grad.dtype.itemsize == 1:  # of which torch has no norm either
        return grad.to(torch.float32, memory_format=torch.contiguous_format)
    return grad.clone(memory_format=torch.contiguous_format)


def _is_left_to_torch(grad: Tensor) -> bool:
    """Whether only torch's operators can measure it."""
    return tensor_kinds.is_unusual(grad) and (
        grad.layout is torch.strided or tensor_kinds.has_own_operators(grad)
    )


def _norm_of(grad: Tensor, factor: float | Tensor) -> Tensor:
    norm: Tensor
    if not _is_left_to_torch(grad):
        norm = torch.linalg.vector_norm(_flat(grad).double() * factor)
        return norm
    try:
        parts = grad.detach().unbind() if grad.is_nested else (grad.detach(),)
        norms = [_as_ordinary(torch.linalg.vector_norm(part)).double() for part in parts]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        return norm * factor
    except Exception as error:
        raise TypeError(
            f"a gradient {tensor_kinds.name(grad)} cannot be measured; leave max_grad_norm out, "
            f"and clip it in a way that its class knows before step(): {error}"
        ) from error


def _as_ordinary(norm: Tensor) -> Tensor:
    """What a class of its own computed, for the gradients of other classes beside it."""
    if tensor_kinds.is_fake(norm) or not tensor_kinds.has_own_operators(norm):
        return norm
    return torch.tensor(norm.item(), dtype=torch.float64, device=norm.device)


def _norm(grads: Sequence[Tensor], loss_scale: Tensor | None) -> Tensor:
    # Unscaled first, as in the kernels: the squares of what is scaled may leave float64.
    factor = 1.0 if loss_scale is None else loss_scale.double().reciprocal()
    norms = [_norm_of(grad, factor) for grad in grads]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def _norm_over(meshes: Sequence[DeviceMesh], clips: dict[Bucket, Tensor]) -> Tensor:
    """The norm of all that was measured, with what other processes of these meshes measured. Those
    of one mesh get the same bits: what each of them holds counts as its mean, if they differ."""
    first = next(iter(clips.values()))
    norms = [clip[NORM].to(first.device, non_blocking=first.is_cuda) for clip in clips.values()]
    if not meshes:
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm
    squares: dict[DeviceMesh | None, Tensor] = {}
    for (_, mesh, copies), norm in zip(clips, norms, strict=True):
        square = norm.square() / copies
        squares[mesh] = squares[mesh] + square if mesh in squares else square
    zero = torch.zeros_like(norms[0])
    total = squares.get(None, zero)
    # The largest comes last, for most processes to agree.
    for mesh in sorted(meshes, key=lambda mesh: mesh.size()):
        if mesh.get_coordinate() is not None:  # else this process is not one of them
            total = dtensor.sum_over(total / mesh.size() + squares.get(mesh, zero), mesh)
    return total.sqrt()


def _clip_of(norm: Tensor, max_norm: float, skip_nonfinite: bool) -> Tensor:
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    skip = ~norm.isfinite() if skip_nonfinite else torch.zeros_like(norm, dtype=torch.bool)
    return torch.stack([norm, factor, skip.double(), torch.zeros_like(norm)])


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
    ordinary = not any(map(_is_left_to_torch, grads)) and all(
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
