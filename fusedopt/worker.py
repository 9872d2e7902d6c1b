"""The thread that steps chunks on the host."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Worker:
    """Does one thing after the other. Its thread ends when this is gone, or the interpreter."""

    def __init__(self) -> None:
        self._start()
        self._last: Future[None] | None = None
        _workers.add(self)

    def submit(self, call: Callable[..., None], *arguments: Any) -> Future[None]:
        if self._process != os.getpid():  # forked: the thread is not in this process
            self._start()
        self._last = self._executor.submit(call, *arguments)
        return self._last

    def finish(self) -> None:
        if self._last is not None:
            self._last.exception()

    def _start(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="fusedopt-offload")
        self._process = os.getpid()


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


def _before_fork() -> None:
    """So that no child finds a step that nobody finishes."""
    for worker in [*_workers]:
        worker.finish()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)
