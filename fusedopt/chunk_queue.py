"""The chunks of an optimizer, and the worker that steps one after the other on the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .chunks import Arrived, Chunk, Slabs
from .images import Image
from .link import Event, Link, consecutive, make_link
from .scaling import Scaling
from .worker import Worker

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

# Chunks whose gradients are on the host while one is stepped, where there is no need for more.
_IN_FLIGHT = 4


class ChunkQueue:
    """``num_threads``: of a step."""

    def __init__(self, num_threads: int) -> None:
        self.chunks: list[Chunk] = []
        self.seeds: dict[Any, Tensor] = {}  # of parameters that may have had no step
        self._num_threads = num_threads
        self._slabs: dict[torch.device, Slabs] = {}
        self._worker = Worker()
        self.under_way: list[FusedOptimizer] = []  # held by the modules that will wait for it
        self._downloads: list[tuple[Link, Event]] = []  # since the last step
        self._arriving: deque[Arrived] = deque()

    def make(self, images: list[Image], size: int, is_limited: bool) -> None:
        """``is_limited``: the gradients of all will not be on the host at once. If there is no
        memory for these images, nothing is changed."""
        chunks = self.chunks.copy()
        for slots in consecutive(images, size, lambda s: s.size, lambda s: s.held.device):
            device = slots[0].held.device
            if device not in self._slabs:
                self._slabs[device] = Slabs(make_link(device))
            chunks.append(Chunk(slots, self._slabs[device], self._num_threads))
        for slabs in self._slabs.values():
            sizes = sorted(chunk.size for chunk in chunks if chunk.slabs is slabs)
            slabs.provide(sizes[-_IN_FLIGHT:] if is_limited else sizes)
        self.chunks = chunks

    # Gradients ------------------------------------------------------------------------------------

    def send(self, optimizer: FusedOptimizer, slot: Image, grad: Any, is_limited: bool) -> Chunk:
        """Takes a gradient to the host. If this raises, it has not been taken."""
        chunk = slot.chunk
        chunk.check(optimizer, slot)
        if slot in chunk.grads():  # another part of the backward has made one
            self.submit(optimizer, chunk, None)
        if chunk.running is not None:
            self.finish(optimizer, [chunk])
        if chunk.arrived is None:
            chunk.arrived = self._place_for(optimizer, chunk, is_limited)
        self._download(chunk, slot, grad, [chunk.link.mark()])
        return chunk

    def _download(self, chunk: Chunk, slot: Image, grad: Any, after: list[Event]) -> None:
        assert chunk.arrived is not None
        if (event := chunk.arrived.add(slot, grad, after)) is not None:
            self._downloads.append((chunk.link, event))

    def join_downloads(self) -> None:
        """Whoever writes gradients that others hold does so when they have been read."""
        downloads, self._downloads = self._downloads, []
        for link, event in downloads:
            link.join(event)

    def _place_for(self, optimizer: FusedOptimizer, chunk: Chunk, is_limited: bool) -> Arrived:
        """Memory for the gradients of a chunk. Where it is limited, it may have to be waited for,
        and others are stepped although they are not complete."""
        others = [other for other in self.chunks if other.slabs is chunk.slabs]
        limit = _IN_FLIGHT * max(other.size for other in others) if is_limited else float("inf")
        while (slab := chunk.slabs.take(chunk.size, limit)) is None:
            if not any(other.running for other in others):
                self.submit(optimizer, next(other for other in others if other.arrived), None)
            self.finish(optimizer, [next(other for other in others if other.running)])
        arrived = Arrived(chunk.slabs, slab)
        # Memory of the device that was read in another stream is used again only when the host has
        # seen that. So it does not run further ahead than this.
        self._arriving.append(arrived)
        if len(self._arriving) > _IN_FLIGHT:
            self._arriving.popleft().wait()
        return arrived

    def grads(self) -> dict[Image, Any]:
        """Those that no step has used yet; they are there after :meth:`wait_for_grads`."""
        return {slot: grad for chunk in self.chunks for slot, grad in chunk.grads().items()}

    def wait_for_grads(self) -> None:
        for chunk in self.chunks:
            if chunk.arrived is not None:
                chunk.arrived.wait()

    def forget_grads(self) -> None:
        self.wait_for_grads()
        self._downloads.clear()
        for chunk in self.chunks:
            arrived, chunk.arrived = chunk.arrived, None
            if arrived is not None:
                arrived.release()

    # Steps ----------------------------------------------------------------------------------------

    def check(self, optimizer: FusedOptimizer, slots: Iterable[Any]) -> None:
        """Raises RuntimeError if these, or those that have gradients on the host, are no longer
        like their images."""
        for slot in (*slots, *self.grads()):
            if isinstance(slot, Image):
                slot.chunk.check(optimizer, slot)

    def step_arrived(self, optimizer: FusedOptimizer, scales: Scaling | None) -> None:
        """Steps what has gradients on the host."""
        for chunk in self.chunks:
            if chunk.grads():
                self.submit(optimizer, chunk, scales)

    def step_from_device(self, optimizer: FusedOptimizer, scales: Scaling | None) -> None:
        """Steps with gradients that are on the device and stay there."""
        self.forget_grads()  # of a step that failed
        for chunk in self.chunks:
            having = [slot for slot in chunk.images if slot.param.grad is not None]
            if having:
                chunk.arrived = self._place_for(optimizer, chunk, True)
                after = [chunk.link.mark()]
                for slot in having:
                    self._download(chunk, slot, slot.param.grad, after)
                self.submit(optimizer, chunk, scales)

    def submit(self, optimizer: FusedOptimizer, chunk: Chunk, scales: Scaling | None) -> None:
        """Has a chunk stepped with the gradients that there are."""
        self.finish(optimizer, [chunk])  # the step before
        members = chunk.prepare(optimizer, self.seeds)
        arrived, chunk.arrived = chunk.arrived, None
        assert arrived is not None
        mark = chunk.link.mark()
        for slot in arrived.grads:
            if slot.is_changed():
                arrived.refresh(slot, [mark, *filter(None, [chunk.uploaded])])
            slot.count_write()
        targets = [slot.held.data for slot in arrived.grads]
        chunk.stepped = [*arrived.grads]
        chunk.running = self._worker.submit(chunk.run, arrived, members, scales, targets, mark)

    def wait_for_uploads(self, chunks: Iterable[Chunk]) -> None:
        """Of steps whose part on the host is done."""
        for chunk in chunks:
            if chunk.uploaded is not None:
                chunk.link.wait(chunk.uploaded)

    def finish(self, optimizer: FusedOptimizer, chunks: Iterable[Chunk]) -> None:
        """Waits for the steps of chunks that run.

        Raises:
            Exception: what the first of them has raised.
        """
        errors: list[BaseException | None] = []
        for chunk in chunks:
            if chunk.running is not None:
                try:
                    errors.append(chunk.finish(optimizer))
                except BaseException as interrupt:  # comes after the step
                    errors += [interrupt, chunk.finish(optimizer)]
            if chunk.uploaded is not None:
                if chunk.link.is_done(chunk.uploaded):
                    chunk.uploaded = None
                else:
                    chunk.link.join(chunk.uploaded)
        if not any(chunk.running for chunk in self.chunks):
            self.under_way.clear()
        for error in filter(None, errors):
            raise error
