"""Parameters that are stepped together with torch's operators: which those are, and that they are
still as they were when all of them was checked."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend, dtensor, memory, modes, options, scaling, tensor_kinds
from .known import Known, Picture, goes_with_others, own_tensors, range_of
from .modes import Mode
from .problem import Problem
from .record import Members, Record
from .rule import Group
from .scaling import Scaling
from .state import last_count


class Bucket(NamedTuple):
    """Parameters of one group that take one way together."""

    mode: Mode
    records: list[Record]
    factor: Tensor | None


@dataclass
class Work:
    """What a step leaves to torch's operators, without what is skipped."""

    buckets: list[Bucket]
    alone: list[tuple[Record, Tensor | None]]

    @property
    def records(self) -> list[Record]:
        return [
            *(record for bucket in self.buckets for record in bucket.records),
            *(record for record, _ in self.alone),
        ]

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


class _Range(NamedTuple):
    """Bytes that a step reads or writes."""

    begin: int
    end: int
    of: int  # a parameter
    is_written: bool


def _overlapping(ranges: list[_Range]) -> Iterator[list[_Range]]:
    """The ranges in order, those in one list that overlap, directly or through others."""
    found: list[_Range] = []
    end = 0
    for one in sorted(ranges, key=attrgetter("begin")):
        if one.begin == one.end:
            continue
        if found and one.begin >= end:
            yield found
            found = []
        end = max(end, one.end) if found else one.end
        found.append(one)
    if found:
        yield found


