"""What a native step comes to: that it is done, or what it leaves to Python."""

from __future__ import annotations

from typing import Any, NamedTuple

from .record import Members, Record
from .work import Gradients


class NoPlan(NamedTuple):
    """What a native step without a plan comes to."""

    is_done: bool = False
    is_stale: bool = True
    odd: list[int] = []


def odd(plan: Any, outcome: Any, members: Members) -> list[Record]:
    """The parameters that a native step has left; all of them if it could not look."""
    if outcome.is_stale:
        return members.with_grad()
    return [Record(members, *plan.locate(entry)[:2]) for entry in outcome.odd]


def refused(plan: Any, outcome: Any, members: Members) -> set[int]:
    """The ids of the parameters that a native step has left for want of a kernel alone."""
    if plan is None:
        return set()
    places = [(g, i) for g, i, _, is_refused in map(plan.locate, outcome.odd) if is_refused]
    return {id(members.groups[g]["params"][i]) for g, i in places}


def left_to_python(plan: Any, members: Members, outcome: Any, grads: Gradients) -> list[Record]:
    """Which of the odd entries of a plan take the Python rule, in the order of the groups. Adds to
    ``grads`` what the kernels see instead of their gradients: that they are among these, or for the
    other entries a copy. A copy that they do not take either is given up."""
    python = []
    for entry in outcome.odd:
        g, i, native, _ = plan.locate(entry)
        record = Record(members, g, i)
        copy = record.grad_in_layout() if native and entry not in grads else None
        grads[entry] = ... if copy is None else copy
        if copy is None:
            python.append(record)
    return sorted(python, key=lambda record: (record.g, record.i))
