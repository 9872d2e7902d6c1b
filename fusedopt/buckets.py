"""The gradients that the hooks of :func:`fusedopt.attach` gather, to step some at a time."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import dtensor
from .hooks import alive, is_distributed
from .record import Members
from .stepper import Stepper

if TYPE_CHECKING:
    from .attached import Attached
    from .optimizer import FusedOptimizer


class Slot:
    """A parameter, its place in the groups of the optimizer, and its bucket, which it has from its
    first gradient on."""

    __slots__ = ("bucket", "g", "i", "param")

    def __init__(self, param: Any, g: int, i: int) -> None:
        self.param = param
        self.g, self.i = g, i
        self.bucket: Bucket | None = None


Slots = dict[int, Slot]  # by the id of the parameter
Key = tuple[int, torch.device]  # the number of a backward, and where its gradients are


class Bucket:
    """Parameters that had their first gradients one after the other. They stay together, with a
    stepper of their own, which knows them again even if some have no gradient this time."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.stepper = Stepper()

    def members(self, optimizer: FusedOptimizer, arrived: Slots) -> Members:
        """``arrived``: those that are to be stepped."""
        slots = self.slots.copy()
        by_group: dict[int, list[Slot]] = {}
        state = {}
        for slot in slots:
            by_group.setdefault(slot.g, []).append(slot)
            if (entries := optimizer.state.get(slot.param)) is not None:
                state[slot.param] = entries
        groups = [group_of(optimizer, of_group) for of_group in by_group.values()]
        places = [[(slot.g, slot.i) for slot in of_group] for of_group in by_group.values()]
        absent = {id(slot.param) for slot in slots} - arrived.keys()
        return Members(optimizer, groups, state, places, absent)


def group_of(optimizer: FusedOptimizer, slots: Sequence[Slot]) -> dict[str, Any]:
    """The options of a param group, for some of its parameters."""
    groups, g = optimizer.param_groups, slots[0].g
    params = groups[g]["params"] if len(groups) > g else []
    for slot in slots:
        if not (len(params) > slot.i and params[slot.i] is slot.param):
            raise RuntimeError(
                f"{optimizer._name}: a parameter of shape {tuple(slot.param.shape)} is no longer "
                "where it was in param_groups; detach() the optimizer before changing them"
            )
    return {**groups[g], "params": [slot.param for slot in slots]}


class Gathered:
    """What one backward has made on one device and not yet used up. The engine of autograd holds
    it until the backward ends; if that fails, the gradients stay where they are."""

    def __init__(self, attached: Attached, key: Key) -> None:
        self.key = key
        self._attached = weakref.ref(attached)
        # Of each bucket what has come, in the order in which it came, and the bytes of that.
        self._arrived: dict[Bucket, Slots] = {}
        self._sizes: dict[Bucket, int] = {}
        self._size = 0
        self._new: Bucket | None = None  # for parameters that have no bucket yet
        self._streams: dict[int, torch.cuda.Stream] = {}  # on which the gradients were made
        self._used_up: list[Slot] | None = [] if is_distributed() else None

    def add(self, attached: Attached, slot: Slot) -> None:
        """Steps the oldest gradients, while there are too many."""
        bucket = slot.bucket or self._assign(slot)
        self._arrived.setdefault(bucket, {})[id(slot.param)] = slot
        size = _size(slot.param.grad, attached.bucket_bytes)
        self._sizes[bucket] = self._sizes.get(bucket, 0) + size
        self._size += size
        if slot.param.is_cuda:
            self._remember_stream(slot.param.device)
        if self._size >= attached.bucket_bytes:
            self._new = None
            while self._arrived and self._size >= attached.bucket_bytes:
                self._step(attached, next(iter(self._arrived)))

    def step_all(self, attached: Attached) -> None:
        self._new = None
        while self._arrived:
            self._step(attached, next(iter(self._arrived)))

    def end(self) -> None:
        """The engine calls it at the end of the backward."""
        if self._attached() is None and not self._arrived:
            return  # detached meanwhile
        alive(self._attached).end(self)

    def finish(self) -> None:
        """And this when all that is called then has been called: some bring gradients."""
        if (attached := self._attached()) is not None:
            self._check_used_up(attached)
            attached.step_accumulated(self)

    def forget(self) -> None:
        """Leaves the gradients to whoever wants them."""
        self._arrived.clear()
        self._sizes.clear()
        self._size = 0

    def _assign(self, slot: Slot) -> Bucket:
        if self._new is None:
            self._new = Bucket()
        self._new.slots.append(slot)
        slot.bucket = self._new
        return self._new

    def _step(self, attached: Attached, bucket: Bucket) -> None:
        arrived = self._arrived.pop(bucket)
        self._size -= self._sizes.pop(bucket)
        self._join_streams(arrived)
        attached.step_bucket(bucket, arrived)
        if self._used_up is not None:
            self._used_up += arrived.values()

    def _remember_stream(self, device: torch.device) -> None:
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        if stream not in self._streams:
            self._streams[stream] = torch.cuda.current_stream(device)

    def _join_streams(self, arrived: Slots) -> None:
        """A step on one stream reads gradients that were made on others, and gives them back."""
        if not self._streams:
            return
        now = torch.cuda.current_stream(next(iter(self._streams.values())).device)
        others = [stream for stream in self._streams.values() if stream != now]
        for stream in others:
            now.wait_stream(stream)
        for slot in arrived.values() if others else ():
            grad = dtensor.local(slot.param.grad)
            if grad is not None and grad.layout is torch.strided:
                grad.record_stream(now)

    def _check_used_up(self, attached: Attached) -> None:
        for slot in self._used_up or ():
            if slot.param.grad is not None:
                raise RuntimeError(
                    f"{attached.describe(slot)}: it was given a gradient after attach() had used "
                    "up that of this backward. DistributedDataParallel does that, which reduces "
                    "gradients later than they are used: shard the model with "
                    "torch.distributed.fsdp.fully_shard, or use the optimizer without attach()"
                )


def _size(grad: Any, unknown: int) -> int:
    """The bytes that this process holds of a gradient. How many a sparse one has is not known
    without looking at it: it waits for no other."""
    grad = dtensor.local(grad)
    if grad is None:
        return 0
    return grad.nbytes if grad.layout is torch.strided else unknown
