"""What the tests know of each optimizer: one table for each, in a module of its name.

``cases.py`` finds them by themselves; everything that is tried with every class is tried with a new
one as soon as it has a table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Options = dict[str, Any]


@dataclass(frozen=True)
class Between:
    low: float
    high: float
    or_zero: bool = False


FLAG = (False, True)
UNIT = Between(0, 0.95)
ZERO_OR_UNIT = Between(0, 0.95, or_zero=True)
ZERO_OR_SMALL = Between(0.01, 0.3, or_zero=True)


def always(group: Options) -> bool:
    return True


@dataclass(frozen=True)
class Slot:
    """A state tensor of each parameter: which groups keep it, which may store it in 8 bits, and
    whether it is never negative."""

    when: Callable[[Options], Any] = always
    coded: Callable[[Options], Any] = always
    unsigned: bool = False


@dataclass(frozen=True)
class Table:
    name: str
    cases: list[Options]
    # Those that keep the most state.
    richest: Options
    slots: dict[str, Slot]
    # A slot without which a state is no state, once there was a step.
    required: str
    # The numbers of a group.
    numbers: tuple[str, ...]
    # Options to draw from: of any kind, and such that no rule is ill-conditioned (values to choose
    # from, a range, or a list of ranges).
    drawn: dict[str, tuple[Any, ...]]
    mild: dict[str, tuple[Any, ...] | Between | list[Between]]
    # Of each, the result is that of float64 or of torch.
    extremes: list[Options]
    # Makes options that were drawn valid together, and such that the oracle has all of them.
    settle: Callable[[Options], None] = lambda options: None
    # Another class whose rule is of the same kind. What hangs on the kind alone (threads,
    # processes, trainers, memory, interrupts) is tried with that one.
    like: str | None = None
    # What is compared with where torch has no class of this name: the published form.
    published: type[torch.optim.Optimizer] | None = None
    counts_steps: bool = True
    takes_sparse: bool = False
    # The constructor makes state, and not the first step.
    makes_state_at_once: bool = False
    # Penalties are subtracted from the parameter, not added to the gradient.
    is_decoupled: bool = False
    # Options of this class that torch does not have, and what steps with them in torch's place.
    extras: tuple[str, ...] = ()
    oracle: Callable[[Options], type | None] = lambda options: None

    @property
    def stock(self) -> Any:
        return self.published or getattr(torch.optim, self.name)

    @property
    def unsigned(self) -> set[str]:
        return {key for key, slot in self.slots.items() if slot.unsigned}

    def slots_of(self, group: Options) -> tuple[str, ...]:
        """The names of the state tensors of a parameter of this group."""
        return tuple(key for key, slot in self.slots.items() if slot.when(group))
