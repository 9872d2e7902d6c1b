"""The optimizer in the backward: each parameter is updated as soon as its gradient is ready."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from . import hooks, options
from .buckets import Bucket, Gathered, Key, Slot, Slots
from .optimizer import FusedOptimizer

Optimizer = TypeVar("Optimizer", bound=FusedOptimizer)


def attach(
    model: torch.nn.Module | Iterable[Any],
    optimizer_class: type[Optimizer],
    *,
    bucket_bytes: int = 2**20,
    **arguments: Any,
) -> Optimizer:
    """Update the parameters during ``backward()``, soon after their gradients are ready, and free
    the gradients: those of a model never exist all at once.

    The result is an ordinary optimizer: schedulers take it, ``state_dict()`` and
    ``load_state_dict()`` are those of its class. After ``backward()``, its ``step()`` finds no
    gradients and does nothing, so that loops and trainers that call it stay as they are.

    Args:
        model (Module or iterable): a module, of which the parameters that require a gradient are
            taken, or what the class takes as ``params``. Those of lazy modules may get their shape
            later.
        optimizer_class: one of fusedopt's classes, like ``fusedopt.AdamW``.
        bucket_bytes (int): how many bytes of gradients wait, so that one native call updates their
            parameters together. Not more than these and the gradient that fills them are alive in
            a backward, on each device. With 0, each parameter is updated alone (default: 1 MiB).
        arguments: keyword arguments of the class.

    Returns:
        The optimizer, which must be kept: the model does not. :func:`detach` takes it out of the
        backward.

    Raises:
        TypeError: ``optimizer_class`` is none of fusedopt's, or has a ``step()`` of its own.
        ValueError: an option needs all gradients at once (``max_grad_norm``, ``amp_fused``) or the
            graph of the step (``differentiable``); or a parameter is attached to another optimizer;
            or the model is wrapped in ``DistributedDataParallel`` or ``FullyShardedDataParallel``,
            which reduce gradients after they were accumulated (``fully_shard`` works).

    Differences from ``step()`` after ``backward()``: the bits are the same, but every
    ``backward()`` is a step, except within ``optimizer.accumulating()``. Gradients cannot be
    clipped by their common norm, or unscaled by a ``GradScaler``. What waits is updated when its
    bucket is full, else at the end of the backward. Reentrant checkpointing runs a ``backward()``
    for each segment; a parameter that several segments share wants ``use_reentrant=False``. If the
    backward fails then what was updated remains so, the parameters that wait are as they were, with
    their gradients, and so are all of a bucket whose step raises; that error comes out of
    ``backward()``. Hooks of ``step()`` run in ``step()``.
    """
    hooks.check_class("attach", optimizer_class)
    if type(bucket_bytes) is not int or bucket_bytes < 0:
        raise ValueError(f"bucket_bytes must be an int of at least 0, got {bucket_bytes!r}")
    params: Iterable[Any] = model  # type: ignore[assignment]
    if isinstance(model, torch.nn.Module):
        _check_model(model)
        params = [param for param in model.parameters() if param.requires_grad]
    optimizer = optimizer_class(params, **arguments)
    _check_options(optimizer)
    optimizer._in_backward = Attached(optimizer, bucket_bytes)
    optimizer._in_backward.hook()
    return optimizer


def detach(optimizer: FusedOptimizer) -> None:
    """Take an optimizer that :func:`attach` or :func:`offload` made out of the backward; it goes on
    as an ordinary one, with its state. That of an offloaded one goes to the devices of its
    parameters, and gradients that wait on the host go back to ``.grad``.

    Raises:
        ValueError: it is not attached.
    """
    in_backward = getattr(optimizer, "_in_backward", None)
    if in_backward is None:
        raise ValueError(f"this {type(optimizer).__name__} is not attached to a backward")
    in_backward.unhook()
    optimizer._in_backward = None


class Attached(hooks.InBackward):
    """A hook for each parameter of an optimizer, whose state and options are the optimizer's, and
    what the hooks share."""

    def __init__(self, optimizer: FusedOptimizer, bucket_bytes: int) -> None:
        super().__init__(optimizer)
        self.bucket_bytes = bucket_bytes
        self._slots: Slots = {}
        # By backward and device.
        self._gathered: WeakValueDictionary[Key, Gathered] = WeakValueDictionary()
        self._accumulated: Slots = {}  # with gradients from accumulating(), and no step since

    def hook(self) -> None:
        new = [
            record
            for record in self.optimizer._members().all()
            if id(record.param) not in self._slots and hooks.can_require_grad(record.param)
        ]
        for record in new:
            hooks.check_free(record.param, record.describe())
        for record in new:
            self._slots[id(record.param)] = Slot(record.param, record.g, record.i)
            self.register(record.param)

    def unhook(self) -> None:
        super().unhook()
        for gathered in self._gathered.values():
            gathered.forget()

    def add(self, param: Tensor, backward: int) -> None:
        slot = self._slots[id(param)]
        if self._accumulating:
            self._accumulated[id(param)] = slot
            return
        if self._accumulated:
            self._accumulated.pop(id(param), None)
        key = backward, param.device
        gathered = self._gathered.get(key)
        if gathered is None:
            gathered = Gathered(self, key)
            if backward >= 0:
                self._gathered[key] = gathered
                hooks.queue(gathered.end)
        gathered.add(self, slot)
        if backward < 0:
            gathered.step_all(self)

    def end(self, gathered: Gathered) -> None:
        """Steps what is left when a backward ends."""
        # What another call of the engine brings now has an end of its own.
        del self._gathered[gathered.key]
        gathered.step_all(self)
        if self._accumulated or hooks.is_distributed():
            hooks.queue(gathered.finish)

    def step_accumulated(self, gathered: Gathered) -> None:
        """What this backward has not reached; if it is part of another, that may still do so."""
        if self._accumulated and not self._accumulating and not hooks.is_nested():
            accumulated, self._accumulated = self._accumulated, {}
            for slot in accumulated.values():
                if slot.param.grad is not None:
                    gathered.add(self, slot)
            gathered.step_all(self)

    def describe(self, slot: Slot) -> str:
        return self.optimizer._members().describe(slot.g, slot.i)

    def step_bucket(self, bucket: Bucket, arrived: Slots) -> None:
        optimizer = self.optimizer
        # A backward may run in several threads.
        optimizer._turn.step(
            optimizer._name, functools.partial(self._step, optimizer, bucket, arrived)
        )

    def _step(self, optimizer: FusedOptimizer, bucket: Bucket, arrived: Slots) -> None:
        _check_options(optimizer)
        optimizer._check_can_step()
        members = bucket.members(optimizer, arrived)
        try:
            bucket.stepper.step(members)
        except (KeyError, TypeError):
            for g in range(len(members.groups)):
                options.check_group(members, g)  # names the group of the optimizer
            raise
        for slot in arrived.values():
            slot.param.grad = None
        optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers ask for it


def _check_options(optimizer: FusedOptimizer) -> None:
    needs_all = {
        "max_grad_norm": optimizer.max_grad_norm is not None,
        "amp_fused": optimizer.amp_fused,
        "differentiable": optimizer.defaults["differentiable"],
    }
    for name in (name for name, is_on in needs_all.items() if is_on):
        raise ValueError(
            f"fusedopt.{type(optimizer).__name__}: {name} does not go with attach(), which updates "
            "each parameter while the gradients of others do not exist yet; leave it out, or use "
            "the optimizer without attach()"
        )


def _check_model(model: torch.nn.Module) -> None:
    if (name := hooks.wrapper_that_reduces_later(model)) is not None:
        raise ValueError(
            f"{name} reduces gradients after they were accumulated, when "
            "attach() has used them already; shard the model with "
            "torch.distributed.fsdp.fully_shard, or use the optimizer without attach(), which "
            "would save nothing: the buckets of gradients are part of the wrapper"
        )
