"""Steps a small model a million times and watches the process: memory, open handles, time per step.

Gradients are made anew by every backward. Now and then the optimizer goes to a file and comes back
into a new object, a param group is added, and once in a window everything starts over with new
parameters, so that all windows do the same work and whatever grows from one to the next is a leak.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from torch import Tensor, nn

import fusedopt
from bench import optimizers, report
from bench.timing import OtherWork

WINDOW = 10_000  # steps
ADD_GROUP = 2_500  # steps from one added group to the next
CHECKPOINT = 1_000  # steps from one checkpoint to the next
WARM_UP = 0.1  # of the windows: allocators and caches fill up
QUANTITIES = {
    "resident_mb": "resident memory, MB",
    "handles": "open handles",
    "threads": "threads",
    "objects": "objects of Python's collector",
    "step_us": "step(), µs (10th percentile)",
}
DISCRETE = ("handles", "threads", "objects")


class Training:
    """A network of two layers, with one more parameter for every group that was added."""

    def __init__(self, name: str, more: dict[str, Any], is_offloaded: bool):
        self.is_offloaded = is_offloaded
        self.cls = getattr(fusedopt, optimizers.NAMES[name])
        self.more = more
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
        self.groups: list[list[nn.Parameter]] = [list(self.net.parameters())]
        self.optimizer = self.build()
        self.inputs = torch.randn(8, 16)

    def build(self) -> torch.optim.Optimizer:
        groups = [{"params": params} for params in self.groups]
        if self.is_offloaded:  # two chunks, and some that stay
            where = {"device": "cpu", "keep_below": 33, "chunk": 1024}
            return fusedopt.offload(groups, self.cls, lr=1e-3, **where, **self.more)
        return self.cls(groups, lr=1e-3, **self.more)

    def backward(self) -> None:
        loss: Tensor = self.net(self.inputs).square().mean()
        for (added,) in self.groups[1:]:
            loss = loss + added.square().mean()
        self.optimizer.zero_grad()
        loss.backward()

    def add_group(self) -> None:
        self.groups.append([nn.Parameter(torch.randn(64))])
        self.optimizer.add_param_group({"params": self.groups[-1], "lr": 1e-4})

    def reload(self, file: Path) -> None:
        torch.save(self.optimizer.state_dict(), file)
        if self.is_offloaded:
            fusedopt.detach(self.optimizer)
        self.optimizer = self.build()
        self.optimizer.load_state_dict(torch.load(file, weights_only=True))


def window(options: argparse.Namespace, file: Path) -> array[int]:
    """Nanoseconds of each `step()`."""
    training = Training(options.optimizer, options.more, options.offload)
    times = array("q")
    for step in range(1, WINDOW + 1):
        training.backward()
        begin = time.perf_counter_ns()
        training.optimizer.step()
        times.append(time.perf_counter_ns() - begin)
        if step % CHECKPOINT == 0:
            training.reload(file)
        if step % ADD_GROUP == 0:
            training.add_group()
    return times


def watch(options: argparse.Namespace) -> Iterator[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder, report.progress_bar() as progress:
        task = progress.add_task(options.optimizer, total=options.windows)
        for done in range(1, options.windows + 1):
            others = OtherWork()
            times = sorted(window(options, Path(folder, "optimizer.pt")))
            gc.collect()
            yield {
                "steps": done * WINDOW,
                "resident_mb": resident_bytes() / 2**20,
                "handles": len(os.listdir("/proc/self/fd")),
                "threads": len(os.listdir("/proc/self/task")),
                "objects": len(gc.get_objects()),
                "step_us": times[WINDOW // 10] / 1e3,
                "step_median_us": times[WINDOW // 2] / 1e3,
                "step_max_us": times[-1] / 1e3,
                "cores_of_others": others.cores(),
            }
            progress.advance(task)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def summarize(windows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """The level of each quantity in the first and last quarter after the warm-up."""
    warm = windows[math.ceil(len(windows) * WARM_UP) :]
    quarter = max(1, len(warm) // 4)
    result = {}
    for key in QUANTITIES:
        first, last = (
            statistics.median(w[key] for w in part) for part in (warm[:quarter], warm[-quarter:])
        )
        result[key] = {"first_quarter": first, "last_quarter": last, "growth": last - first}
    return result


def plot(path: Path, title: str, windows: list[dict[str, float]]) -> Path:
    with pyplot.rc_context(report.STYLE):
        figure, axes = pyplot.subplots(len(QUANTITIES), sharex=True, figsize=(7, 8))
        for axis, (key, label) in zip(axes, QUANTITIES.items(), strict=True):
            values = [window[key] for window in windows]
            axis.plot([w["steps"] / 1e3 for w in windows], values, color=report.FUSEDOPT_COLOR)
            axis.set_ylim(0, 1.3 * max(values))
            axis.set_title(label, loc="left")
        axes[-1].set_xlabel("thousand steps")
        figure.suptitle(title)
        written = report.write_png(path, figure)
        pyplot.close(figure)
    return written


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run the soak and return the files it wrote."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    names = list(optimizers.NAMES)
    parser.add_argument("--optimizer", type=str.lower, choices=names, default="adamw")
    parser.add_argument(
        "--steps", type=int, default=1_000_000, help=f"rounded up to windows of {WINDOW:,}"
    )
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="0 for no clipping")
    parser.add_argument("--offload", action="store_true", help="on the host, by its worker")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/out"))
    options = parser.parse_args(argv)
    if not sys.platform.startswith("linux"):
        parser.error("memory and handles are read from /proc, which only Linux has")
    options.windows = math.ceil(options.steps / WINDOW)
    options.more = {"max_grad_norm": options.max_grad_norm} if options.max_grad_norm else {}
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    facts = report.environment(torch.device("cpu"))
    begin = time.perf_counter()
    windows = list(watch(options))
    summary = summarize(windows)
    steps = options.windows * WINDOW
    title = f"{steps:,} steps of {optimizers.NAMES[options.optimizer]}"
    table = report.table(title, "", "first quarter", "last quarter", "growth")
    for key, label in QUANTITIES.items():
        digits = 0 if key in DISCRETE else 2
        table.add_row(label, *(f"{value:,.{digits}f}" for value in summary[key].values()))
    table.caption = f"Medians of windows of {WINDOW:,} steps; {time.perf_counter() - begin:.0f} s."
    report.console.print(table)
    setup = {"optimizer": options.optimizer, "max_grad_norm": options.max_grad_norm, "steps": steps}
    setup["offload"] = options.offload
    columns = {key: [window[key] for window in windows] for key in windows[0]}
    file = report.write_json(
        options.out / "soak.json", facts, **setup, summary=summary, windows=columns
    )
    return [file, plot(options.out / "soak.png", title, windows)]


if __name__ == "__main__":
    main()
