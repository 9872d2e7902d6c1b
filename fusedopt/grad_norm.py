"""The norm of all gradients together, measured in one native call per device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import backend, dtensor, memory, tensor_kinds

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# What a clip tensor begins with: one per device, in the widest dtype there. The native module keeps
# more behind it.
NORM, FACTOR, SKIP = range(3)
_HEADER = 4


_HOST = torch.device("cpu")

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
        self._shardings: Any = None  # the native module's memory of which DTensors are cut alike
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
        return self._combined(meshes, clips, max_norm, skip_nonfinite)

    def measure_ordinary(
        self, params: list[Tensor], max_norm: float
    ) -> dict[torch.device, Tensor] | None:
        """As :meth:`measure`, without a loss scale, if their gradients are ordinary tensors or
        shards of DTensors; else None, and nothing is changed."""
        if backend.native is None or tensor_kinds.is_transforming():
            return None
        if self._shardings is None:
            self._shardings = backend.native.Shardings()
        found = backend.native.ordinary_gradients(params, self._shardings)
        if found is None:
            return None
        buckets: dict[Bucket, list[Tensor]] = {}
        for spec, shards in found:
            mesh, copies = (None, 1) if spec is None else dtensor.held_by(spec)
            if shards:
                buckets.setdefault((shards[0].device, mesh, copies), []).extend(shards)
        if not buckets or not all(backend.runs_on(device) for device, _, _ in buckets):
            return None
        for bucket, shards in buckets.items():
            if bucket not in self._clip:
                self._clip[bucket] = self._new_clip(_HEADER, bucket)
            if self._native_norm(bucket, shards, None, max_norm, False) is not None:
                return None
        meshes = [*dict.fromkeys(spec.mesh for spec, _ in found if spec is not None)]
        return self._combined(meshes, {b: self._clip[b] for b in buckets}, max_norm, False)

    def on_host(self) -> dict[torch.device, Tensor] | None:
        """The clip tensor for gradients on the CPU that are all there are, if it is there already
        and the next norm is not part of a transformation."""
        bucket = _HOST, None, 1
        if bucket not in self._clip or tensor_kinds.is_transforming():
            return None
        return {_HOST: self._clip[bucket]}

    def _combined(
        self,
        meshes: list[DeviceMesh],
        clips: dict[Bucket, Tensor],
        max_norm: float,
        skip_nonfinite: bool,
    ) -> dict[torch.device, Tensor]:
        if len(clips) > 1 or meshes:
            norm = _norm_over(meshes, clips)
            combined = _clip_of(norm, max_norm, skip_nonfinite)
            for clip in clips.values():
                clip[:_HEADER] = backend.moved(combined, clip.device)
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
        if any(map(is_left_to_torch, grads)) or (grads and tensor_kinds.is_transforming()):
            clip = _clip_of(_norm(grads, loss_scale), max_norm, skip_nonfinite)
            return memory.materialized(clip)
        if bucket not in self._clip:
            self._clip[bucket] = self._new_clip(_HEADER, bucket)
        if not grads:
            self._clip[bucket][:_HEADER] = 0
            return self._clip[bucket]
        if not backend.runs_on(device):
            return by_torch()
        answer = self._native_norm(bucket, grads, loss_scale, max_norm, skip_nonfinite)
        if answer is None:
            return self._clip[bucket]
        if answer is False:
            return by_torch()
        unusual = set(answer)
        grads = [_flat(grad) if i in unusual else grad for i, grad in enumerate(grads)]
        return self._measure(bucket, grads, max_norm, loss_scale, skip_nonfinite)

    def _native_norm(self, bucket: Bucket, grads: list[Tensor], *options: Any) -> Any:
        """None if it is measured, False if torch has to do it, or which gradients are unusual."""
        while True:
            clip = self._clip[bucket]
            backend.use_on_stream(clip, self._streams)
            threads = torch.get_num_threads()
            answer = backend.native.grad_norm(grads, clip, *options, threads)
            if answer is None or answer is False or isinstance(answer, list):
                return answer
            self._outgrown.append(clip)
            self._clip[bucket] = self._new_clip(answer, bucket)

    def _new_clip(self, size: int, bucket: Bucket) -> Tensor:
        device = bucket[0]
        return self._zeros(size, dtype=backend.widest_float(device), device=device)


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


def is_left_to_torch(grad: Tensor) -> bool:
    """Whether only torch's operators can measure it."""
    return tensor_kinds.is_unusual(grad) and (
        grad.layout is torch.strided or tensor_kinds.has_own_operators(grad)
    )


def _norm_of(grad: Tensor, factor: float | Tensor) -> Tensor:
    norm: Tensor
    if not is_left_to_torch(grad):
        norm = torch.linalg.vector_norm(backend.widened(_flat(grad)) * factor)
        return norm
    try:
        parts = grad.detach().unbind() if grad.is_nested else (grad.detach(),)
        norms = [backend.widened(_as_ordinary(torch.linalg.vector_norm(part))) for part in parts]
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
    dtype = backend.widest_float(norm.device)
    return torch.tensor(norm.item(), dtype=dtype, device=norm.device)


def _norm(grads: Sequence[Tensor], loss_scale: Tensor | None) -> Tensor:
    # Unscaled first, as in the kernels: the squares of what is scaled may leave float64.
    factor = 1.0 if loss_scale is None else backend.widened(loss_scale).reciprocal()
    norms = [_norm_of(grad, factor) for grad in grads]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def _norm_over(meshes: Sequence[DeviceMesh], clips: dict[Bucket, Tensor]) -> Tensor:
    """The norm of all that was measured, with what other processes of these meshes measured. Those
    of one mesh get the same bits: what each of them holds counts as its mean, if they differ."""
    first = next(iter(clips.values()))
    norms = [backend.moved(clip[NORM], first.device) for clip in clips.values()]
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
    return torch.stack([norm, factor, skip.to(norm.dtype), torch.zeros_like(norm)])
