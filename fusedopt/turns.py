"""Whose turn it is to change an optimizer."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator


class Turn:
    """Threads that change one optimizer wait for each other. Not part of a copy, except of a
    shallow one, which has the same parameters."""

    __slots__ = ("__weakref__", "is_stepping", "lock")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.is_stepping = False  # seen by code that the step itself runs, such as a signal handler
        _turns.add(self)

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()

    def step(self, name: str, take: Callable[[], None]) -> None:
        """Runs a step as the only one. ``name``: the optimizer's, for messages."""
        with self.lock:
            if self.is_stepping:
                raise _error(name, "step()")
            self.is_stepping = True
            try:
                take()
            finally:
                self.is_stepping = False

    @contextlib.contextmanager
    def exclusively(self, name: str, call: str) -> Iterator[None]:
        """While no other thread changes the optimizer."""
        with self.lock:
            if self.is_stepping:
                raise _error(name, call)
            yield


def _error(name: str, call: str) -> RuntimeError:
    return RuntimeError(
        f"{name}: {call} was called from within step(), by a signal handler or a tensor subclass, "
        "or in a child that was forked while another thread was in step(); call it, or fork, "
        "before or after the step"
    )


_turns: weakref.WeakSet[Turn] = weakref.WeakSet()


def _after_fork() -> None:
    """The thread that had a turn is not in this process. What it was stepping stays unfinished."""
    for turn in _turns:
        turn.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
