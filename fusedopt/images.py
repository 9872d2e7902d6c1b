"""Parameters that have an image on the host, which is stepped there as an ordinary parameter."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import dtensor, hooks
from .buckets import Slot, Slots

if TYPE_CHECKING:
    from .chunks import Chunk
    from .record import Record

_ALIGNMENT = 64  # bytes: a cache line, of which no two tensors have a part
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Image(Slot):
    """A parameter, and on the host an image of it with the same dtype and the same bits."""

    __slots__ = ("_is_sharded", "belongs_to", "image", "image_held", "offset", "seen")

    def __init__(self, param: Any, g: int, i: int) -> None:
        super().__init__(param, g, i)
        self._is_sharded = dtensor.is_dtensor(param)
        # The chunk, which holds the image: in a circle, the memory would outlive both for a while.
        self.belongs_to: weakref.ref[Chunk]
        self.image: Any = None
        self.image_held: Tensor  # of a DTensor the shard
        self.offset = 0  # in bytes, in the memory of its chunk
        self.seen: tuple[int, ...] = ()  # who the parameter was when the image had its bits

    @property
    def chunk(self) -> Chunk:
        chunk = self.belongs_to()
        assert chunk is not None, "the queue has it"
        return chunk

    @property
    def held(self) -> Tensor:
        """What this process holds of the parameter."""
        held: Tensor = dtensor.local(self.param) if self._is_sharded else self.param
        return held

    @property
    def size(self) -> int:
        """In bytes, in the memory of the chunk."""
        return -(-self.held.nbytes // _ALIGNMENT) * _ALIGNMENT

    def make_image(self, memory: Tensor) -> None:
        self.image = self.alike(dtensor.local(self.in_memory(memory)))
        self.image_held = dtensor.local(self.image)
        self.image_held.copy_(self.held.detach())
        self.has_its_bits()

    def in_memory(self, memory: Tensor) -> Any:
        """A tensor like the parameter in its place of the memory of a chunk."""
        held = self.held
        place = memory[self.offset : self.offset + held.nbytes].view(held.dtype)
        return dtensor.with_local(self.param, place.as_strided(held.shape, held.stride()))

    def alike(self, held: Tensor) -> Any:
        """A tensor like the parameter that takes the gradients that it may have."""
        alike = dtensor.with_local(self.param, held)
        if hasattr(alike, "grad_dtype"):  # which the parameter may have been given
            alike.grad_dtype = None
        return alike

    def has_its_bits(self) -> None:
        """From now on, or when what runs is done."""
        self.seen = self._identity()

    def is_changed(self) -> bool:
        """Whether somebody else wrote the parameter since it had the bits of the image."""
        return self.seen != self._identity()

    def counts_alone(self) -> bool:
        """Whether nobody else is counted in its version: no other view of the same memory."""
        return bool(self.held.untyped_storage().nbytes() == self.held.nbytes)

    def count_write(self) -> None:
        """Autograd is to notice that the parameter has other bits now, or will have."""
        increment_version(self.param)
        self.has_its_bits()

    def problem(self, device: torch.device) -> str | None:
        """Why the image and the parameter, which was on this device, cannot be copied to each
        other, if they cannot."""
        held, image = self.held, self.image_held
        if held.shape == image.shape and held.dtype is image.dtype and held.device == device:
            return None
        for name, then in (("shape", image.shape), ("dtype", image.dtype), ("device", device)):
            if (now := getattr(held, name)) != then:
                return f"its {name} was {then} when offload() was called, and is {now} now"
        return None

    def _identity(self) -> tuple[int, ...]:
        held = self.held
        return self.param._version, held._version, held.data_ptr()


def _can_have_image(param: Any, device_type: str, least: int) -> bool:
    """Whether a parameter is on such a device, has at least so many elements, and is an ordinary
    tensor whose elements are side by side in memory."""
    held = dtensor.local(param)
    if type(held) not in (Tensor, torch.nn.Parameter) or held.device.type != device_type:
        return False
    if held.layout is not torch.strided or held.dtype not in _DTYPES:
        return False
    if held.numel() < least or not hooks.can_require_grad(param):
        return False
    if held.data_ptr() % held.element_size():
        return False
    dense = torch.empty_like(held, device="meta", memory_format=torch.preserve_format)
    return bool(dense.stride() == held.stride())


def new_slots(records: list[Record], known: Slots, device_type: str, least: int) -> list[Slot]:
    """Of the parameters that have none; with an image where they can have one. The steps of those
    that share memory are seen by each other, and by no image: they stay where they are.

    Raises:
        ValueError: one shares memory with a parameter that has an image.
    """
    shared = _sharing_memory(record.param for record in records)
    has_image = any(isinstance(known.get(key), Image) for key in shared)
    slots: list[Slot] = []
    for record in (record for record in records if id(record.param) not in known):
        is_shared = id(record.param) in shared
        if is_shared and has_image:
            raise ValueError(
                f"{record.describe()}: it shares memory with a parameter that is offloaded; give "
                "both to offload() at once, or a parameter memory of its own"
            )
        kind = Slot
        if not is_shared and _can_have_image(record.param, device_type, least):
            kind = Image
        slots.append(kind(record.param, record.g, record.i))
    return slots


def _sharing_memory(params: Iterable[Any]) -> set[int]:
    """The ids of those whose memory reaches into that of another."""
    ranges = []
    for param in params:
        held = dtensor.local(param)
        is_plain = type(held) in (Tensor, torch.nn.Parameter) and held.layout is torch.strided
        if is_plain and held.numel() and not held.is_meta:
            steps = zip(held.shape, held.stride(), strict=True)
            last = sum((n - 1) * stride for n, stride in steps)
            begin = held.data_ptr()
            ranges.append((begin, begin + (last + 1) * held.element_size(), id(param)))
    shared: set[int] = set()
    furthest, reach = 0, 0
    for begin, end, key in sorted(ranges):
        if begin < reach:
            shared.update((key, furthest))
        if end > reach:
            furthest, reach = key, end
    return shared
