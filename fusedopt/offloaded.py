"""The optimizer on the host: gradients come to it in the background, chunks of parameters are
stepped there by a worker, and go back."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import backend, dtensor, hooks, options, scaling, state
from .buckets import Slot, Slots
from .chunk_queue import ChunkQueue
from .grad_norm import GradNorm
from .images import Image, new_slots
from .kept import Kept
from .rule import Group
from .scaling import Scaling
from .shown import Shown

if TYPE_CHECKING:
    from .offloading import Settings
    from .optimizer import FusedOptimizer
    from .record import Record


class Offloaded(hooks.InBackward):
    """The parameters of an optimizer that are stepped on the host, in chunks, and those that stay
    where they are. State and options are the optimizer's."""

    def __init__(self, optimizer: FusedOptimizer, settings: Settings) -> None:
        super().__init__(optimizer)
        self.settings = settings
        self._queue = ChunkQueue(settings.num_threads)
        self._slots: Slots = {}
        self._kept = Kept()
        self._shown = Shown()
        self._norm = GradNorm()
        self._backwards: set[int] = set()
        self._accumulated: Slots = {}

    # Parameters -----------------------------------------------------------------------------------

    def hook(self) -> None:
        records = [*self.optimizer._members().all()]
        new = [record for record in records if id(record.param) not in self._slots]
        for record in new:
            self._check(record)
        slots = new_slots(records, self._slots, self.settings.device, self.settings.keep_below)
        images = [slot for slot in slots if isinstance(slot, Image)]
        self._queue.make(images, self.settings.chunk, self._is_limited)
        self._kept.add(slot for slot in slots if not isinstance(slot, Image))
        self._slots.update((id(slot.param), slot) for slot in slots)
        for record in new:
            if isinstance(self._slots[id(record.param)], Image):  # Adagrad has made state
                state.move(record, torch.device("cpu"))
            if self.settings.gradients == "host" and hooks.can_require_grad(record.param):
                self.register(record.param)
        self.optimizer._in_backward = self

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

    @property
    def _is_limited(self) -> bool:
        """Whether the backward waits where the host is slower than it."""
        return not self._all_wait and self.settings.overlap != "forward"

    @property
    def _all_wait(self) -> bool:
        """Whether gradients that were taken to the host wait there for step()."""
        optimizer = self.optimizer
        needs_all = optimizer.max_grad_norm is not None or optimizer.amp_fused
        return self.settings.gradients == "host" and (needs_all or self.settings.overlap is None)

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
                if not self._all_wait:
                    self._draw_seeds(self._slots.values())
                if backward >= 0:
                    self._backwards.add(backward)
                    hooks.queue(partial(self._end, backward))
            self._take(slot)
            if backward < 0:
                self._step_arrived(optimizer)

    def _begin(self, optimizer: FusedOptimizer) -> None:
        """What a step does once, before its first gradient is used."""
        optimizer._check_can_step()
        if backend.is_capturing():
            raise RuntimeError(f"{optimizer._name}: what is offloaded cannot be captured")
        optimizer._core._clips = None
        members = optimizer._members()
        for g in range(len(members.groups)):
            options.check_group(members, g)

    def _draw_seeds(self, slots: Iterable[Slot]) -> None:
        ids = {id(slot.param) for slot in slots}
        state.draw_seeds(self.optimizer._members(), ids, self._queue.seeds)

    def _end(self, backward: int) -> None:
        """When a backward ends."""
        optimizer = self.optimizer
        with optimizer._turn.lock:
            self._backwards.discard(backward)
            if not hooks.is_nested() and not self._accumulating:
                accumulated, self._accumulated = self._accumulated, {}
                for slot in accumulated.values():
                    self._take(slot)
            self._step_arrived(optimizer)

    def _take(self, slot: Slot) -> None:
        """Takes the gradient of a parameter away."""
        optimizer, grad, chunk = self.optimizer, slot.param.grad, None
        if grad is None:  # another hook has taken it
            return
        if self._all_wait:
            self._check_first(slot)
        if isinstance(slot, Image):
            chunk = self._queue.send(optimizer, slot, grad, self._is_limited)
        else:
            if slot in self._kept.grads:  # another part of the backward has made one
                self._step_kept(optimizer, None)
            self._kept.take(slot)
        if not (optimizer.amp_fused and self._shown.takes(slot)):
            slot.param.grad = None
        if chunk is not None and not self._all_wait and chunk.is_complete():
            self._queue.submit(optimizer, chunk, None)

    def _check_first(self, slot: Slot) -> None:
        if slot in (slot.chunk.grads() if isinstance(slot, Image) else self._kept.grads):
            raise RuntimeError(
                f"{self.optimizer._members().describe(slot.g, slot.i)}: a second backward() has "
                "given it a gradient, and the first still waits for step(); let all but the last "
                'run within optimizer.accumulating(), or take gradients="device"'
            )

    # Steps ----------------------------------------------------------------------------------------

    def _step_arrived(self, optimizer: FusedOptimizer) -> None:
        """Steps what has a gradient, if none of it waits for others."""
        if not self._all_wait:
            self._queue.step_arrived(optimizer, None)
            self._step_kept(optimizer, None)

    def step(self, optimizer: FusedOptimizer) -> None:
        self._begin(optimizer)
        self._backwards.clear()
        self._shown.hide()
        slots = [slot for slot in self._slots.values() if slot.param.grad is not None]
        self._queue.check(optimizer, slots)
        if self.settings.gradients == "device":
            self._step_from_device(optimizer, slots)
        else:
            if not self._all_wait:
                self._draw_seeds(slots)
            for slot in slots:
                self._take(slot)
            self._shown.hide()
            if self._all_wait:
                self._step_waiting(optimizer)
            else:
                self._step_arrived(optimizer)
        self._queue.join_downloads()
        if self.settings.overlap == "forward":
            self._queue.under_way[:] = [optimizer]
        else:
            self.synchronize()

    def _step_from_device(self, optimizer: FusedOptimizer, slots: list[Slot]) -> None:
        self.synchronize()  # what the step before has raised comes before anything is written
        self._draw_seeds(slots)
        scales = scaling.read(optimizer, self._norm)
        self._kept.grads = {s: s.param.grad for s in slots if not isinstance(s, Image)}
        self._step_kept(optimizer, scales)
        self._queue.step_from_device(optimizer, scaling.on_host(scales))

    def _step_waiting(self, optimizer: FusedOptimizer) -> None:
        """Steps what waited until all gradients were there."""
        found_inf, scale = (getattr(optimizer, n, None) for n in ("found_inf", "grad_scale"))
        if optimizer.amp_fused and found_inf is not None and scale is None:
            raise RuntimeError(
                f"{optimizer._name}: scaler.unscale_() was called, but the gradients were on the "
                'host already; leave it out, for step() unscales, or take gradients="device"'
            )
        self._draw_seeds((*self._queue.grads(), *self._kept.grads))
        self._queue.wait_for_grads()
        scales = scaling.read(optimizer, self._norm, self._with_grads_on_host(optimizer))
        self._step_kept(optimizer, scales)
        self._queue.step_arrived(optimizer, scaling.on_host(scales))

    def _with_grads_on_host(self, optimizer: FusedOptimizer) -> list[Any]:
        """Like the parameters, in their order, with their gradients, all of it on the host."""
        there: dict[Slot, Any] = self._kept.grads_on_host()
        there |= dict(self._queue.grads().items())
        params = []
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            slot = self._slots[id(param)]
            if isinstance(slot, Image):
                alike = slot.alike(slot.image_held.detach())
            else:
                held = torch.empty_like(dtensor.local(param), device="cpu")
                alike = dtensor.with_local(param, held)
            alike.grad = there.get(slot)
            params.append(alike)
        return params

    def _step_kept(self, optimizer: FusedOptimizer, scales: Scaling | None) -> None:
        keeps_grads = self.settings.gradients == "device"
        self._kept.step(optimizer, scales, self._queue.seeds, keeps_grads)

    # What waits -----------------------------------------------------------------------------------

    def synchronize(self) -> None:
        with self.optimizer._turn.lock:
            self._queue.finish(self.optimizer, self._queue.chunks)

    def wait_for(self, params: Iterable[Any], on_host: bool) -> None:
        """Returns when these parameters are updated, as far as the current stream sees them; with
        ``on_host``, as far as all streams do."""
        optimizer = self.optimizer
        slots = [self._slots.get(id(param)) for param in params]
        chunks = dict.fromkeys(slot.chunk for slot in slots if isinstance(slot, Image))
        with optimizer._turn.lock:
            self._queue.finish(optimizer, chunks)
            if on_host:
                self._queue.wait_for_uploads(chunks)

    def forget_gradients(self) -> None:
        with self.optimizer._turn.lock:
            self._queue.forget_grads()
            self._kept.grads.clear()
            self._shown.hide()

    def pickled(self) -> Settings:
        self.synchronize()
        # The hooks of a module are not copied with the optimizer.
        is_in_modules = self.settings.overlap == "forward"
        return self.settings._replace(overlap="backward") if is_in_modules else self.settings

    def unhook(self) -> None:
        self.synchronize()
        self._shown.hide()
        self._queue.wait_for_grads()
        for slot, grad in (*self._queue.grads().items(), *self._kept.grads.items()):
            held = dtensor.local(grad).to(dtensor.local(slot.param).device, copy=True)
            grad, more = dtensor.with_local(grad, held), slot.param.grad
            slot.param.grad = grad if more is None else grad + more
        self.forget_gradients()
        super().unhook()
        for record in self.optimizer._members().all():
            if isinstance(self._slots[id(record.param)], Image):
                state.move(record, record.held.device)

    def show_to_scaler(self) -> None:
        if self._shown.slots:
            with self.optimizer._turn.lock:
                self._queue.wait_for_grads()
                grads = [param.grad for param in self._with_grads_on_host(self.optimizer)]
                self._shown.report([grad for grad in grads if grad is not None], self._norm)
