"""Tests that run on all ranks of a process group, in processes that stay alive between tests."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import importlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fusedopt

# Seconds. A collective that not all ranks join fails by itself and says where; any other hang is
# found by the parent.
COLLECTIVE_TIMEOUT = 60
TIMEOUT = 90

_NATIVE = fusedopt.backend.native

# The server imports once what takes seconds, and forks.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.optim",
        "torch.distributed.tensor.parallel",
    ]
)


def on_ranks(size: int | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The test runs in each of ``size`` processes, or as many as its argument ``size`` or
    ``layout.size`` says.

    Its arguments are pickled on the way there. Of these, ``backend`` and ``device`` choose what
    runs: "cpu" is gloo, "cuda" is NCCL.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**arguments: Any) -> None:
            ranks = size or arguments.get("size") or arguments["layout"].size
            on_world(ranks, test, arguments)

        return run

    return decorate


def on_world(ranks: int, function: Callable[..., None], arguments: dict[str, Any]) -> None:
    """Calls the function on all ranks of the world of this size."""
    device = arguments.get("device", "cpu")
    if device == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    world = _worlds.get((ranks, device))
    if world is None or not world.alive:
        world = _worlds[ranks, device] = World(ranks, device)
    world.run(function.__module__, function.__qualname__, arguments)


@functools.cache
def mesh(device: str, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """One of a kind: a mesh makes process groups, and those are never freed."""
    return init_device_mesh(device, shape, mesh_dim_names=names)


class World:
    """The ranks of one process group."""

    def __init__(self, size: int, device: str) -> None:
        self.alive = True
        self.folder = tempfile.TemporaryDirectory(prefix="fusedopt-world-")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            here, there = _context.Pipe()
            process = _context.Process(
                target=_serve, args=(rank, size, device, self.folder.name, there), daemon=True
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, module: str, name: str, arguments: dict[str, Any]) -> None:
        """What fails on a rank fails here. The world ends then, for some of its ranks may be
        waiting for others; the next test starts a new one."""
        for pipe in self.pipes:
            with contextlib.suppress(BrokenPipeError):  # whoever died at the start says so below
                pipe.send((module, name, arguments, conftest.SEED))
        answers = self._answers()
        outcomes = {outcome for outcome, _ in answers}
        if outcomes == {"passed"}:
            return
        if outcomes == {"skipped"}:
            pytest.skip(answers[0][1])
        ranks: dict[str, list[str]] = {}
        for rank, (outcome, text) in enumerate(answers):
            report = f"{outcome}:\n{text}{self._printed(rank)}"
            ranks.setdefault(report, []).append(str(rank))
        self.close()
        reports = [f"rank {', '.join(same)} {report}" for report, same in ranks.items()]
        pytest.fail("\n".join(reports), pytrace=False)

    def _answers(self) -> list[tuple[str, str]]:
        """Of each rank its outcome, and why."""
        answers: dict[int, tuple[str, str]] = {}
        deadline = time.monotonic() + TIMEOUT
        while len(answers) < len(self.pipes):
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in (self.pipes.index(pipe) for pipe in ready):
                try:
                    answers[rank] = self.pipes[rank].recv()
                except (EOFError, ConnectionError):
                    self.processes[rank].join(5)
                    answers[rank] = ("died", "")
            if any(outcome not in ("passed", "skipped") for outcome, _ in answers.values()):
                deadline = min(deadline, time.monotonic() + 3)  # the others may say something too
        silent = [rank for rank in range(len(self.pipes)) if rank not in answers]
        for rank in silent:
            os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5 if silent else 0)
        return [answers.get(rank, ("did not answer", "")) for rank in range(len(self.pipes))]

    def _printed(self, rank: int) -> str:
        """In this call, stacks and the last words of C++ code among it."""
        return _output(self.folder.name, rank).read_text()[-10_000:]

    def close(self) -> None:
        self.alive = False
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.folder.cleanup()


_worlds: dict[tuple[int, str], World] = {}


@atexit.register
def _close_all() -> None:
    for world in _worlds.values():
        if world.alive:
            world.close()


# In the processes ------------------------------------------------------------------------------


def _output(folder: str, rank: int) -> Path:
    return Path(folder, f"output-{rank}")


def _serve(rank: int, size: int, device: str, folder: str, pipe: Connection) -> None:
    output = _output(folder, rank)
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the parent asks for the stacks
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT),
    )
    while True:
        try:
            request = pipe.recv()
        except EOFError:  # the parent is gone
            return
        os.truncate(output, 0)
        pipe.send(_call(*request))


def _call(module: str, name: str, arguments: dict[str, Any], seed: int) -> tuple[str, str]:
    torch.manual_seed(seed)
    random.seed(seed)
    try:
        _choose_backend(arguments.get("backend"))
        function = getattr(importlib.import_module(module), name)
        getattr(function, "__wrapped__", function)(**arguments)
    except pytest.skip.Exception as skip:
        return "skipped", str(skip)
    except BaseException:
        return "failed", traceback.format_exc()
    finally:
        sys.stdout.flush()
    return "passed", ""


def _choose_backend(name: str | None) -> None:
    """As the fixture ``backend`` does in the parent."""
    if name == "python":
        fusedopt.backend.native = None
    elif name == "kernels":
        fusedopt.backend.native = conftest.require_kernels()
    else:
        fusedopt.backend.native = _NATIVE
