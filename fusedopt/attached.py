"""The optimizer in the backward: each parameter is updated as soon as its gradient is ready."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from . import options
from .buckets import Bucket, Gathered, Key, Slot, Slots, alive, is_distributed, queue
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
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, FusedOptimizer)):
        raise TypeError(
            "attach takes one of fusedopt's classes, like fusedopt.AdamW, got "
            f"{getattr(optimizer_class, '__name__', optimizer_class)!r}"
        )
    if inspect.unwrap(optimizer_class.step) is not inspect.unwrap(FusedOptimizer.step):
        raise TypeError(
            f"{optimizer_class.__name__} has a step() of its own, which attach() would not call in "
            "the backward"
        )
    if type(bucket_bytes) is not int or bucket_bytes < 0:
        raise ValueError(f"bucket_bytes must be an int of at least 0, got {bucket_bytes!r}")
    params: Iterable[Any] = model  # type: ignore[assignment]
    if isinstance(model, torch.nn.Module):
        _check_model(model)
        params = [param for param in model.parameters() if param.requires_grad]
    optimizer = optimizer_class(params, **arguments)
    _check_options(optimizer)
    optimizer._attached = Attached(optimizer, bucket_bytes)
    optimizer._attached.hook()
    return optimizer


def detach(optimizer: FusedOptimizer) -> None:
    """Take an optimizer that :func:`attach` made out of the backward; it goes on as an ordinary
    one, with its state.

    Raises:
        ValueError: it is not attached.
    """
    attached = getattr(optimizer, "_attached", None)
    if attached is None:
        raise ValueError(f"this {type(optimizer).__name__} is not attached to a backward")
    attached.unhook()
    optimizer._attached = None


class Attached:
    """A hook for each parameter of an optimizer, whose state and options are the optimizer's, and
    what the hooks share."""

    def __init__(self, optimizer: FusedOptimizer, bucket_bytes: int) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.bucket_bytes = bucket_bytes
        self._slots: Slots = {}
        self._handles: list[RemovableHandle] = []
        # By backward and device.
        self._gathered: WeakValueDictionary[Key, Gathered] = WeakValueDictionary()
        self._accumulating = 0  # how many contexts are open
        self._accumulated: Slots = {}  # those that had gradients in them and no step since

    def hook(self) -> None:
        """Registers the parameters that are new in the optimizer."""
        new = [
            record
            for record in alive(self._optimizer)._members().all()
            if id(record.param) not in self._slots and _can_require_grad(record.param)
        ]
        for record in new:
            _check_free(record.param, record.describe())
        for record in new:
            self._slots[id(record.param)] = Slot(record.param, record.g, record.i)
            self._handles.append(_register(record.param, Hook(self)))

    def unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        for gathered in self._gathered.values():
            gathered.forget()

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        turn = alive(self._optimizer)._turn
        with turn.lock:
            self._accumulating += 1
        try:
            yield
        finally:
            with turn.lock:
                self._accumulating -= 1

    def add(self, param: Tensor, backward: int) -> None:
        """A gradient is there. ``backward``: which one has made it, or -1 if it is none that could
        be told from others, and asked to call back at its end."""
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
                queue(gathered.end)
        gathered.add(self, slot)
        if backward < 0:
            gathered.step_all(self)

    @_disable_dynamo
    def add_in_compiled_backward(self, param: Tensor) -> None:
        """Compiled autograd traces hooks."""
        self.add(param, -1)

    def end(self, gathered: Gathered) -> None:
        """Steps what is left when a backward ends."""
        # What another call of the engine brings now has an end of its own.
        del self._gathered[gathered.key]
        gathered.step_all(self)
        if self._accumulated or is_distributed():
            queue(gathered.finish)

    def step_accumulated(self, gathered: Gathered) -> None:
        """What this backward has not reached; if it is part of another, that may still do so."""
        is_nested = torch._C._current_autograd_node() is not None
        if self._accumulated and not self._accumulating and not is_nested:
            accumulated, self._accumulated = self._accumulated, {}
            for slot in accumulated.values():
                if slot.param.grad is not None:
                    gathered.add(self, slot)
            gathered.step_all(self)

    def describe(self, slot: Slot) -> str:
        return alive(self._optimizer)._members().describe(slot.g, slot.i)

    def step(self, bucket: Bucket, arrived: Slots) -> None:
        optimizer = alive(self._optimizer)
        # A backward may run in several threads.
        optimizer._turn.step(
            optimizer._name, functools.partial(self._step, optimizer, bucket, arrived)
        )

    def _step(self, optimizer: FusedOptimizer, bucket: Bucket, arrived: Slots) -> None:
        _check_options(optimizer)
        optimizer._check_not_swapped()
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


class Hook:
    """Hands on a parameter. It keeps nothing alive: the garbage collector cannot look into the
    hooks of tensors, and would never free a model whose hooks lead back to it."""

    def __init__(self, attached: Attached) -> None:
        self.attached = weakref.ref(attached)

    def __call__(self, param: Tensor) -> None:
        attached = alive(self.attached)
        if torch.compiler.is_dynamo_compiling():
            attached.add_in_compiled_backward(param)
        else:
            attached.add(param, torch._C._current_graph_task_id())


def _check_free(param: Tensor, who: str) -> None:
    """Two optimizers cannot use up one gradient. What is left of one that is gone goes too."""
    hooks: dict[int, Any] = param._post_accumulate_grad_hooks or {}
    for key, hook in list(hooks.items()):
        if isinstance(hook, Hook):
            if hook.attached() is not None:
                raise ValueError(f"{who}: it is attached to another optimizer; detach() that first")
            del hooks[key]


def _can_require_grad(param: Tensor) -> bool:
    with _allowing_calls(param):
        kind = param.is_floating_point() or param.is_complex()
        return param.requires_grad or (kind and not param.is_inference())


def _register(param: Tensor, hook: Hook) -> RemovableHandle:
    """Also if the parameter is frozen: it may require a gradient later."""
    with _allowing_calls(param):
        requires_grad = param.requires_grad
        param.requires_grad_()
        handle: RemovableHandle = param.register_post_accumulate_grad_hook(hook)
        param.requires_grad_(requires_grad)
    return handle


def _allowing_calls(param: Tensor) -> AbstractContextManager[Any]:
    """A parameter of a lazy module refuses most calls before the first forward. It stays the same
    object, with its hooks, when it becomes an ordinary one."""
    return torch._C.DisableTorchFunctionSubclass() if is_lazy(param) else nullcontext()


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
    reduces_later = {"DistributedDataParallel", "FullyShardedDataParallel"}
    for module in model.modules():
        for name in reduces_later.intersection(cls.__name__ for cls in type(module).__mro__):
            raise ValueError(
                f"{name} reduces gradients after they were accumulated, when "
                "attach() has used them already; shard the model with "
                "torch.distributed.fsdp.fully_shard, or use the optimizer without attach(), which "
                "would save nothing: the buckets of gradients are part of the wrapper"
            )
