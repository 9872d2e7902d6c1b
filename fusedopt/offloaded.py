"""The optimizer on the host: gradients come to it in the background, chunks of parameters are
stepped there by a worker, and go back."""

from __future__ import annotations

import os
import weakref
from collections.abc import Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import dtensor, hooks, options, scaling, state
from .buckets import Bucket, Slot
from .chunks import Arrived, Chunk, Image, Slabs
from .grad_norm import NORM, GradNorm
from .link import make_link
from .rule import Group
from .scaling import Scaling

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer
    from .record import Record

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Chunks whose gradients wait while others are stepped.
_IN_FLIGHT = 4

_all: weakref.WeakSet[Offloaded] = weakref.WeakSet()


class Settings(NamedTuple):
    """Arguments of :func:`fusedopt.offload`."""

    gradients: str
    overlap: str | None
    chunk: int
    keep_below: int
    num_threads: int
    device: str | None


class Offloaded(hooks.InBackward):
    """The parameters of an optimizer that are stepped on the host, in chunks, and those that stay
    where they are. State and options are the optimizer's."""

    def __init__(self, optimizer: FusedOptimizer, settings: Settings) -> None:
        super().__init__(optimizer)
        self.settings = settings
        self.chunks: list[Chunk] = []
        self._slots: dict[int, Slot] = {}  # by the id of the parameter
        self._kept = Bucket()
        self._kept_grads: dict[Slot, Any] = {}  # taken from the backward
        self._shown: dict[torch.device, Slot] = {}  # whose gradients a GradScaler still finds
        self._slabs: dict[torch.device, Slabs] = {}
        self._seeds: dict[Any, Tensor] = {}  # of parameters that may have had no step
        self._norm = GradNorm()
        self._backwards: set[int] = set()
        self._accumulated: dict[int, Slot] = {}
        self._worker = _worker()
        self._process = os.getpid()
        _all.add(self)

    # Parameters -----------------------------------------------------------------------------------

    def hook(self) -> None:
        new = [r for r in self.optimizer._members().all() if id(r.param) not in self._slots]
        for record in new:
            self._check(record)
        images: list[Image] = []
        for record in new:
            is_offloaded = self._can_offload(record.param)
            slot = (Image if is_offloaded else Slot)(record.param, record.g, record.i)
            if isinstance(slot, Image):
                images.append(slot)
            else:
                self._kept.slots.append(slot)
            self._slots[id(record.param)] = slot
        self._make_chunks(images)
        if self.settings.gradients == "host":
            for record in new:
                if hooks.can_require_grad(record.param):
                    self.register(record.param)

    def _check(self, record: Record) -> None:
        if record.is_lazy:
            raise ValueError(
                f"{record.describe()}: offload() needs to know its shape; run a forward first"
            )
        for name in ("capturable", "differentiable"):
            if record.group.get(name):
                raise ValueError(
                    f"{record.members.describe_group(record.g)}: {name}=True does not go with "
                    "offload(), whose steps are taken on the host; leave it out"
                )
        if self.settings.gradients == "host":
            hooks.check_free(record.param, record.describe())

    def _can_offload(self, param: Any) -> bool:
        """Others are stepped where they are."""
        held = dtensor.local(param)
        kind = "cuda" if self.settings.device is None else self.settings.device
        if type(held) not in (Tensor, torch.nn.Parameter) or held.device.type != kind:
            return False
        if held.layout is not torch.strided or held.dtype not in FLOATS:
            return False
        if held.numel() < self.settings.keep_below or not hooks.can_require_grad(param):
            return False
        dense = torch.empty_like(held, device="meta", memory_format=torch.preserve_format)
        return bool(dense.stride() == held.stride())

    def _make_chunks(self, images: list[Image]) -> None:
        """Consecutive parameters on one device, up to the size of a chunk."""
        device = None
        chunks: list[list[Image]] = []
        size = 0
        for slot in images:
            where = dtensor.local(slot.param).device
            if where != device or size + slot.size > self.settings.chunk:
                chunks.append([])
                device, size = where, 0
            chunks[-1].append(slot)
            size += slot.size
        for slots in chunks:
            device = dtensor.local(slots[0].param).device
            if device not in self._slabs:
                self._slabs[device] = Slabs(make_link(device))
            self.chunks.append(Chunk(slots, self._slabs[device], self.settings.num_threads))
        for slabs in self._slabs.values():
            sizes = [chunk.size for chunk in self.chunks if chunk.slabs is slabs]
            slabs.provide(sizes if self._steps_all_at_once else sizes[:_IN_FLIGHT])

    @property
    def _steps_all_at_once(self) -> bool:
        """Whether the first gradient is used only when all of them are there."""
        optimizer = self.optimizer
        needs_all = optimizer.max_grad_norm is not None or optimizer.amp_fused
        return needs_all or self.settings.overlap is None or self.settings.gradients == "device"

    def with_images(self, groups: list[Group]) -> list[Group]:
        """The groups, with what the state of their parameters is like in place of these."""

        def image(param: Any) -> Any:
            slot = self._slots.get(id(param))
            return slot.image if isinstance(slot, Image) else param

        return [{**group, "params": [*map(image, group["params"])]} for group in groups]

    # In the backward ------------------------------------------------------------------------------

    def add(self, param: Tensor, backward: int) -> None:
        optimizer = self.optimizer
        with optimizer._turn.lock:
            slot = self._slots[id(param)]
            if self._accumulating:
                self._accumulated[id(param)] = slot
                return
            self._accumulated.pop(id(param), None)
            if backward not in self._backwards:
                self._begin(optimizer)
                if backward >= 0:
                    self._backwards.add(backward)
                    hooks.queue(partial(self._end, backward))
            self._take(slot)
            if backward < 0:
                self._step_arrived(optimizer)

    def _begin(self, optimizer: FusedOptimizer) -> None:
        """What a step does once, before its first gradient is used."""
        optimizer._check_can_step()
        members = optimizer._members()
        for g in range(len(members.groups)):
            options.check_group(members, g)
        if not self._steps_all_at_once:
            self._draw_seeds({record.param for record in members.all()})

    def _draw_seeds(self, params: Container[Any]) -> None:
        """In the order of the parameters, whatever the order of their steps. Where chunks are
        stepped before all gradients are there, some may be drawn for a later step."""
        members = self.optimizer._members()
        for record in members.all() if any(g.get("rounding") for g in members.groups) else ():
            if "rounding_state" in record.entries:
                self._seeds.pop(record.param, None)
            elif record.extras.rounding is not None and record.param in params:
                if record.param.requires_grad and record.param not in self._seeds:
                    self._seeds[record.param] = state.draw_seed()

    def _end(self, backward: int) -> None:
        """When a backward ends."""
        optimizer = self.optimizer
        with optimizer._turn.lock:
            self._backwards.discard(backward)
            if not hooks.is_nested() and not self._accumulating:
                accumulated, self._accumulated = self._accumulated, {}
                for slot in accumulated.values():
                    if slot.param.grad is not None:
                        self._take(slot)
            self._step_arrived(optimizer)

    def _take(self, slot: Slot) -> None:
        """Takes the gradient of a parameter away."""
        grad = slot.param.grad
        if isinstance(slot, Image):
            self._send(slot, grad)
        else:
            self._check_first(slot in self._kept_grads, slot)
            self._kept_grads[slot] = grad
        if not (self.optimizer.amp_fused and self._shows(slot)):
            slot.param.grad = None

    def _check_first(self, is_second: bool, slot: Slot) -> None:
        if is_second and self._steps_all_at_once:
            raise RuntimeError(
                f"{self.optimizer._members().describe(slot.g, slot.i)}: a second backward() has "
                "given it a gradient, and the first still waits for step(); let all but the last "
                'run within optimizer.accumulating(), or take gradients="device"'
            )

    def _send(self, slot: Image, grad: Any) -> None:
        chunk = slot.bucket
        assert isinstance(chunk, Chunk)
        at_once = self._steps_all_at_once
        if slot in chunk.grads():
            self._check_first(True, slot)
            self._submit(chunk, None)
        if chunk.arrived is None:
            chunk.arrived = self._place_for(chunk, not at_once)
        chunk.arrived.add(slot, grad, [chunk.link.mark()])
        if not at_once and len(chunk.arrived.grads) == len(chunk.images):
            self._submit(chunk, None)

    def _place_for(self, chunk: Chunk, is_limited: bool) -> Arrived:
        """Memory for the gradients of a chunk. Where it is limited, it may have to be waited for,
        and others are stepped although they are not complete."""
        limit = float("inf")
        if is_limited:
            limit = _IN_FLIGHT * max(c.size for c in self.chunks if c.slabs is chunk.slabs)
        while (slab := chunk.slabs.take(chunk.size, limit)) is None:
            others = [c for c in self.chunks if c.slabs is chunk.slabs]
            running = [c for c in others if c.running is not None]
            if not running:
                running = [next(c for c in others if c.arrived is not None)]
                self._submit(running[0], None)
            self._finish([running[0]])
        return Arrived(chunk.slabs, slab)

    # Steps ----------------------------------------------------------------------------------------

    def _submit(self, chunk: Chunk, scales: Scaling | None) -> None:
        """Has a chunk stepped with the gradients that there are."""
        self._finish([chunk])  # the step before
        optimizer, arrived = self.optimizer, chunk.arrived
        assert arrived is not None
        chunk.arrived = None
        members = chunk.prepare(optimizer, self._seeds)
        after = [chunk.link.mark()]
        for slot in arrived.grads:
            if (problem := slot.problem()) is not None:
                arrived.release()
                raise RuntimeError(f"{members.describe(slot.g, slot.i)}: {problem}")
            if slot.is_changed():
                arrived.refresh(slot, [*after, *filter(None, [chunk.uploaded])])
            slot.count_write()
        targets = [dtensor.local(slot.param).data for slot in arrived.grads]
        chunk.running = self._executor().submit(
            chunk.run, arrived, members, scales, targets, after[0]
        )
        optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers ask for it

    def _step_arrived(self, optimizer: FusedOptimizer) -> None:
        """Steps what has a gradient, if none of it waits for others."""
        if self._steps_all_at_once:
            return
        for chunk in self.chunks:
            if chunk.grads():
                self._submit(chunk, None)
        self._step_kept(optimizer, None)

    def step(self, optimizer: FusedOptimizer) -> None:
        self._begin(optimizer)
        self._hide()
        slots = [slot for slot in self._slots.values() if slot.param.grad is not None]
        if self.settings.gradients == "device":
            self._draw_seeds({slot.param for slot in slots})
            self._step_from_device(optimizer, slots)
        else:
            for slot in slots:
                self._take(slot)
            self._hide()
            if self._steps_all_at_once:
                self._step_waiting(optimizer)
            else:
                self._step_arrived(optimizer)
        if self.settings.overlap != "forward":
            self.synchronize()

    def _step_from_device(self, optimizer: FusedOptimizer, slots: list[Slot]) -> None:
        scales = scaling.read(optimizer, self._norm)
        self._kept_grads = {s: s.param.grad for s in slots if not isinstance(s, Image)}
        self._step_kept(optimizer, scales)
        on_host = None if scales is None else {CPU: _on(CPU, scales)}
        downloads = []
        for chunk in self.chunks:
            having = [slot for slot in chunk.images if slot.param.grad is not None]
            if having:
                chunk.arrived = self._place_for(chunk, True)
                after = [chunk.link.mark()]
                for slot in having:
                    event = chunk.arrived.add(slot, slot.param.grad, after)
                    downloads.append((chunk.link, event))
                self._submit(chunk, on_host)
        for link, event in downloads:
            if event is not None:
                link.join(event)  # whoever writes the gradients does so later

    def _step_waiting(self, optimizer: FusedOptimizer) -> None:
        """Steps what waited until all gradients were there."""
        if optimizer.amp_fused and optimizer.found_inf is not None and optimizer.grad_scale is None:
            raise RuntimeError(
                f"{optimizer._name}: scaler.unscale_() was called, but the gradients were on the "
                'host already; leave it out, for step() unscales, or take gradients="device"'
            )
        waiting = [chunk for chunk in self.chunks if chunk.grads()]
        having = {slot.param for chunk in waiting for slot in chunk.grads()}
        self._draw_seeds(having.union(slot.param for slot in self._kept_grads))
        for chunk in waiting:
            assert chunk.arrived is not None
            chunk.arrived.wait()
        scales = scaling.read(optimizer, self._norm, self._with_grads_on_host(optimizer))
        self._step_kept(optimizer, scales)
        for chunk in waiting:
            self._submit(chunk, scales)

    def _with_grads_on_host(self, optimizer: FusedOptimizer) -> list[Any]:
        """Like the parameters, in their order, with their gradients, all of it on the host."""
        there: dict[Slot, Any]
        there = {slot: grad for chunk in self.chunks for slot, grad in chunk.grads().items()}
        params = []
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            slot = self._slots[id(param)]
            alike = dtensor.with_local(param, torch.empty_like(dtensor.local(param), device=CPU))
            alike.grad = there.get(slot)
            if (grad := self._kept_grads.get(slot)) is not None:
                alike.grad = dtensor.with_local(grad, dtensor.local(grad).to(CPU))
            params.append(alike)
        return params

    def _step_kept(self, optimizer: FusedOptimizer, scales: Scaling | None) -> None:
        """Steps what is not offloaded, where it is."""
        grads, self._kept_grads = self._kept_grads, {}
        if not grads:
            return
        for slot, grad in grads.items():
            slot.param.grad = grad
        if scales is not None:
            devices = {slot.param.device for slot in grads}
            scales = {device: _on(device, scales) for device in devices}
        members = self._kept.members(optimizer, {id(slot.param): slot for slot in grads})
        members.seeds = self._seeds
        self._kept.stepper.step_scaled(members, scales)
        if self.settings.gradients == "host":
            for slot in grads:
                slot.param.grad = None

    # What waits -----------------------------------------------------------------------------------

    def synchronize(self) -> None:
        with self.optimizer._turn.lock:
            self._finish(self.chunks)

    def wait_for(self, params: Iterable[Any]) -> None:
        """Returns when these parameters are updated, as far as the current stream sees them."""
        slots = (self._slots.get(id(param)) for param in params)
        chunks = {slot.bucket for slot in slots if isinstance(slot, Image)}
        with self.optimizer._turn.lock:
            self._finish([chunk for chunk in self.chunks if chunk in chunks])

    def _finish(self, chunks: list[Chunk]) -> None:
        """Waits for the steps of chunks that run.

        Raises:
            Exception: what the first of them has raised.
        """
        optimizer, errors = self.optimizer, []
        for chunk in chunks:
            if chunk.running is not None:
                errors.append(chunk.finish(optimizer, self.settings.overlap == "forward"))
            if chunk.uploaded is not None:
                chunk.link.join(chunk.uploaded)
        for error in filter(None, errors):
            raise error

    def finish_before_fork(self) -> None:
        for chunk in self.chunks:
            if (running := chunk.running) is not None:
                running.exception()

    def _executor(self) -> ThreadPoolExecutor:
        if self._process != os.getpid():  # the thread is not in this process
            self._worker, self._process = _worker(), os.getpid()
        return self._worker

    def forget_gradients(self) -> None:
        with self.optimizer._turn.lock:
            for chunk in self.chunks:
                arrived, chunk.arrived = chunk.arrived, None
                if arrived is not None:
                    arrived.wait()
                    arrived.release()
            self._kept_grads.clear()
            self._hide()

    def unhook(self) -> None:
        self.synchronize()
        self.forget_gradients()
        super().unhook()

    # GradScaler -----------------------------------------------------------------------------------

    def _shows(self, slot: Slot) -> bool:
        """Whether a GradScaler, which refuses to work without gradients, is to find this one: the
        smallest of its device."""
        device = slot.param.device
        other = self._shown.get(device)
        if other is not None and other is not slot:
            if other.param.numel() <= slot.param.numel():
                return False
            other.param.grad = None
        self._shown[device] = slot
        return True

    def _hide(self) -> None:
        for slot in self._shown.values():
            slot.param.grad = None
        self._shown.clear()

    def show_to_scaler(self) -> None:
        """Called before a GradScaler looks for infinite gradients. If there are any, that which it
        finds gets one: the step will be skipped."""
        if not self._shown:
            return
        optimizer = self.optimizer
        with optimizer._turn.lock:
            for chunk in self.chunks:
                if chunk.arrived is not None:
                    chunk.arrived.wait()
            grads = [param.grad for param in self._with_grads_on_host(optimizer)]
            norms = self._norm.measure([grad for grad in grads if grad is not None])
            if not all(norm[NORM].isfinite() for norm in norms.values()):
                for slot in self._shown.values():
                    held = dtensor.local(slot.param.grad).detach()
                    held.as_strided((1,), (1,), held.storage_offset()).fill_(float("inf"))


def _before_fork() -> None:
    """No child finds a step that nobody finishes."""
    for offloaded in [*_all]:
        offloaded.finish_before_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)


def _on(device: torch.device, scales: Scaling) -> scaling.OfDevice:
    """The scales of a step, on a device, which may have none of its own."""
    of_device = scales.get(device) or next(iter(scales.values()))
    found_inf, scale, clip = (t if t is None else t.to(device) for t in of_device)
    return found_inf, scale, clip


def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="fusedopt-offload")