class Together:
    """What the steps of an optimizer remember of the parameters that take torch's operators."""

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}  # by the id of the parameter
        # What they write: where each range begins and ends, in order.
        self._begins: list[int] = []
        self._ends: list[int] = []
        self._terms: dict[int, Any] = {}
        # All parameters of the last step, if they are known, and where their gradients were.
        self._picture: Picture | None = None
        self._grad_places: list[int] = []

    def unknown(self, members: Members, records: list[Record]) -> list[Record]:
        """Those that must be checked, because something is not as it was. Of the others checks
        only what may be other numbers in every step.

        Raises:
            Problem: an option has no meaning in this step.
        """
        terms = {g: _terms(members, group) for g, group in enumerate(members.groups)}
        # The same object as long as it is equal.
        old = self._terms
        self._terms = {g: old[g] if old.get(g) == now else now for g, now in terms.items()}
        if not self._known or tensor_kinds.is_transforming() or tensor_kinds.is_traced():
            return [*records]
        known = self._unchanged(records)
        unknown = [record for record, one in zip(records, known, strict=True) if one is None]
        alike: dict[Any, Record] = {}  # one of those with the same numbers
        for record, one in zip(records, known, strict=True):
            if one is not None:
                count = one.numbers[-1] and record.state["step"].item()
                alike[one.numbers, count] = record
        for (numbers, count), record in alike.items():
            if count is not None and not 0 <= count < last_count(numbers[-1]):
                return records
            _check_numbers(record)
        return unknown

    def _unchanged(self, records: list[Record]) -> list[Known | None]:
        """What is known of each of them, None where it is not as it was."""
        terms = self._terms
        known: list[Known | None] = []
        for record in records:
            one = self._known.get(id(record.param))
            known.append(one if one is not None and one.terms is terms[record.g] else None)
        same = self._picture is not None and None not in known and self._picture.is_still(records)
        if not same:
            known = [
                one if one is not None and one.is_still(record) else None
                for record, one in zip(records, known, strict=True)
            ]
        places = [
            0 if one is None else record.grad.data_ptr()
            for record, one in zip(records, known, strict=True)
        ]
        if not same or places != self._grad_places:
            known = [
                one if one is not None and (one.shares or not self._writes(record.grad)) else None
                for record, one in zip(records, known, strict=True)
            ]
            if not same:
                self._picture = None if None in known else Picture(records)
            self._grad_places = places
        return known

    def _writes(self, grad: Tensor) -> bool:
        """Whether a step writes to the memory of a gradient."""
        begin, end = range_of(grad)
        at = bisect.bisect_right(self._begins, begin)
        if at > 0 and self._ends[at - 1] > begin:
            return True
        return at < len(self._begins) and self._begins[at] < end

    def remember(self, members: Members, records: list[Record], unknown: list[Record]) -> None:
        """What was checked, for this step and the next."""
        if not unknown:
            return
        listed = {id(param) for group in members.groups for param in group["params"]}
        self._known = {key: known for key, known in self._known.items() if key in listed}
        for device in {record.param.device for record in unknown}:
            if not backend.runs_on(device):
                backend.warn_of_missing_kernels(device.type)
        for record in unknown:
            if goes_with_others(record):
                self._known[id(record.param)] = Known(record, self._terms[record.g])
            else:
                self._known.pop(id(record.param), None)
        self._picture = None
        self._find_shared(records)

    def _find_shared(self, records: list[Record]) -> None:
        """Marks the parameters whose memory is written and that of others too, or read by others:
        it matters in which order they go, so that they go one by one."""
        ranges: list[_Range] = []
        for of, known in self._known.items():
            known.shares = False
            ranges += [_Range(*where, of, True) for where in known.ranges]
        seen: set[int] = set()
        for record in records:
            of = id(record.param)
            if of not in self._known:
                ranges += [_Range(*range_of(part), of, True) for part in _memory_of(record)]
            else:
                ranges.append(_Range(*range_of(record.grad), of, False))
                self._known[of].shares |= of in seen
            seen.add(of)
        self._begins, self._ends = [], []
        for together in _overlapping(ranges):
            if any(one.is_written for one in together):
                self._begins.append(together[0].begin)
                self._ends.append(max(one.end for one in together))
                for one in together if len(together) > 1 else ():
                    if one.of in self._known:
                        self._known[one.of].shares = True

    def arrange(self, members: Members, records: list[Record], scales: Scaling | None) -> Work:
        """Which way each of them goes."""
        alone: list[tuple[Record, Tensor | None]] = []
        factors: dict[torch.device, Tensor | None] = {}
        if scales is not None:
            devices = {record.param.device for record in records}
            factors = {
                device: scaling.grad_factor(scales[device])
                for device in devices
                if not scaling.skips(scales[device])
            }
            records = [record for record in records if record.param.device in factors]
        found: dict[Any, list[Record]] = {}
        for record in records:
            known = self._known.get(id(record.param))
            if known is None or known.shares:
                alone.append((record, factors.get(record.param.device)))
            else:
                key = record.g, record.param.device, known.kind
                found.setdefault(key, []).append(record)
        buckets = []
        optimizer = members.optimizer
        torchs = None if optimizer._stock is None else optimizer._torch_options
        for (g, device, kind), those in found.items():
            factor = factors.get(device)
            kind = kind._replace(is_scaled=factor is not None)
            mode = modes.choose(members.rule, torchs, members.groups[g], kind)
            if mode is Mode.ALONE:
                alone += [(record, factor) for record in those]
            else:
                buckets.append(Bucket(mode, those, factor))
        alone.sort(key=lambda one: (one[0].g, one[0].i))
        return Work(buckets, alone)


def _check_numbers(record: Record) -> None:
    try:
        options.check_numbers(record)
    except Problem as problem:
        raise problem.at(record.describe()) from problem.__cause__


def _terms(members: Members, group: Group) -> Any:
    """What decides, beside numbers, how the parameters of a group are kept and checked."""
    words = [
        (name, value)
        for name, value in group.items()
        if name not in ("params", "param_names")
        and (value is None or isinstance(value, (bool, str, torch.dtype)))
    ]
    kept = [slot.name for slot in members.rule.slots_of(group)]
    return words, kept, members.optimizer.amp_fused, group.get("ema") is None


def _memory_of(record: Record) -> list[Tensor]:
    """The memory of an unusual parameter and its state, as far as it has any."""
    tensors: list[Tensor] = []
    own = [tensor for tensor in own_tensors(record) if isinstance(tensor, Tensor)]
    for tensor in map(dtensor.local, (*own, record.grad)):
        is_whole = memory.is_plain(tensor) and tensor.layout is torch.strided
        tensors += [tensor] if is_whole and not tensor.is_nested else memory.parts_of(tensor)
    return [t for t in tensors if memory.is_plain(t) and memory.has_storage(t) and not t.is_meta]
