"""Hooks on the parameters of an optimizer, which hear of each gradient as soon as it is ready."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from .record import Members
from .rule import Group

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

Kept = TypeVar("Kept")


class InBackward:
    """What an optimizer does in the backward: :func:`fusedopt.attach` and :func:`fusedopt.offload`
    each have a class of their own."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.handles: list[RemovableHandle] = []
        self._accumulating = 0  # how many contexts are open

    @property
    def optimizer(self) -> FusedOptimizer:
        return alive(self._optimizer)

    def hook(self) -> None:
        """Registers the parameters that are new in the optimizer."""
        raise NotImplementedError

    def add(self, param: Tensor, backward: int) -> None:
        """A gradient is there. ``backward``: which one has made it, or -1 if it is none that could
        be told from others, and asked to call back at its end."""
        raise NotImplementedError

    def step(self, optimizer: FusedOptimizer) -> None:
        """Steps what the backward has left."""
        optimizer._stepper.step(Members(optimizer, optimizer.param_groups))

    def synchronize(self) -> None:
        """Returns when all parameters are updated."""

    def forget_gradients(self) -> None:
        """Gradients that wait for a step are wanted no more."""

    def show_to_scaler(self) -> None:
        """A GradScaler is about to look for infinite gradients."""

    def with_images(self, groups: list[Group]) -> list[Group]:
        """The groups, with what the state of their parameters is like in place of these."""
        return groups

    def pickled(self) -> Any:
        """For a copy of the optimizer to do the same; None for an ordinary one."""
        return None

    @_disable_dynamo
    def add_in_compiled_backward(self, param: Tensor) -> None:
        """Compiled autograd traces hooks."""
        self.add(param, -1)

    def register(self, param: Tensor) -> None:
        """Also if the parameter is frozen: it may require a gradient later."""
        with _allowing_calls(param):
            requires_grad = param.requires_grad
            param.requires_grad_()
            handle = param.register_post_accumulate_grad_hook(Hook(self))
            param.requires_grad_(requires_grad)
        self.handles.append(handle)

    def unhook(self) -> None:
        """The optimizer goes on as an ordinary one."""
        for handle in self.handles:
            handle.remove()

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        turn = self.optimizer._turn
        with turn.lock:
            self._accumulating += 1
        try:
            yield
        finally:
            with turn.lock:
                self._accumulating -= 1


class Hook:
    """Hands on a parameter. It keeps nothing alive: the garbage collector cannot look into the
    hooks of tensors, and would never free a model whose hooks lead back to it."""

    def __init__(self, target: InBackward) -> None:
        self.target = weakref.ref(target)

    def __call__(self, param: Tensor) -> None:
        target = alive(self.target)
        if torch.compiler.is_dynamo_compiling():
            target.add_in_compiled_backward(param)
        else:
            target.add(param, torch._C._current_graph_task_id())


def alive(reference: weakref.ref[Kept]) -> Kept:
    kept = reference()
    if kept is None:
        raise RuntimeError(
            "the optimizer that attach() or offload() returned is gone; keep it while the model is "
            "trained, or detach() it"
        )
    return kept


def queue(call: Callable[[], None]) -> None:
    """To be called at the end of the backward that runs in this thread."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def is_nested() -> bool:
    """Whether this is the end of a backward that is part of another, which may go on to give the
    same parameters gradients."""
    return torch._C._current_autograd_node() is not None


def check_free(param: Tensor, who: str) -> None:
    """Two optimizers cannot use up one gradient. What is left of one that is gone goes too."""
    hooks: dict[int, Any] = param._post_accumulate_grad_hooks or {}
    for key, hook in list(hooks.items()):
        if isinstance(hook, Hook):
            if hook.target() is not None:
                raise ValueError(f"{who}: it is attached to another optimizer; detach() that first")
            del hooks[key]


def can_require_grad(param: Tensor) -> bool:
    with _allowing_calls(param):
        kind = param.is_floating_point() or param.is_complex()
        return param.requires_grad or (kind and not param.is_inference())


def check_class(function: str, optimizer_class: Any) -> None:
    """Whether the hooks can do what the class does in a step."""
    from .optimizer import FusedOptimizer

    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, FusedOptimizer)):
        raise TypeError(
            f"{function} takes one of fusedopt's classes, like fusedopt.AdamW, got "
            f"{getattr(optimizer_class, '__name__', optimizer_class)!r}"
        )
    if inspect.unwrap(optimizer_class.step) is not inspect.unwrap(FusedOptimizer.step):
        raise TypeError(
            f"{optimizer_class.__name__} has a step() of its own, which {function}() would not "
            "call in the backward"
        )


def wrapper_that_reduces_later(model: torch.nn.Module) -> str | None:
    """The name of a class that reduces gradients after they were accumulated."""
    reduces_later = {"DistributedDataParallel", "FullyShardedDataParallel"}
    for module in model.modules():
        for name in reduces_later.intersection(cls.__name__ for cls in type(module).__mro__):
            return name
    return None


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _allowing_calls(param: Tensor) -> AbstractContextManager[Any]:
    """A parameter of a lazy module refuses most calls before the first forward. It stays the same
    object, with its hooks, when it becomes an ordinary one."""
    return torch._C.DisableTorchFunctionSubclass() if is_lazy(param) else nullcontext()
