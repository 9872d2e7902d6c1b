"""Measures how far 10,000 steps end from where float64 ends, beside torch.optim's own distance.

All contenders of a dtype see the same random gradients, whose mean differs from element to element,
rounded to that dtype. The reference is torch's for-loop in float64 from the same start. An error is
the root mean square of the difference, as a share of the distance that the reference has come.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import fusedopt
from bench import optimizers, report

NUMEL = 4096  # the smallest tensor that has 8-bit state
NOISE, DRIFT = 0.1, 0.02  # of the gradients
# Beside a learning rate of 1e-3.
ARGUMENTS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}, "adagrad": {"lr": 1e-2}}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What the options of docs/storage.md make of it, for each dtype of the parameters.
FP32_STATE = {"state_dtype": torch.float32}
CODES = {"state_dtype": "8bit"}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "float32": {
        "fusedopt": {},
        "bfloat16 state": {"state_dtype": torch.bfloat16},
        "8-bit state": CODES,
    },
    "bfloat16": {
        "fusedopt": {},
        "float32 state": FP32_STATE,
        "split master": {"master_weights": "split"},
        "split master, float32 state": {"master_weights": "split", **FP32_STATE},
        "split master, 8-bit state": {"master_weights": "split", **CODES},
        "stochastic": {"rounding": "stochastic"},
        "stochastic, float32 state": {"rounding": "stochastic", **FP32_STATE},
        "stochastic, 8-bit state": {"rounding": "stochastic", **CODES},
    },
    "float16": {
        "fusedopt": {},
        "float32 state": FP32_STATE,
        "whole master, float32 state": {"master_weights": "fp32", **FP32_STATE},
        "8-bit state": CODES,
    },
}
BEST = "float64, rounded at the end"
# By contender and count of steps; None if the parameters are not finite.
Errors = dict[str, dict[str, float | None]]


class Contender:
    def __init__(self, start: Tensor, cls: type[torch.optim.Optimizer], **arguments: Any):
        self.param = nn.Parameter(start.clone())
        self.optimizer = cls([self.param], **arguments)

    def step(self, grad: Tensor) -> None:
        self.param.grad = grad.to(self.param.dtype, copy=True)
        self.optimizer.step()


def contenders(name: str, dtype: str, start: Tensor) -> dict[str, Contender]:
    class_name, arguments = optimizers.NAMES[name], {"lr": 1e-3, **ARGUMENTS.get(name, {})}
    stock, ours = optimizers.stock(class_name), getattr(fusedopt, class_name)
    modes = optimizers.stock_modes(class_name)
    result = {
        f"torch, {mode}": Contender(start, stock, **arguments, **modes[mode])
        for mode in ("forloop", "fused")
        if mode in modes
    }
    for label, options in VARIANTS[dtype].items():
        result[label] = Contender(start, ours, **arguments, **options)
    return result


def measure(name: str, dtype: str, options: argparse.Namespace) -> Errors:
    """The error of each contender after each count of steps in `options.after`."""
    torch.manual_seed(options.seed)
    start = torch.randn(NUMEL).to(DTYPES[dtype])
    drift = DRIFT * torch.randn(NUMEL)
    exact = contenders(name, dtype, start.double())["torch, forloop"]
    running = contenders(name, dtype, start)
    errors: Errors = {label: {} for label in (*running, BEST)}
    for step in range(1, options.steps + 1):
        grad = (drift + NOISE * torch.randn(NUMEL)).to(DTYPES[dtype])
        for contender in (exact, *running.values()):
            contender.step(grad)
        if step in options.after:
            reference = exact.param.detach()
            ends = {label: contender.param.detach() for label, contender in running.items()}
            ends[BEST] = reference.to(DTYPES[dtype])
            distance = rms(reference - start)
            for label, end in ends.items():
                error = rms(end - reference) / distance
                errors[label][str(step)] = error if math.isfinite(error) else None
    return errors


def rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def tabulate(dtype: str, results: dict[str, Errors], steps: int) -> Table:
    """A row for each contender, a column for each optimizer."""
    title = f"Error after {steps:,} steps, {dtype} parameters"
    table = report.table(title, "", *results)
    for label in dict.fromkeys(label for errors in results.values() for label in errors):
        table.add_row(label, *(cell(errors, label, steps) for errors in results.values()))
    return table


def cell(errors: Errors, label: str, steps: int) -> str:
    if label not in errors:
        return "-"
    error = errors[label][str(steps)]
    return "not finite" if error is None else f"{error:.1e}"


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run the measurement and return the files it wrote."""
    parser = argparse.ArgumentParser(prog="python -m bench.numerics", description=__doc__)
    names = list(optimizers.WIDELY_USED)
    parser.add_argument("--optimizers", nargs="+", type=str.lower, choices=names, default=names)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/out"))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    options.after = [10**power for power in range(2, int(math.log10(options.steps)) + 1)]
    options.after = sorted({*options.after, options.steps})
    facts = report.environment(torch.device("cpu"))
    results: dict[str, dict[str, Errors]] = {}
    with report.progress_bar() as progress:
        task = progress.add_task("", total=len(options.dtypes) * len(options.optimizers))
        for dtype in options.dtypes:
            results[dtype] = {}
            for name in options.optimizers:
                progress.update(task, description=f"{name}, {dtype}")
                results[dtype][optimizers.NAMES[name]] = measure(name, dtype, options)
                progress.advance(task)
            report.console.print(tabulate(dtype, results[dtype], options.steps))
    setup = {
        "steps": options.steps,
        "seed": options.seed,
        "elements": NUMEL,
        "noise": NOISE,
        "drift": DRIFT,
        "arguments": ARGUMENTS,
    }
    return [report.write_json(options.out / "numerics.json", facts, **setup, results=results)]


if __name__ == "__main__":
    main()
