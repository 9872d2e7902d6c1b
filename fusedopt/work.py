"""What a step leaves to torch's operators: which parameters go together, and which way."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from itertools import chain
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dtensor, modes, options, scaling, tensor_kinds
from .formats import HALVES
from .known import Columns, Known
from .modes import Kind, Mode
from .problem import Problem
from .record import Members, Record
from .rule import STEP, storage_is_on
from .scaling import Scaling
from .state import last_count
from .traced import Program

Place = tuple[int, int]  # group and index of a parameter

# What a native step sees instead of some gradients, by the number of the parameter: a copy, None
# for a parameter that has no part in the step, or ... for one that is stepped in Python.
Gradients = dict[int, "Tensor | EllipsisType | None"]


class Alike(NamedTuple):
    """What the parameters have in common that take one way together."""

    g: int
    device: torch.device
    kind: Kind
    shares: bool  # their memory, with others: they go one by one


@dataclass
class Way:
    """How parameters go that have something in common, while their options are the same."""

    mode: Mode
    # Once they are known: torch's function with these options, and an update without step counts.
    function: functools.partial[Any] | None = None
    program: Program | None = None


# By what parameters have in common, and whether their gradients are scaled.
Ways = dict[tuple[Alike, bool], Way]


@dataclass
class Bucket:
    """Parameters of one group that take one way together."""

    way: Way
    columns: Columns
    factor: Tensor | None
    places: list[Place]
    members: Members
    kind: Kind

    def __getitem__(self, part: slice) -> Bucket:
        return replace(self, columns=self.columns[part], places=self.places[part])

    @property
    def mode(self) -> Mode:
        return self.way.mode

    def record(self, at: int) -> Record:
        return Record(self.members, *self.places[at])

    def is_plain(self) -> bool:
        """Whether all tensors are of the dtype that the rule computes with, and it is all."""
        is_stored = storage_is_on(self.members.groups[self.places[0][0]])
        return self.kind.is_uniform and self.kind.dtype not in HALVES and not is_stored

    @property
    def records(self) -> list[Record]:
        return [*map(self.record, range(len(self.places)))]


@dataclass
class Work:
    """What a step leaves to torch's operators, without what is skipped."""

    buckets: list[Bucket]
    alone: list[tuple[Record, Tensor | None]]

    @property
    def records(self) -> list[Record]:
        of_buckets = chain.from_iterable(bucket.records for bucket in self.buckets)
        return [*of_buckets, *(record for record, _ in self.alone)]

    @torch.no_grad()
    def kept(self) -> tuple[list[Tensor], list[Tensor]]:
        """What is written before all else is computed, and copies of it. Of the CPU only: other
        devices seldom have the memory for that, and there an error may leave some parameters
        stepped."""
        written, kept = {}, []
        for record, _ in self.alone:
            for value in (record.param, *(record.state or {}).values()):
                if not isinstance(value, Tensor) or id(value := dtensor.local(value)) in written:
                    continue
                copy = tensor_kinds.copy(value) if value.device.type == "cpu" else None
                if copy is not None:
                    written[id(value)] = value if tensor_kinds.is_unusual(value) else value.detach()
                    kept.append(copy)
        return [*written.values()], kept


def alike_ones(records: list[Record], known: list[Known]) -> dict[Alike, list[int]]:
    found: dict[Alike, list[int]] = {}
    for at, (record, one) in enumerate(zip(records, known, strict=True)):
        alike = Alike(record.g, record.param.device, one.kind, one.shares)
        found.setdefault(alike, []).append(at)
    return found


def factors_of(
    devices: set[torch.device], scales: Scaling | None
) -> dict[torch.device, Tensor | None]:
    """What gradients are multiplied with on each device, without those on which the step is
    skipped. Asks each of them once."""
    if scales is None:
        return dict.fromkeys(devices)
    return {
        device: scaling.grad_factor(scales[device])
        for device in devices
        if not scaling.skips(scales[device])
    }


def arranged(
    members: Members,
    columns: Columns,
    places: list[Place],
    alike: dict[Alike, list[int]],
    factors: dict[torch.device, Tensor | None],
    ways: Ways,
) -> Work:
    """Which way each of them goes. ``ways``: those that are known."""
    work, optimizer = Work([], []), members.optimizer
    torchs = None if optimizer._stock is None else optimizer._torch_options
    for one, at in alike.items():
        if one.device not in factors:
            continue
        factor = factors[one.device]
        kind = one.kind._replace(is_scaled=factor is not None)
        key = one, factor is not None
        if key not in ways:
            ways[key] = Way(modes.choose(members.rule, torchs, members.groups[one.g], kind))
        those = places if len(at) == len(places) else [places[i] for i in at]
        if one.shares or ways[key].mode is Mode.ALONE:
            work.alone += [(Record(members, *place), factor) for place in those]
        else:
            work.buckets.append(Bucket(ways[key], columns.at(at), factor, those, members, kind))
    return work


def numbers_go_on(members: Members, alike: Alike, columns: Columns, places: list[Place]) -> bool:
    """Whether numbers of the options and of the parameters have a meaning in the step, which may be
    other ones in every step."""
    keys = () if alike.kind.counts_on_device else (*members.rule.scalar_by_name,)
    for at in {*columns.like(keys)}:
        if STEP.name in keys:
            count = columns.states[at][STEP.name]
            if not 0 <= count.item() < last_count(count.dtype):
                return False
        try:
            options.check_numbers(Record(members, *places[at]))
        except Problem:
            return False
    return True
