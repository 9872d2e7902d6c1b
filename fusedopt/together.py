"""What the steps of an optimizer remember of the parameters that torch's operators step."""

from __future__ import annotations

from collections.abc import Set
from itertools import repeat
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from . import backend, dtensor, memory, options, tensor_kinds, work
from .addresses import Range, Written, address_of, addresses_of, overlapping, range_of
from .known import Columns, Known, Picture, goes_with_others, own_tensors
from .record import Members, Record, is_plain_dict, plain_groups
from .rule import Group
from .scaling import Scaling
from .work import Alike, Place


class _Settled:
    """What a step did all of whose parameters were known: the next does the same if it finds
    everything as it was."""

    def __init__(
        self,
        members: Members,
        records: list[Record],
        known: list[Known],
        terms: list[Any],
        written: Written,
    ) -> None:
        columns = Columns.of(records)
        self.places = [(record.g, record.i) for record in records]
        self.alike = work.alike_ones(records, known)
        self._amp_fused = members.optimizer.amp_fused
        self._sizes = [len(group["params"]) for group in members.groups]
        self._has_grad = [grad is not None for grad in members.grads()]
        self._picture = Picture(columns)
        self._terms, self._options = terms, [*map(_plain_options, members.groups)]
        self._are_checked = False  # the numbers of these options
        self.ways: work.Ways = {}  # with these options
        self._written, self._spans = written, [one.span for one in known]
        self._types = {alike.device.type for alike in self.alike}
        self._grads = addresses_of(columns.grads, self._types)

    def found_again(self, members: Members) -> Columns | None:
        """The parameters, gradients and state of a step if they are the same.

        Raises:
            TypeError, RuntimeError, ValueError: an option is not what it can be.
        """
        if plain_groups(members.groups) is not members.groups or not is_plain_dict(members.state):
            return None
        if members.optimizer.amp_fused != self._amp_fused:
            return None
        if [len(group["params"]) for group in members.groups] != self._sizes:
            return None
        for g, group in enumerate(members.groups):
            plain = _plain_options(group)
            if plain is None or plain != self._options[g]:
                self._are_checked = False
                self.ways = {}
                options.check_group(members, g)
                if _terms(members, group) != self._terms[g]:
                    return None
                self._options[g] = plain
        params = [param for group in members.groups for param in group["params"]]
        grads = members.grads()
        has_grad = [*map(is_not, grads, repeat(None))]
        if has_grad != self._has_grad:
            return None
        if not all(has_grad):
            at = [i for i, has in enumerate(has_grad) if has]
            params, grads = [params[i] for i in at], [grads[i] for i in at]
        states: list[dict[str, Any]] = [{}] * len(params)
        if members.state:
            states = [*map(members.state.get, params, states)]
        columns = Columns(params, grads, states)
        if not self._picture.is_still(columns):
            return None
        begins = addresses_of(grads, self._types)
        if begins != self._grads:
            if not self._written.is_apart(begins, self._spans):
                return None
            self._grads = begins
        return columns

    def goes_on(self, members: Members, columns: Columns) -> bool:
        """Whether the numbers of a step that has been found again have a meaning."""
        if not self._are_checked or members.rule.scalars:
            self._are_checked = _all_go_on(members, columns, self.places, self.alike)
        return self._are_checked


