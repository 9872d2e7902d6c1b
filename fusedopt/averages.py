"""The averages of the weights (``ema=``), and parameters that hold them for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import dtensor

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

Weights = dict[Tensor, Tensor]


class WeightsNotRestoredError(RuntimeError):
    """Some parameters could not take their weights back at the end of ``swap_ema()``.

    Attributes:
        weights (dict): by parameter, the weights that are not where they belong.
    """

    def __init__(self, message: str, weights: Weights) -> None:
        super().__init__(message)
        self.weights = weights


@contextlib.contextmanager
def swapped(optimizer: FusedOptimizer) -> Iterator[None]:
    """The parameters hold their averages; see ``swap_ema()``."""
    core, turn = optimizer._core, optimizer._turn
    weights: Weights = {}
    try:
        with turn.exclusively(optimizer._name, "swap_ema()"):
            theirs = [*optimizer.ema_parameters()]
            params = [param for group in optimizer.param_groups for param in group["params"]]
            before = kept(params)
            core.swaps.append(weights)
            weights.update(before)  # from here on there is something to restore
            swap_in(params, theirs)
        yield
    finally:
        # An interrupt, or what a signal handler raises, comes after it.
        try:
            with turn.lock:
                leave(core.swaps, weights, optimizer._describe)
        except WeightsNotRestoredError:
            raise
        except BaseException:
            with turn.lock:
                leave(core.swaps, weights, optimizer._describe)
            raise


def kept(params: Iterable[Tensor]) -> Weights:
    return {param: param.detach().clone() for param in params}


def swap_in(params: list[Tensor], averages: list[Tensor]) -> None:
    """In one call, which no interrupt can divide."""
    targets = [dtensor.local(param).detach() for param in params]
    torch._foreach_copy_(targets, [dtensor.local(average).detach() for average in averages])
    _count_write(params)


def restore(weights: Weights, describe: Callable[[Tensor], str]) -> None:
    """Writes weights into what their parameters are now: other memory, another dtype, device,
    memory format or sharding than when they were kept.

    Raises:
        WeightsNotRestoredError: a parameter cannot take them. All others have got theirs.
    """
    problems: dict[Tensor, str] = {}
    targets: list[Tensor] = []
    values: list[Tensor] = []
    for param, weight in weights.items():
        problem = _problem(param, weight)
        if problem:
            problems[param] = problem
            continue
        if dtensor.is_dtensor(param):
            param, weight = map(dtensor.local, (param, dtensor.placed_like(weight, param)))
        targets.append(param.detach())
        values.append(weight)
    restored = [param for param in weights if param not in problems]
    try:
        torch._foreach_copy_(targets, values)
    except RuntimeError:  # one by one, to see of which it is
        for param, target, value in zip(restored, targets, values, strict=True):
            try:
                target.copy_(value)
            except RuntimeError as error:
                problems[param] = str(error)
    _count_write(restored)
    if problems:
        what = "; ".join(f"{describe(param)}: {problem}" for param, problem in problems.items())
        raise WeightsNotRestoredError(
            f"at the end of swap_ema(), parameters could not take their weights back ({what}); "
            "this error has them in its attribute `weights`, by parameter",
            {param: weights[param] for param in problems},
        )


def leave(swaps: list[Weights], weights: Weights, describe: Callable[[Tensor], str]) -> None:
    """Ends one of the open contexts, and restores its weights; once that is done, calling it again
    does nothing.

    Raises:
        WeightsNotRestoredError: see :func:`restore`.
    """
    at = next((i for i, swap in enumerate(swaps) if swap is weights), None)
    if at is None:
        return
    if at + 1 < len(swaps):  # a context that began later is still open: it restores them
        swaps[at + 1].update(weights)
    elif weights:
        try:
            restore(weights, describe)
        except WeightsNotRestoredError:
            del swaps[at]
            raise
    del swaps[at]


def _count_write(params: Iterable[Tensor]) -> None:
    """Autograd is to notice, of DTensors too, whose shards were written."""
    increment_version([param for param in params if not param.is_inference()])


def _problem(param: Tensor, weight: Tensor) -> str | None:
    """Why the parameter cannot take the weights, if it cannot."""
    if param.shape != weight.shape:
        return f"it had shape {tuple(weight.shape)}, and has {tuple(param.shape)} now"
    now, then = param.dtype, weight.dtype
    if (now.is_complex, now.is_floating_point) != (then.is_complex, then.is_floating_point):
        return f"it was {then}, and is {now} now"
    if param.is_meta and not weight.is_meta:
        return "it is on the meta device now, without data"
    if dtensor.is_dtensor(param):
        if dtensor.meshes([param]) != dtensor.meshes([weight]):
            return f"it was {dtensor.placed(weight)}, and is {dtensor.placed(param)} now"
        param = dtensor.local(param)
    elif dtensor.is_dtensor(weight):
        return f"it was {dtensor.placed(weight)}, and is {dtensor.placed(param)} now"
    return None if _has_memory(param) else "its storage was freed"


def _has_memory(tensor: Tensor) -> bool:
    """Whether the storage reaches as far as the elements do; of other kinds of tensors than torch's
    own, their copy_() decides."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return True
    if tensor.is_meta or tensor.numel() == 0:
        return True
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + reach + 1) * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= needed
