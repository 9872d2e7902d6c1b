"""Copies between a device and the host, in the background, and the host memory that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

# What a copy, or the place in a stream, can be waited for with; its link knows what it is.
Event = Any
Item = TypeVar("Item")


class Link:
    """Copies between host buffers, at once: what a device does in the background, done by the host.
    It stands in where there is no device (``device="cpu"``).

    No order between copies may be relied on but that of ``after``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def enter(self) -> None:
        """In a thread that uses this link alone."""

    def memory(self, size: int) -> Tensor:
        """Bytes that copies to and from the device can reach."""
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def released(self, memory: Tensor) -> None:
        """Nobody reads what is in it any more. (Tests look here.)"""

    def mark(self) -> Event:
        """The end of what the device was given to do in the current stream."""

    def download(self, source: Tensor, target: Tensor, after: list[Event]) -> Event:
        """Device to host. The source may be forgotten, but not written, before it is done."""
        target.copy_(source)

    def upload(self, sources: list[Tensor], targets: list[Tensor], after: list[Event]) -> Event:
        """Host to device. The sources must not be written before it is done."""
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    def wait(self, event: Event) -> None:
        """The host waits."""

    def is_done(self, event: Event) -> bool:
        """Whether the host would not have to wait."""
        return True

    def join(self, event: Event) -> None:
        """What the device is given to do from now on in the current stream waits."""


class CudaLink(Link):
    """By the copy engines of a GPU, in a stream for each direction, between its memory and pinned
    memory of the host."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._down, self._up = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def enter(self) -> None:
        torch.cuda.set_device(self.device)  # else a context is made on the first of all

    def memory(self, size: int) -> Tensor:
        try:
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"could not pin {size:,} bytes of host memory, which copies to and from "
                f"{self.device} need ({error}); give the process more memory to lock"
            ) from error

    def mark(self) -> Event:
        return _end_of(torch.cuda.current_stream(self.device))

    def download(self, source: Tensor, target: Tensor, after: list[Event]) -> Event:
        self._copy(self._down, [source], [target], after)
        source.record_stream(self._down)  # its memory is not given to others before
        return _end_of(self._down)

    def upload(self, sources: list[Tensor], targets: list[Tensor], after: list[Event]) -> Event:
        self._copy(self._up, sources, targets, after)
        for target in targets:
            target.record_stream(self._up)
        return _end_of(self._up)

    def wait(self, event: Event) -> None:
        event.synchronize()

    def is_done(self, event: Event) -> bool:
        return bool(event.query())

    def join(self, event: Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def _copy(
        self,
        stream: torch.cuda.Stream,
        sources: list[Tensor],
        targets: list[Tensor],
        after: list[Event],
    ) -> None:
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)


def consecutive(
    items: Iterable[Item],
    most: int,
    size_of: Callable[[Item], int],
    device_of: Callable[[Item], torch.device],
) -> list[list[Item]]:
    """Those that follow each other on one device: so many bytes together, or one that has more."""
    parts: list[list[Item]] = []
    device, size = None, 0
    for item in items:
        if device_of(item) != device or size + size_of(item) > most:
            parts.append([])
            device, size = device_of(item), 0
        parts[-1].append(item)
        size += size_of(item)
    return parts


def _end_of(stream: torch.cuda.Stream) -> torch.cuda.Event:
    # Of which the host waits without using a core.
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event


def make_link(device: torch.device) -> Link:
    return CudaLink(device) if device.type == "cuda" else Link(device)
