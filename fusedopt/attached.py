"""The optimizer in the backward: each parameter is updated as soon as its gradient is ready."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .optimizer import FusedOptimizer, Group

Optimizer = TypeVar("Optimizer", bound=FusedOptimizer)


def attach(
    model: torch.nn.Module | Iterable[Any], optimizer_class: type[Optimizer], **options: Any
) -> Optimizer:
    """Update each parameter during ``backward()``, as soon as its gradient is ready, and free the
    gradient: the gradients of a model never exist all at once.

    The result is an ordinary optimizer: schedulers take it, ``state_dict()`` and
    ``load_state_dict()`` are those of its class. After ``backward()``, its ``step()`` finds no
    gradients and does nothing, so that loops and trainers that call it stay as they are.

    Args:
        model (Module or iterable): a module, of which the parameters that require a gradient are
            taken, or what the class takes as ``params``.
        optimizer_class: ``fusedopt.Adam``, ``AdamW``, ``SGD``, ``RMSprop`` or ``Adagrad``.
        options: keyword arguments of the class.

    Returns:
        The optimizer. :func:`detach` takes it out of the backward.

    Raises:
        TypeError: ``optimizer_class`` is none of fusedopt's.
        ValueError: an option needs all gradients at once (``max_grad_norm``, ``amp_fused``) or the
            graph of the step (``differentiable``); or the model is wrapped in
            ``DistributedDataParallel`` or ``FullyShardedDataParallel``, which reduce gradients
            after they were accumulated (``fully_shard`` works).

    Every ``backward()`` is a step: gradients cannot be accumulated over several, clipped by their
    common norm, or unscaled by a ``GradScaler``. If a step raises then ``backward()`` does; the
    parameters before it have been updated. Hooks of ``step()`` run in ``step()``.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, FusedOptimizer)):
        raise TypeError(
            "attach takes one of fusedopt's classes, like fusedopt.AdamW, got "
            f"{getattr(optimizer_class, '__name__', optimizer_class)!r}"
        )
    params: Iterable[Any] = model  # type: ignore[assignment]
    if isinstance(model, torch.nn.Module):
        _check_model(model)
        params = [param for param in model.parameters() if param.requires_grad]
    optimizer = optimizer_class(params, **options)
    _check_options(optimizer)
    optimizer._attached = Attached(optimizer)
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
    """The hooks of an optimizer, and for each parameter an optimizer of it alone, so that a step
    looks at nothing else. State and options are those of the whole."""

    def __init__(self, whole: FusedOptimizer) -> None:
        self._whole = whole
        self._parts: dict[Tensor, tuple[int, FusedOptimizer]] = {}
        self._handles: list[RemovableHandle] = []

    def hook(self) -> None:
        """Registers the parameters that are new in the optimizer."""
        for g, group in enumerate(self._whole.param_groups):
            for i, param in enumerate(group["params"]):
                if param not in self._parts and param.requires_grad:
                    self._parts[param] = g, _part(self._whole, g, i)
                    self._handles.append(param.register_post_accumulate_grad_hook(self._step))

    def unhook(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _step(self, param: Tensor) -> None:
        whole = self._whole
        _check_options(whole)
        g, part = self._parts[param]
        part.param_groups[0].update(_of_one(whole.param_groups[g], param))
        part.state.clear()
        if param in whole.state:
            part.state[param] = whole.state[param]
        part._take_step()
        if param in part.state:
            whole.state[param] = part.state[param]
        param.grad = None
        whole._opt_called = True  # type: ignore[attr-defined]  # schedulers ask for it


def _part(whole: FusedOptimizer, g: int, i: int) -> FusedOptimizer:
    group = whole.param_groups[g]
    part = object.__new__(type(whole))
    part.__setstate__(
        {
            "defaults": whole.defaults,
            "state": defaultdict(dict),
            "param_groups": [_of_one(group, group["params"][i])],
        }
    )
    part._describe = lambda *_: whole._describe(g, i)  # type: ignore[method-assign]
    return part


def _of_one(group: Group, param: Tensor) -> Group:
    return {k: v for k, v in group.items() if k != "param_names"} | {"params": [param]}


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
    for module in model.modules():
        if type(module).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise ValueError(
                f"{type(module).__name__} reduces gradients after they were accumulated, when "
                "attach() has used them already; shard the model with "
                "torch.distributed.fsdp.fully_shard, or use the optimizer without attach()"
            )
