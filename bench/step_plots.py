"""The figures of the step benchmark; `python -m bench.step_plots step.json` draws them again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench import optimizers, report
from bench.workloads import LARGE

BAR_WIDTH = 0.17
BEYOND_CACHE = ("resnet50", *LARGE)

Results = list[dict[str, Any]]


def draw(results: Results, title: str, path: Path) -> list[Path]:
    """Write every figure for which there are `results` beside `path`, their JSON file."""
    large = [r for r in results if r["workload"] in BEYOND_CACHE and r["fraction_of_floor"]]
    on_gpu = [r for r in results if "host_ms" in r]
    figures = {
        "speedup": (plot_speedups, results),
        "floor": (plot_floor, large),
        "host": (plot_host, on_gpu),
    }
    written = []
    with pyplot.rc_context(report.STYLE):
        for name, (plot, selected) in figures.items():
            if selected:
                figure = plot(selected, title)
                written.append(report.write_png(path.with_name(f"{path.stem}_{name}.png"), figure))
                pyplot.close(figure)
    return written


def plot_speedups(results: Results, title: str) -> Figure:
    """How many times faster than whichever mode of torch.optim is the fastest."""
    figure, axis = bar_chart(results, title)
    axis.set_yscale("log", base=2)
    for result, x, color in grouped_bars(results):
        speedup = result["speedup"]
        axis.bar(x, speedup - 1, BAR_WIDTH, bottom=1, color=color, alpha=report.opacity(result))
        label(axis, x, max(speedup, 1), f"{speedup:.1f}" if speedup < 9.95 else f"{speedup:.0f}")
    ticks = [2.0**power for power in range(-3, 9)]
    axis.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    speedups = [result["speedup"] for result in results]
    axis.set_ylim(min(0.85, 0.9 * min(speedups)), max(2.2, 1.25 * max(speedups)))
    axis.axhline(1, color="black", linewidth=1)
    axis.set(ylabel="speed-up", title="fusedopt against the fastest mode of torch.optim")
    legend(figure, results)
    return figure


def plot_floor(results: Results, title: str) -> Figure:
    """How close to a loop that only moves the same bytes."""
    on_gpu = "device_ms" in results[0]
    bytes_moved = "a device-to-device copy of" if on_gpu else "a loop over"
    figure, axis = bar_chart(results, title)
    for result, x, color in grouped_bars(results):
        fraction, stock = result["fraction_of_floor"], result["stock_fraction_of_floor"]
        axis.bar(x, 100 * fraction, BAR_WIDTH, color=color, alpha=report.opacity(result))
        edges = x - BAR_WIDTH / 2, x + BAR_WIDTH / 2
        axis.hlines(100 * stock, *edges, color="black", linewidth=1.5)
        label(axis, x, 0, f"{100 * fraction:.0f}", offset=-11)
    axis.tick_params(axis="x", length=0, pad=13)
    axis.axhline(100, color="black", linewidth=1, linestyle=":")
    axis.set_ylim(0, max(115, *(108 * result["fraction_of_floor"] for result in results)))
    axis.set(ylabel="% of the memory floor", title=f"fusedopt against {bytes_moved} the same bytes")
    stock = Line2D([], [], color="black", linewidth=1.5, label="fastest mode of torch.optim")
    legend(figure, results, stock)
    return figure


def plot_host(results: Results, title: str) -> Figure:
    """How long the host is busy with a step before it can launch other work."""
    figure, axis = bar_chart(results, title)
    axis.set_yscale("log")
    times = [host_us_per_tensor(result) for result in results]
    bottom = 0.5 * min(map(min, times))
    for (result, x, color), (ours, stock) in zip(grouped_bars(results), times, strict=True):
        axis.bar(x, ours, BAR_WIDTH, color=color, alpha=report.opacity(result))
        axis.hlines(stock, x - BAR_WIDTH / 2, x + BAR_WIDTH / 2, color="black", linewidth=1.5)
        label(axis, x, bottom, f"{ours:.2g}" if ours < 10 else f"{ours:.0f}", offset=-11)
    axis.tick_params(axis="x", length=0, pad=13)
    axis.set_ylim(bottom, 2 * max(map(max, times)))
    axis.set(ylabel="µs per tensor", title="Time of the host until step() returns")
    stock = Line2D([], [], color="black", linewidth=1.5, label="torch.optim, fused if it can")
    legend(figure, results, stock)
    return figure


def host_us_per_tensor(result: dict[str, Any]) -> tuple[float, float]:
    """Of fusedopt, and of torch's fused mode or, where there is none, its quickest to return."""
    host = result["host_ms"]
    stock = host.get("fused") or min(ms for mode, ms in host.items() if mode != "fusedopt")
    return tuple(1e3 * ms / result["tensors"] for ms in (host["fusedopt"], stock))


def bar_chart(results: Results, title: str) -> tuple[Figure, Axes]:
    """An empty chart with one place on the x axis per workload and dtype."""
    labels = [f"{workload}\n{dtype}" for (workload, dtype), _ in groups(results)]
    figure, axis = pyplot.subplots(figsize=(max(8.5, 1.6 + 1.25 * len(labels)), 4.8))
    axis.set_xticks(range(len(labels)), labels)
    axis.set_xlim(-0.6, len(labels) - 0.4)
    axis.grid(axis="x", visible=False)
    figure.suptitle(title, fontsize=9, color="#555555")
    return figure, axis


def groups(results: Results) -> Iterator[tuple[tuple[str, str], Iterator[dict[str, Any]]]]:
    return groupby(results, key=lambda result: (result["workload"], result["dtype"]))


def grouped_bars(results: Results) -> Iterator[tuple[dict[str, Any], float, str]]:
    """Every result with the x of its bar and its color."""
    for center, (_, members) in enumerate(groups(results)):
        members = list(members)
        for index, result in enumerate(members):
            x = center + (index - (len(members) - 1) / 2) * BAR_WIDTH
            yield result, x, report.OPTIMIZER_COLORS[result["optimizer"]]


def label(axis: Axes, x: float, y: float, text: str, offset: int = 2) -> None:
    axis.annotate(
        text, (x, y), (0, offset), textcoords="offset points", ha="center", va="bottom", fontsize=7
    )


def legend(figure: Figure, results: Results, *more: Artist) -> None:
    names = dict.fromkeys(result["optimizer"] for result in results)
    patches = [Patch(color=report.OPTIMIZER_COLORS[n], label=optimizers.NAMES[n]) for n in names]
    handles = [*patches, *more]
    if any(result["busy"] for result in results):
        handles.append(Patch(color="#cccccc", label=report.PALE))
    columns = len(handles) if len(handles) <= 6 else 4
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step_plots", description=__doc__)
    parser.add_argument("json", type=Path, help="what bench.step wrote; figures go beside it")
    path = parser.parse_args().json
    run = json.loads(path.read_text())
    what = "step() with clipping" if run.get("clip") else "step()"
    title = f"{what} on {report.headline(run['environment'])}"
    report.console.print(*draw(run["results"], title, path), sep="\n")


if __name__ == "__main__":
    main()
