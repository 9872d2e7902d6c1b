"""One stopwatch for both devices, and what else kept the machine busy while it ran."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

CYCLES_PER_MS = 2_000_000  # 2 GHz; a GPU with a slower clock waits longer, which does no harm


def pick_device(name: str) -> torch.device:
    """The device called `name`, where "auto" is the GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def elapsed_ms(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds until `work` has finished on `device`, the time to launch it included."""
    return wall_and_host_ms(work, device)[0]


def wall_and_host_ms(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Milliseconds until `work` has finished on `device`, and until it returned.

    The device is idle at the start: whoever has to wait for its queue would pay for earlier work.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    begin = time.perf_counter_ns()
    work()
    returned = time.perf_counter_ns()
    if cuda:
        torch.cuda.synchronize(device)
    end = time.perf_counter_ns() if cuda else returned
    return (end - begin) / 1e6, (returned - begin) / 1e6


def device_ms(work: Callable[[], object], device: torch.device, head_start_ms: float) -> float:
    """Milliseconds that a GPU takes for `work` whose launches are already in its queue.

    It is kept waiting for `head_start_ms`, in which the host has to launch everything. More than
    about a thousand launches do not fit into the queue: their time includes the host's.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(int(head_start_ms * CYCLES_PER_MS))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)


class OtherWork:
    """The cores that other processes have used since this was made; 0 where /proc does not tell."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.used = _cpu_seconds_of_others()

    def cores(self) -> float:
        seconds = time.perf_counter() - self.start
        return max(0.0, (_cpu_seconds_of_others() - self.used) / seconds)

    def seen(self, device: torch.device) -> dict[str, bool | float]:
        """Whether the host's threads had to share their cores; a GPU is launched by one thread."""
        needed = 1 if device.type == "cuda" else torch.get_num_threads()
        cores = self.cores()
        busy = cores > (os.cpu_count() or 1) - needed + 0.2
        return {"busy": busy, "cores_of_others": round(cores, 2)}


def _cpu_seconds_of_others() -> float:
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()
