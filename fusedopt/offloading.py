"""The optimizer on the host, whose work hides behind the backward."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import torch

from . import dtensor, hooks, waiting
from .offloaded import Offloaded
from .optimizer import FusedOptimizer

Optimizer = TypeVar("Optimizer", bound=FusedOptimizer)


class Settings(NamedTuple):
    """Arguments of :func:`fusedopt.offload`."""

    gradients: str
    overlap: str | None
    chunk: int
    keep_below: int
    num_threads: int
    device: str


def offload(
    model: torch.nn.Module | Iterable[Any],
    optimizer_class: type[Optimizer],
    *,
    gradients: str = "host",
    overlap: str | None = "backward",
    chunk: int = 2**25,
    keep_below: int = 4096,
    num_threads: int | None = None,
    device: str = "cuda",
    **arguments: Any,
) -> Optimizer:
    """Keep the state of an optimizer in the memory of the host, and step there.

    The result is an ordinary optimizer of its class over the user's own parameters and groups:
    schedulers, ``state_dict()``, hooks, clipping and averages are what they are without it, and so
    are the bits of what it computes. On the host each parameter has an image of the same dtype;
    with ``master_weights="split"`` that and the state are 12 bytes for each element of bfloat16, or
    8 with ``state_dtype=torch.bfloat16``.

    Args:
        model (Module or iterable): a module, of which the parameters that require a gradient are
            taken, or what the class takes as ``params``.
        optimizer_class: one of fusedopt's classes, like ``fusedopt.AdamW``.
        gradients (str): ``"host"`` takes each gradient to the host in the backward, as soon as it
            is there, and frees it; ``"device"`` leaves them in ``.grad`` until ``step()``, for what
            reads them there, such as ``DistributedDataParallel`` or other people's clipping
            (default: ``"host"``).
        overlap (str, optional): ``"backward"`` steps chunks during the backward, where no option
            needs all gradients at once (``max_grad_norm``, ``amp_fused``), and ``step()`` waits for
            the last; ``"forward"``, for a module only, lets ``step()`` return before, and each
            module waits in its next forward for its own parameters; ``None`` steps all of it in
            ``step()`` (default: ``"backward"``).
        chunk (int): bytes of consecutive parameters that are stepped and sent back together, and a
            unit of pinned memory (default: 32 MiB).
        keep_below (int): parameters with fewer elements stay on their device, with their state
            (default: 4096).
        num_threads (int, optional): threads of the step on the host (default: the cores that this
            process may use, divided by the processes of its machine (``LOCAL_WORLD_SIZE``), less
            one for the model).
        device (str): the kind of device whose parameters are offloaded; ``"cpu"`` tries it without
            a GPU, by copies within the host (default: ``"cuda"``).
        arguments: keyword arguments of the class.

    Returns:
        The optimizer, which must be kept: the model does not. :func:`detach` makes it an ordinary
        one, and its state goes to the devices of the parameters.

    Raises:
        TypeError: ``optimizer_class`` is none of fusedopt's, or has a ``step()`` of its own.
        ValueError: an argument cannot be that; no parameter is on a GPU; an option does not go
            with it (``capturable``, ``differentiable``); or the model is wrapped in a class that
            reduces gradients after they were accumulated, and ``gradients="host"``.
        RuntimeError: the host memory cannot be pinned.

    Differences from the optimizer itself: with ``gradients="host"`` ``.grad`` is None after the
    backward, so that nobody else can clip, unscale or add to it, and without an option that needs
    all gradients every ``backward()`` is a step, except within ``optimizer.accumulating()``;
    ``step()`` waits for it and must be called. The norm of ``max_grad_norm`` is taken on the host
    then. ``state`` is on the CPU. Parameters that are not offloaded are stepped as ever where they
    are: small ones, those of other dtypes than floating point numbers, and those whose elements are
    not side by side in memory. If a chunk cannot be stepped, ``step()`` or the next backward raises
    what it was; its parameters and state are as they were, those of other chunks may be updated.
    """
    hooks.check_class("offload", optimizer_class)
    settings = Settings(gradients, overlap, chunk, keep_below, _num_threads(num_threads), device)
    _check(settings, isinstance(model, torch.nn.Module))
    params: Iterable[Any] = model  # type: ignore[assignment]
    if isinstance(model, torch.nn.Module):
        if gradients == "host":
            _check_model(model)
        params = [param for param in model.parameters() if param.requires_grad]
    optimizer = optimizer_class(params, **arguments)
    if device == "cuda":
        _check_devices(optimizer)
    offloaded = Offloaded(optimizer, settings)
    offloaded.hook()
    if isinstance(model, torch.nn.Module) and overlap == "forward":
        waiting.hook(model, offloaded)
    return optimizer


def _check(settings: Settings, has_model: bool) -> None:
    choices = {"gradients": ("host", "device"), "overlap": ("backward", "forward", None)}
    for name, known in choices.items():
        if (value := getattr(settings, name)) not in known:
            raise ValueError(
                f"offload: {name} must be one of {', '.join(map(repr, known))}, got {value!r}"
            )
    for name, least in (("chunk", 1), ("keep_below", 0), ("num_threads", 1)):
        value = getattr(settings, name)
        if type(value) is not int or value < least:
            raise ValueError(f"offload: {name} must be an int of at least {least}, got {value!r}")
    if settings.device not in ("cpu", "cuda"):
        raise ValueError(f"offload: device must be 'cuda' or 'cpu', got {settings.device!r}")
    if settings.overlap == "forward" and not has_model:
        raise ValueError(
            'offload: overlap="forward" needs the module, whose forward waits for its parameters; '
            "these are parameters alone"
        )


def _check_model(model: torch.nn.Module) -> None:
    if (name := hooks.wrapper_that_reduces_later(model)) is not None:
        raise ValueError(
            f"{name} reduces gradients after they were accumulated, when offload() has taken them "
            'already; take gradients="device", or shard the model with '
            "torch.distributed.fsdp.fully_shard"
        )


def _check_devices(optimizer: FusedOptimizer) -> None:
    params = [record.param for record in optimizer._members().all()]
    held = [param for param in map(dtensor.local, params) if isinstance(param, torch.Tensor)]
    if not any(param.device.type == "cuda" for param in held):
        where = ", ".join(sorted({param.device.type for param in held}))
        name = type(optimizer).__name__
        is_sharded = any(map(dtensor.is_dtensor, params))
        raise ValueError(
            f"offload: no parameter is on a CUDA device (they are on: {where}), so there is "
            f"nothing to offload; fusedopt.{name} steps them where they are"
            + (
                ", which is right for FSDP with CPUOffloadPolicy, too: its parameters, gradients "
                "and state are on the host already"
                if is_sharded and where == "cpu"
                else ""
            )
        )


def _num_threads(given: int | None) -> int:
    if given is not None:
        return given
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, (cores or 1) // processes - 1)
