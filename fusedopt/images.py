"""Parameters that have an image on the host, which is stepped there as an ordinary parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import dtensor, hooks
from .buckets import Slot

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

_ALIGNMENT = 64  # bytes: a cache line, of which no two tensors have a part
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Image(Slot):
    """A parameter, and on the host an image of it with the same dtype and the same bits."""

    __slots__ = ("grad_place", "image", "offset", "seen")

    def __init__(self, param: Any, g: int, i: int) -> None:
        super().__init__(param, g, i)
        self.image: Any = None
        self.offset = 0  # in bytes, in the memory of its chunk
        self.seen: tuple[int, ...] = ()  # who the parameter was when the image had its bits

    @property
    def size(self) -> int:
        """In bytes, in the memory of the chunk."""
        nbytes = int(dtensor.local(self.param).nbytes)
        return -(-nbytes // _ALIGNMENT) * _ALIGNMENT

    def in_memory(self, memory: Tensor) -> Any:
        """A tensor like the parameter in its place of the memory of a chunk."""
        held = dtensor.local(self.param)
        place = memory[self.offset : self.offset + held.nbytes].view(held.dtype)
        return dtensor.with_local(self.param, place.as_strided(held.shape, held.stride()))

    def has_its_bits(self) -> None:
        """From now on, or when what runs is done."""
        self.seen = _identity(self.param)

    def is_changed(self) -> bool:
        """Whether somebody else wrote the parameter since it had the bits of the image."""
        return self.seen != _identity(self.param)

    def count_write(self) -> None:
        """Autograd is to notice that the parameter has other bits now, or will have."""
        increment_version(self.param)
        self.has_its_bits()

    def check(self, optimizer: FusedOptimizer) -> None:
        """Raises RuntimeError if the image and the parameter cannot be copied to each other."""
        held, image = dtensor.local(self.param), dtensor.local(self.image)
        for name in ("shape", "dtype"):
            if getattr(held, name) != getattr(image, name):
                raise RuntimeError(
                    f"{optimizer._members().describe_param(self.param)}: its {name} was "
                    f"{getattr(image, name)} when offload() was called, and is "
                    f"{getattr(held, name)} now; detach() the optimizer before changing it"
                )


def _identity(param: Any) -> tuple[int, ...]:
    held = dtensor.local(param)
    return param._version, held._version, held.data_ptr()


def can_have_image(param: Any, device_type: str, least: int) -> bool:
    """Whether a parameter is on such a device, has at least so many elements, and is an ordinary
    tensor whose elements are side by side in memory."""
    held = dtensor.local(param)
    if type(held) not in (Tensor, torch.nn.Parameter) or held.device.type != device_type:
        return False
    if held.layout is not torch.strided or held.dtype not in _DTYPES:
        return False
    if held.numel() < least or not hooks.can_require_grad(param):
        return False
    dense = torch.empty_like(held, device="meta", memory_format=torch.preserve_format)
    return bool(dense.stride() == held.stride())


def consecutive(images: list[Image], size: int) -> list[list[Image]]:
    """Those that follow each other on one device, up to this many bytes together."""
    parts: list[list[Image]] = []
    device, sum_of_sizes = None, 0
    for slot in images:
        where = dtensor.local(slot.param).device
        if where != device or sum_of_sizes + slot.size > size:
            parts.append([])
            device, sum_of_sizes = where, 0
        parts[-1].append(slot)
        sum_of_sizes += slot.size
    return parts
