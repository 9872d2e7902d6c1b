"""One stopwatch for both devices, and what else kept the machine busy while it ran."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch


def pick_device(name: str) -> torch.device:
    """The device called `name`, where "auto" is the GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def elapsed_ms(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds until `work` has finished on `device`, the time to launch it included."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)
    begin = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - begin) / 1e6


class OtherWork:
    """The cores that other processes have used since this was made; 0 where /proc does not tell."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.used = _cpu_seconds_of_others()

    def cores(self) -> float:
        seconds = time.perf_counter() - self.start
        return max(0.0, (_cpu_seconds_of_others() - self.used) / seconds)

    def disturbs(self) -> bool:
        """Whether the threads of torch had to share their cores."""
        return self.cores() > (os.cpu_count() or 1) - torch.get_num_threads() + 0.2


def _cpu_seconds_of_others() -> float:
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()
