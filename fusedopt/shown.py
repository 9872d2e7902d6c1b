"""Gradients that a ``GradScaler`` finds, when all others are on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dtensor
from .buckets import Slot
from .grad_norm import NORM, GradNorm


class Shown:
    """The smallest gradient of each device stays where it was. A scaler refuses to work where it
    finds none, and asks each that it finds whether it is finite."""

    def __init__(self) -> None:
        self.slots: dict[torch.device, Slot] = {}

    def takes(self, slot: Slot) -> bool:
        """Whether this one is to stay."""
        device = slot.param.device
        other = self.slots.get(device)
        if other is not None and other is not slot:
            if other.param.numel() <= slot.param.numel():
                return False
            other.param.grad = None
        self.slots[device] = slot
        return True

    def hide(self) -> None:
        for slot in self.slots.values():
            slot.param.grad = None
        self.slots.clear()

    def report(self, grads: list[Tensor], norm: GradNorm) -> None:
        """If any of all gradients is not finite then those that are seen are not. What they were is
        not needed any more: the step will be skipped."""
        if not all(clip[NORM].isfinite() for clip in norm.measure(grads).values()):
            for slot in self.slots.values():
                held = dtensor.local(slot.param.grad).detach()
                if held.numel():  # of a shard, another process has elements
                    held.as_strided((1,), (1,), held.storage_offset()).fill_(float("inf"))
