"""The state of an optimizer in the memory of the host for a while, in which nobody steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import dtensor
from .link import Link, consecutive, make_link
from .optimizer import FusedOptimizer

_ALIGNMENT = 256  # bytes; more than any access of a kernel needs
# Of one copy. The device needs as much memory beside the state for a moment.
_COPY_BYTES = 2**28


def offload_state(optimizer: FusedOptimizer, *, device: str = "cuda") -> None:
    """Take all state of an optimizer from its devices into pinned memory of the host, in a few
    large copies, until :func:`load_state` brings it back.

    For phases that need the memory for other things, like the generation of samples in
    reinforcement learning, or an evaluation. ``state_dict()`` works meanwhile; ``step()``,
    ``load_state_dict()`` and copies of the optimizer raise RuntimeError. State tensors stay the
    same objects. If it was done already, nothing happens. torch keeps the memory that is free now
    for itself: ``torch.cuda.empty_cache()`` gives it to other processes.

    Args:
        optimizer: any of fusedopt's.
        device (str): the kind of device whose state is taken; ``"cpu"`` tries it without a GPU
            (default: ``"cuda"``).

    Raises:
        TypeError: it is no optimizer of fusedopt's.
        RuntimeError: the host memory cannot be pinned, or it is called within a step. Nothing has
            changed.
    """
    _check(optimizer, "offload_state")
    core, turn = optimizer._core, optimizer._turn
    with turn.exclusively(optimizer._name, "offload_state()"), _ordinary():
        if core.unloaded is None:
            optimizer.synchronize()
            tensors = [tensor for tensor in _state_of(optimizer) if tensor.device.type == device]
            links = {device: make_link(device) for device in {t.device for t in tensors}}
            tensors.sort(key=lambda tensor: str(tensor.device))
            parts = consecutive(tensors, _COPY_BYTES, _size, lambda tensor: tensor.device)
            packs = [Pack(links[part[0].device], part) for part in parts]
            for pack in packs:  # one after the other: each needs memory on the device
                pack.send()
            for pack in packs:
                pack.place(pack.host)
            core.unloaded = packs


def load_state(optimizer: FusedOptimizer) -> None:
    """Bring the state that :func:`offload_state` took back to its devices, bit for bit. If none was
    taken, nothing happens. It has other addresses there: a step that was captured into a CUDA graph
    has to be captured again.

    Raises:
        TypeError: it is no optimizer of fusedopt's.
        RuntimeError: it is called within a step, or the device has no room for the state now
            (``torch.OutOfMemoryError``). Nothing has changed.
    """
    _check(optimizer, "load_state")
    core, turn = optimizer._core, optimizer._turn
    with turn.exclusively(optimizer._name, "load_state()"), _ordinary():
        packs = core.unloaded or []
        on_devices = [pack.received() for pack in packs]
        for pack, memory in zip(packs, on_devices, strict=True):
            pack.place(memory)
        core.unloaded = None


class Pack:
    """Tensors of one device that are copied together, one after the other in memory."""

    def __init__(self, link: Link, tensors: list[Tensor]) -> None:
        self._tensors, self._link = tensors, link
        self._offsets, size = [], 0
        for tensor in tensors:
            self._offsets.append(size)
            size += _size(tensor)
        self.host = self._link.memory(size)

    def send(self) -> None:
        together = torch.empty(self.host.nbytes, dtype=torch.uint8, device=self._link.device)
        torch._foreach_copy_(self._views(together), self._tensors)
        self._link.wait(self._link.download(together, self.host, [self._link.mark()]))

    def received(self) -> Tensor:
        """Memory on the device, with what is in that of the host now."""
        if [t.data_ptr() for t in self._tensors] != [v.data_ptr() for v in self._views(self.host)]:
            torch._foreach_copy_(self._views(self.host), self._tensors)  # others gave it new memory
        memory = torch.empty(self.host.nbytes, dtype=torch.uint8, device=self._link.device)
        self._link.join(self._link.upload([self.host], [memory], [self._link.mark()]))
        return memory

    def place(self, memory: Tensor) -> None:
        """The tensors are there from now on."""
        for tensor, view in zip(self._tensors, self._views(memory), strict=True):
            tensor.data = view

    def _views(self, memory: Tensor) -> list[Tensor]:
        views = []
        for offset, tensor in zip(self._offsets, self._tensors, strict=True):
            strides = torch.empty_like(tensor, device="meta").stride()
            flat = memory[offset : offset + tensor.numel() * tensor.itemsize].view(tensor.dtype)
            views.append(flat.as_strided(tensor.shape, strides))
        return views


@contextlib.contextmanager
def _ordinary() -> Iterator[None]:
    """What is made is ordinary, also if the caller only evaluates."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _check(optimizer: Any, function: str) -> None:
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"{function} takes an optimizer of fusedopt's, got a {type(optimizer).__name__}"
        )


def _state_of(optimizer: FusedOptimizer) -> list[Tensor]:
    """What this process holds of the tensors, each once."""
    values = [value for entries in optimizer.state.values() for value in entries.values()]
    held = [dtensor.local(value) for value in values if isinstance(value, Tensor)]
    return [*{id(tensor): tensor for tensor in held}.values()]


def _size(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.itemsize // _ALIGNMENT) * _ALIGNMENT
