"""Compares the steps of fusedopt without its native module with the default mode of torch.optim.

Run with FUSEDOPT_BACKEND=python. Both are interleaved, and the medians are given; on the CPU the
default mode of torch.optim is the for-loop.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fusedopt
from bench import optimizers, report, workloads
from bench.timing import OtherWork, elapsed_ms, pick_device

SIZES = {"small_10": [(64,)] * 10} | {
    name: workloads.shapes(name) for name in ("many_small", "mlp_100x10k", "resnet50")
}
MOMENTUM = {"sgd, momentum": {"momentum": 0.9}}
CASES = [name for name in optimizers.NAMES if hasattr(torch.optim, optimizers.NAMES[name])]
CASES += MOMENTUM


def compare(case: str, size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step of either."""
    device = pick_device(options.device)
    name = optimizers.NAMES[case.partition(",")[0]]
    torch.manual_seed(0)
    built = []
    for module in (torch.optim, fusedopt):
        params = [torch.randn(shape, device=device).requires_grad_() for shape in SIZES[size]]
        for param in params:
            param.grad = torch.randn_like(param)
        built.append(getattr(module, name)(params, lr=1e-3, **MOMENTUM.get(case, {})))
    times: tuple[list[float], list[float]] = ([], [])
    others = OtherWork()
    for round_ in range(options.rounds + 5):
        for which in (0, 1) if round_ % 2 else (1, 0):
            taken = elapsed_ms(built[which].step, device)
            if round_ >= 5:
                times[which].append(taken)
    stock, ours = map(statistics.median, times)
    return {"torch_ms": stock, "fusedopt_ms": ours, "ratio": ours / stock, **others.seen(device)}


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run the benchmark and return the files it wrote."""
    parser = argparse.ArgumentParser(prog="python -m bench.without_native", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("bench/out"))
    options = parser.parse_args(argv)
    if fusedopt.backend.native is not None:
        parser.error("set FUSEDOPT_BACKEND=python: here the native module would take the steps")
    facts = report.environment(pick_device(options.device))
    report.console.print(f"Without the native module on {report.headline(facts)}")
    results: dict[str, dict[str, dict[str, Any]]] = {}
    with report.progress_bar() as progress:
        task = progress.add_task("", total=len(CASES) * len(SIZES))
        for case in CASES:
            for size in SIZES:
                progress.update(task, description=f"{case}, {size}")
                results.setdefault(case, {})[size] = compare(case, size, options)
                progress.advance(task)
    table = report.table("A step, as a multiple of torch.optim's default mode", "optimizer", *SIZES)
    for case, row in results.items():
        table.add_row(case, *("?" * one["busy"] + f"{one['ratio']:.2f}" for one in row.values()))
    table.caption = report.busy_note(one for row in results.values() for one in row.values())
    report.console.print(table)
    return [report.write_json(options.out / "without_native.json", facts, results=results)]


if __name__ == "__main__":
    main()
