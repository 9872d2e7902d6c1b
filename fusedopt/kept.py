"""Parameters of an offloaded optimizer that are stepped where they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import dtensor, scaling
from .buckets import Bucket, Slot
from .scaling import Scaling

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


class Kept:
    """With their gradients, where these were taken from them to wait."""

    def __init__(self) -> None:
        self._bucket = Bucket()
        self.grads: dict[Slot, Any] = {}

    def add(self, slots: Iterable[Slot]) -> None:
        self._bucket.slots += slots

    def take(self, slot: Slot) -> None:
        """Its gradient."""
        grad = slot.param.grad
        held = dtensor.local(grad)
        if held.layout is torch.strided and held.untyped_storage().nbytes() > 2 * held.nbytes:
            grad = grad.clone()  # FSDP's is a view into the gradients of all of a module
        self.grads[slot] = grad

    def step(
        self,
        optimizer: FusedOptimizer,
        scales: Scaling | None,
        seeds: dict[Any, Tensor],
        keeps_grads: bool,
    ) -> None:
        """``keeps_grads``: they are in ``.grad`` afterwards."""
        grads, self.grads = self.grads, {}
        if not grads:
            return
        for slot, grad in grads.items():
            slot.param.grad = grad
        if scales is not None:
            devices = {slot.param.device for slot in grads}
            scales = {device: scaling.on(device, scales) for device in devices}
        members = self._bucket.members(optimizer, {id(slot.param): slot for slot in grads})
        members.seeds = seeds
        self._bucket.stepper.step_scaled(members, scales)
        if not keeps_grads:
            for slot in grads:
                slot.param.grad = None

    def grads_on_host(self) -> dict[Slot, Any]:
        """Copies of those that wait, by as few as can be: each has to be waited for."""
        alike: dict[tuple[torch.device, torch.dtype], dict[Slot, Tensor]] = {}
        there = {}
        for slot, grad in self.grads.items():
            held = dtensor.local(grad)
            if held.layout is torch.strided and held.device.type != "cpu":
                alike.setdefault((held.device, held.dtype), {})[slot] = held.detach()
            else:
                there[slot] = dtensor.with_local(grad, held.to("cpu"))
        for slots in alike.values():
            flat = torch.cat([held.reshape(-1) for held in slots.values()]).cpu()
            parts = flat.split([held.numel() for held in slots.values()])
            for (slot, held), part in zip(slots.items(), parts, strict=True):
                there[slot] = dtensor.with_local(self.grads[slot], part.view(held.shape))
        return there