class Together:
    """What the steps of an optimizer remember of the parameters that take torch's operators."""

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}  # by the id of the parameter
        self._written = Written([])
        self.settled: _Settled | None = None

    # A step as the last ---------------------------------------------------------------------------

    def again(self, members: Members, scales: Scaling | None) -> work.Work | None:
        """The work of a step all of whose parameters take torch's operators and are as the last
        found them; None if something is not.

        Raises:
            TypeError, RuntimeError, ValueError: an option is not what it can be.
        """
        settled = self.settled
        if settled is None or tensor_kinds.is_transforming() or tensor_kinds.is_traced():
            return None
        columns = settled.found_again(members)
        if columns is None or not settled.goes_on(members, columns):
            return None
        factors = work.factors_of({one.device for one in settled.alike}, scales)
        return work.arranged(members, columns, settled.places, settled.alike, factors, settled.ways)

    def settle(self, members: Members, records: list[Record]) -> None:
        """A step of these parameters, all those that have a gradient, has been done: the next is
        seen at a glance, if all of them are known."""
        known = [self._known.get(id(record.param)) for record in records]
        terms = [_terms(members, group) for group in members.groups]
        found = [one for one in known if one is not None and not one.kind.is_first]
        if records and len(found) == len(records):
            self.settled = _Settled(members, records, found, terms, self._written)

    # Other steps ----------------------------------------------------------------------------------

    def unknown(self, members: Members, records: list[Record]) -> list[Record]:
        """Those that must be checked, because something is not as it was. Of the others looks only
        at what may be other numbers in every step."""
        if not self._known or tensor_kinds.is_transforming() or tensor_kinds.is_traced():
            return records
        terms = [_terms(members, group) for group in members.groups]

        def is_known(record: Record) -> bool:
            one = self._known.get(id(record.param))
            if one is None or one.terms != terms[record.g] or not one.is_still(record):
                return False
            begin = address_of(record.grad)
            return begin == one.begin if one.shares else self._written.is_apart([begin], [one.span])

        unknown: list[Record] = []
        known: dict[int, Record] = {}
        for record in records:
            of = id(record.param)
            if of not in known and is_known(record):
                known[of] = record
            else:  # or it is listed twice
                unknown.append(record)
        alike = work.alike_ones([*known.values()], [self._known[of] for of in known])
        places = [(record.g, record.i) for record in known.values()]
        columns = Columns.of([*known.values()])
        return unknown if _all_go_on(members, columns, places, alike) else records

    def remember(
        self,
        members: Members,
        records: list[Record],
        unknown: list[Record],
        refused: Set[int],
    ) -> None:
        """What was checked, for this step and the next. ``refused``: the ids of parameters whose
        device has kernels, but not this one."""
        if not unknown:
            return
        listed = {id(param) for group in members.groups for param in group["params"]}
        self._known = {key: known for key, known in self._known.items() if key in listed}
        for device in {record.param.device for record in unknown}:
            # Without a native module it was said at import, or asked for.
            if backend.native is not None and not backend.runs_on(device):
                backend.warn_of_missing_kernels(device.type, backend.missing_kernels(device))
        terms = [_terms(members, group) for group in members.groups]
        for record in unknown:
            if goes_with_others(record, id(record.param) in refused):
                self._known[id(record.param)] = Known(record, terms[record.g])
            else:
                self._known.pop(id(record.param), None)
        self.settled = None
        self._find_shared(records)

    def _find_shared(self, records: list[Record]) -> None:
        """Marks the parameters whose memory is written and that of others too, or read by others:
        it matters in which order they go, so that they go one by one."""
        ranges: list[Range] = []
        for of, known in self._known.items():
            known.shares = False
            ranges += [Range(*where, of, True) for where in known.ranges]
        seen: set[int] = set()
        for record in records:
            of = id(record.param)
            if of not in self._known:
                ranges += [Range(*range_of(part), of, True) for part in _memory_of(record)]
            else:
                ranges.append(Range(*range_of(record.grad), of, False))
                self._known[of].shares |= of in seen
            seen.add(of)
        written: list[tuple[int, int]] = []
        for together in overlapping(ranges):
            if any(one.is_written for one in together):
                written.append((together[0].begin, max(one.end for one in together)))
                for one in together if len(together) > 1 else ():
                    if one.of in self._known:
                        self._known[one.of].shares = True
        self._written = Written(written)

    def arrange(self, members: Members, records: list[Record], scales: Scaling | None) -> work.Work:
        """Which way each of them goes."""
        factors = work.factors_of({record.param.device for record in records}, scales)
        together = [record for record in records if id(record.param) in self._known]
        alike = work.alike_ones(together, [self._known[id(record.param)] for record in together])
        places = [(record.g, record.i) for record in together]
        found = work.arranged(members, Columns.of(together), places, alike, factors, {})
        found.alone += [
            (record, factors[record.param.device])
            for record in records
            if id(record.param) not in self._known and record.param.device in factors
        ]
        found.alone.sort(key=lambda one: (one[0].g, one[0].i))
        return found


def _all_go_on(
    members: Members, columns: Columns, places: list[Place], alike: dict[Alike, list[int]]
) -> bool:
    return all(
        work.numbers_go_on(members, one, columns.at(at), [places[i] for i in at])
        for one, at in alike.items()
    )


# Options ------------------------------------------------------------------------------------------

_PLAIN_TYPES = {int, float, bool, str, type(None), torch.dtype}


def _plain_options(group: Group) -> Group | None:
    """The options of a group, if none of them can be another while it is the same object."""
    values = {name: v for name, v in group.items() if name not in ("params", "param_names")}
    for value in values.values():
        parts = value if type(value) is tuple else (value,)
        if not {*map(type, parts)} <= _PLAIN_TYPES:
            return None
    return values


def _terms(members: Members, group: Group) -> Any:
    """What decides, beside numbers, how the parameters of a group are kept and checked."""
    defaults, switches = members.optimizer.defaults, members.rule.switches
    words: list[tuple[str, Any]] = []
    for name, value in group.items():
        if isinstance(defaults.get(name), bool) or name in switches:
            words.append((name, bool(value)))
        elif name not in ("params", "param_names"):
            if value is None or isinstance(value, (str, torch.dtype)):
                words.append((name, value))
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
