"""Chunks of parameters on the host, and the gradients that come for them."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import dtensor, formats
from .buckets import group_of
from .images import Image
from .link import Event, Link
from .record import Members
from .scaling import Scaling
from .stepper import Stepper

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


class Slab:
    """Host memory for the gradients of a chunk, and the places of gradients in it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self._places: dict[Image, Any] = {}

    def place_of(self, slot: Image) -> Any:
        if slot not in self._places:
            self._places[slot] = slot.in_memory(self.memory)
        return self._places[slot]


class Slabs:
    """Of one device; they are used again and again."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._lock = threading.Lock()  # a worker gives back what the hooks take
        self._free: list[Slab] = []
        self._size = 0  # of all

    def take(self, size: int, limit: float) -> Slab | None:
        """At least so many bytes; None if there are more than ``limit``, of which some will be
        given back."""
        with self._lock:
            if fitting := [slab for slab in self._free if slab.memory.nbytes >= size]:
                slab = min(fitting, key=lambda slab: slab.memory.nbytes)
                self._free = [other for other in self._free if other is not slab]
                return slab
            free = sum(slab.memory.nbytes for slab in self._free)
            if self._size + size > limit:
                if free < self._size:
                    return None
                self._free, self._size = [], 0
            slab = Slab(self.link.memory(size))
            self._size += size
            return slab

    def provide(self, sizes: list[int]) -> None:
        """Makes what will be needed."""
        slabs = [self.take(size, float("inf")) for size in sizes]
        for slab in slabs:
            if slab is not None:
                self.give_back(slab)

    def give_back(self, slab: Slab) -> None:
        self.link.released(slab.memory)
        with self._lock:
            self._free.append(slab)


class Arrived:
    """The gradients of a chunk for one step, and the copies that bring them."""

    def __init__(self, slabs: Slabs, slab: Slab) -> None:
        self._slabs, self._slab = slabs, slab
        self._link = slabs.link
        self.grads: dict[Image, Any] = {}
        self._events: list[Event] = []

    def add(self, slot: Image, grad: Any, after: list[Event]) -> Event:
        """Starts the copy of a gradient. Its memory may be given up at once."""
        held = dtensor.local(dtensor.placed_like(grad, slot.param)).detach()
        if _is_like(held, slot.image_held):
            place = self._slab.place_of(slot)
            event = self._link.download(held, dtensor.local(place), after)
            self._events.append(event)
        else:  # of which it is not known before what memory it has
            place = dtensor.with_local(slot.param, held.to("cpu", copy=True))
            event = None
        self.grads[slot] = place
        return event

    def refresh(self, slot: Image, after: list[Event]) -> None:
        """The image takes the bits that somebody gave the parameter."""
        held = slot.held.detach()
        self._events.append(self._link.download(held, slot.image_held, after))

    def wait(self) -> None:
        for event in self._events.copy():  # a worker waits, too
            self._link.wait(event)

    def release(self) -> None:
        self.grads.clear()
        self._slabs.give_back(self._slab)


class Chunk:
    """Parameters that follow each other, whose images are stepped together when their gradients are
    there, and sent back together."""

    def __init__(self, slots: list[Image], slabs: Slabs, num_threads: int) -> None:
        self.images, self.slabs, self.link = slots, slabs, slabs.link
        self.stepper = Stepper(num_threads)
        self.size = 0
        for slot in slots:
            slot.belongs_to, slot.offset = weakref.ref(self), self.size
            self.size += slot.size
        self._memory = self.link.memory(self.size)
        for slot in slots:
            slot.make_image(self._memory)
        # The state of the images: the same dicts as in the optimizer, where the parameters have it.
        self._state: dict[Any, Any] = {}
        self.arrived: Arrived | None = None  # for the next step
        self.running: Future[None] | None = None
        self.stepped: list[Image] = []  # in the step that runs
        self.uploaded: Event | None = None

    def grads(self) -> dict[Image, Any]:
        return {} if self.arrived is None else self.arrived.grads

    def is_complete(self) -> bool:
        return len(self.grads()) == len(self.images)

    def check(self, optimizer: FusedOptimizer, slot: Image) -> None:
        """Raises RuntimeError if an image cannot be copied to its parameter."""
        if (problem := slot.problem(self.link.device)) is not None:
            who = optimizer._members().describe_param(slot.param)
            raise RuntimeError(f"{who}: {problem}")

    def prepare(self, optimizer: FusedOptimizer, seeds: dict[Any, Tensor]) -> Members:
        """The members of a step on the host. Options are those of now, whatever becomes of them
        until it is taken."""
        by_group: dict[int, list[Image]] = {}
        for slot in self.images:
            by_group.setdefault(slot.g, []).append(slot)
            entries = optimizer.state.get(slot.param)
            if entries is None:
                self._state.pop(slot.image, None)
            else:
                self._state[slot.image] = entries
        groups = []
        for slots in by_group.values():
            group = group_of(optimizer, slots)
            del group["params"]
            group = {name: _as_now(value) for name, value in group.items()}
            groups.append({**group, "params": [slot.image for slot in slots]})
        places = [[(slot.g, slot.i) for slot in slots] for slots in by_group.values()]
        members = Members(optimizer, groups, self._state, places)
        members.owner = self._state
        members.seeds = {s.image: seeds[s.param] for s in self.images if s.param in seeds}
        return members

    def run(
        self,
        arrived: Arrived,
        members: Members,
        scales: Scaling | None,
        targets: list[Tensor],
        mark: Event,
    ) -> None:
        """Called by the worker. ``targets``: the memory of the parameters, which the device reads
        until the mark."""
        slots = self.stepped
        try:
            self.link.enter()
            arrived.wait()
            if self.uploaded is not None:
                self.link.wait(self.uploaded)  # it reads the images
            for slot, grad in arrived.grads.items():
                slot.image.grad = grad
            self.stepper.step_scaled(members, scales)
        finally:
            for slot in slots:
                slot.image.grad = None
            arrived.release()
        sources = [slot.image_held for slot in slots]
        self.uploaded = self.link.upload(sources, targets, [mark])

    def finish(self, optimizer: FusedOptimizer) -> BaseException | None:
        """Waits for the host's part of the step that runs. Returns what it raised."""
        if self.running is None:
            return None
        error = self.running.exception()
        for slot in self.stepped if error is None else ():
            if slot.is_changed() and slot.counts_alone():
                error = RuntimeError(
                    f"{optimizer._members().describe(slot.g, slot.i)}: it was written while its "
                    "step was under way; call optimizer.synchronize() before parameters are used "
                    "otherwise than by their modules"
                )
            else:
                slot.count_write()  # what was computed from it before shall not reach a backward
        for slot in self.images:
            entries = self._state.get(slot.image)
            if entries is not None and optimizer.state.get(slot.param) is not entries:
                optimizer.state[slot.param] = entries
        self.running = None
        return error


def _is_like(grad: Tensor, image: Tensor) -> bool:
    """Whether it has the same elements in memory: their order is that in which norms are summed."""
    if grad.layout is not torch.strided or grad.dtype is not image.dtype:
        return False
    return grad.stride() == image.stride() or formats.same_layout(grad, image)


def _as_now(value: Any) -> Any:
    """An option that whoever changes it later does not change."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_as_now, value))
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
