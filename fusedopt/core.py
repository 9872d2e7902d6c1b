"""What an optimizer has in common with wrappers and shallow copies of it.

Trainers wrap an optimizer in an object whose class inherits from the optimizer's, with the same
``__dict__`` or with a ``__getattr__`` that looks there. What is set on the wrapper must reach the
step, and what the step leaves behind must be seen through the wrapper.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .hooks import InBackward
    from .unloading import Pack

# What pickles and copies have beside what torch pickles, if it is on.
PICKLED = ("max_grad_norm", "_amp_fused", "_offload")


class Core:
    """One for an optimizer, its wrappers and its shallow copies. Deep copies and pickles get their
    own."""

    __slots__ = (
        "_clips",
        "_in_backward",
        "amp_fused",
        "found_inf",
        "grad_scale",
        "max_grad_norm",
        "swaps",
        "unloaded",
    )

    # What torch.amp.GradScaler sets for a step, and deletes afterwards.
    found_inf: Tensor | None
    grad_scale: Tensor | None

    def __init__(self) -> None:
        self.max_grad_norm: float | None = None
        self.amp_fused = False
        # Of the last step.
        self._clips: dict[torch.device, Tensor] | None = None
        # What attach() or offload() does in the backward.
        self._in_backward: InBackward | None = None
        # The weights of parameters that hold their averages, of each context that is open.
        self.swaps: list[dict[Tensor, Tensor]] = []
        # Where offload_state() has put the state.
        self.unloaded: list[Pack] | None = None

    def check_can_step(self, name: str, call: str) -> None:
        if self.swaps:
            raise RuntimeError(
                f"{name}: the parameters hold their averages; leave swap_ema() before {call}"
            )
        self.check_loaded(name, call)

    def check_loaded(self, name: str, call: str) -> None:
        if self.unloaded is not None:
            raise RuntimeError(
                f"{name}: its state is in the memory of the host; call fusedopt.load_state() "
                f"before {call}"
            )

    def pickled(self, name: str) -> dict[str, Any]:
        self.check_loaded(name, "it is copied")
        offload = None if self._in_backward is None else self._in_backward.pickled()
        own = (self.max_grad_norm, self.amp_fused or None, offload)
        return {name: value for name, value in zip(PICKLED, own, strict=True) if value is not None}

    def resume(self, optimizer: Any, own: dict[str, Any]) -> None:
        """Takes over what was pickled."""
        for name in PICKLED[:2]:
            if name in own:
                setattr(self, name.removeprefix("_"), own[name])
        if "_offload" in own and self._in_backward is None:
            from .offloaded import Offloaded

            Offloaded(optimizer, own["_offload"]).hook()


def of_core(name: str) -> Any:
    """An attribute of the optimizer that is its core's."""

    def assign(optimizer: Any, value: Any) -> None:
        setattr(optimizer._core, name, value)

    def delete(optimizer: Any) -> None:
        delattr(optimizer._core, name)

    return property(attrgetter(f"_core.{name}"), assign, delete)


class AmpScalingSupport:
    """``_step_supports_amp_scaling``, by which GradScaler recognises optimizers that unscale by
    themselves: there while ``amp_fused`` is on. torch's constructors set it for ``fused=True``,
    which means something else here."""

    def __get__(self, optimizer: Any, owner: type) -> bool:
        if optimizer is None or not optimizer.amp_fused:
            raise AttributeError("_step_supports_amp_scaling")
        if optimizer._in_backward is not None:
            optimizer._in_backward.show_to_scaler()
        return True

    def __set__(self, optimizer: Any, value: bool) -> None:
        pass

    def __delete__(self, optimizer: Any) -> None:
        pass
