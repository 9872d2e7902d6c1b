"""What every benchmark writes down the same way: the machine, the tables, the look of the plots."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

import fusedopt

matplotlib.use("Agg")

PALE = "pale: on a busy machine"
SECONDS_PER_LINE = 10  # of progress in a log
STOCK_COLOR = "#b8bec9"
FUSEDOPT_COLOR = "#d1495b"
OPTIMIZER_COLORS = {
    "adam": "#00798c",
    "adamw": "#66b2b2",
    "sgd": "#edae49",
    "rmsprop": "#d1495b",
    "adagrad": "#5c4d7d",
    "adadelta": "#9a8c98",
    "adamax": "#2a9d8f",
    "lion": "#f4722b",
    "nadam": "#457b9d",
    "radam": "#8ab17d",
}
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.dpi": 130,
    "font.size": 9,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}

console = Console()
_said: set[str] = set()


def environment(device: torch.device) -> dict[str, Any]:
    """The facts without which a timing means nothing."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "fusedopt": fusedopt.__version__,
        "backend": fusedopt.backend.status(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def headline(facts: dict[str, Any]) -> str:
    """One line of `environment` for the top of a plot or a table."""
    if facts["device"] == "cpu":
        where = f"{facts['cpu']}, {facts['threads']} threads"
    else:
        where = f"{facts['device']}, driver {facts['gpu'].get('driver_version', '?')}"
    return f"{where}, torch {facts['torch']}, fusedopt {facts['fusedopt']}"


def _commit() -> str | None:
    """What git says; outside a repository, what the environment variable COMMIT says."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return _output(describe) or os.environ.get("COMMIT")


def _gpu(device: torch.device) -> dict[str, Any]:
    """What torch and, where it is installed, nvidia-smi know about a GPU."""
    properties = torch.cuda.get_device_properties(device)
    fields = "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "ecc.mode.current"
    query = ["nvidia-smi", f"--id=GPU-{properties.uuid}", "--format=csv,noheader"]
    values = _output([*query, f"--query-gpu={','.join(fields)}"])
    return {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        **(dict(zip(fields, values.split(", "), strict=True)) if values else {}),
    }


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


class Lines(Progress):
    """Progress in a log: what goes on now, in a line every few seconds."""

    next_line = 0.0

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        now = time.perf_counter()
        task = next(task for task in self.tasks if task.id == task_id)
        if now > self.next_line and not task.finished:
            console.print(f"  {task.description} {task.completed:.0f}/{task.total:.0f}")
            self.next_line = now + SECONDS_PER_LINE


def progress_bar() -> Progress:
    """A bar on a terminal, plain lines elsewhere."""
    if not console.is_terminal:
        return Lines(console=console, disable=True)  # disabled is what draws the bar
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def busy_note(results: Iterable[dict[str, Any]]) -> str:
    """What the "?" of busy `results` means: said once in a process, under the first table."""
    cores = [result["cores_of_others"] for result in results if result["busy"]]
    if not cores or "busy" in _said:
        return ""
    _said.add("busy")
    others = f"other programs took up to {max(cores):.1f} of {os.cpu_count()} cores"
    return f"? {others}:\n  do not rely on these numbers"


def table(title: str, *columns: str, text_columns: int = 1) -> Table:
    """An empty table for 80 characters; the first `text_columns` hold words, the others numbers."""
    result = Table(title=f"\n{title}", title_style="bold", box=SIMPLE_HEAD, padding=0)
    result.title_justify = result.caption_justify = "left"
    result.show_edge = False
    for index, column in enumerate(columns):
        words = index < text_columns
        result.add_column(column, justify="left" if words else "right", no_wrap=True)
    return result


def opacity(result: dict[str, Any]) -> float:
    """What a busy machine has measured is shown, but pale."""
    return 0.3 if result["busy"] else 1.0


def write_json(path: Path, facts: dict[str, Any], **results: Any) -> Path:
    """Numbers to four digits: noise begins before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = _rounded({"environment": facts, **results})
    path.write_text(json.dumps(written, separators=(",", ":")) + "\n")
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [*map(_rounded, value)]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write_png(path: Path, figure: Figure) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
