"""Measures how far second moments in 8 bits are from float32 ones where neighbours differ.

A code has 64 neighbours and their largest as scale, and is rounded at random at every step. That
keeps the code right on average, which is a fourth root; the mean of its fourth power is larger, and
the more so the smaller the code. Gradients are normal; the first element of each block has a
standard deviation of 1, the others have `ratio`. `moment` is by how much the second moments of the
others are too large on average over the second half of all steps, and `step` by how much their
steps are too long, both as shares.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fusedopt
from bench import report

SCALE_ELEMENTS = 64
NUMEL = SCALE_ELEMENTS * 256
RATIOS = (1.0, 0.1, 0.01, 0.001, 0.0001)
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "Adam": ("exp_avg_sq", {"betas": (0.9, 0.999)}),
    "RMSprop": ("square_avg", {"alpha": 0.99}),
}


def measure(name: str, ratio: float, steps: int, seed: int) -> dict[str, float]:
    """Excess of second moments and of steps with 8-bit state, as shares."""
    key, arguments = RULES[name]
    cls = getattr(fusedopt, name)
    small = torch.arange(NUMEL) % SCALE_ELEMENTS != 0
    scale = torch.where(small, ratio, 1.0)
    torch.manual_seed(seed)
    params = [nn.Parameter(torch.zeros(NUMEL)) for _ in range(2)]
    codes = cls([params[0]], state_dtype="8bit", **arguments)
    exact = cls([params[1]], **arguments)
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for step in range(steps):
        grad = scale * torch.randn(NUMEL)
        before = [param.detach().clone() for param in params]
        for param, optimizer in zip(params, (codes, exact), strict=True):
            param.grad = grad
            optimizer.step()
        if step < steps // 2:  # second moments grow to where they stay
            continue
        decoded = codes.state_dict(stock=True)["state"][0][key]
        moments = decoded, exact.state[params[1]][key]
        for i in range(2):
            sums[i, 0] += moments[i][small].double().mean()
            sums[i, 1] += (params[i].detach() - before[i])[small].double().abs().mean()
    moment, length = (sums[0] / sums[1] - 1).tolist()
    return {"ratio": ratio, "moment": moment, "step": length}


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run the measurement and return the files it wrote."""
    parser = argparse.ArgumentParser(prog="python -m bench.codes", description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/out"))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    facts = report.environment(torch.device("cpu"))
    results: dict[str, list[dict[str, float]]] = {}
    for name in RULES:
        results[name] = []
        for ratio in RATIOS:
            found = measure(name, ratio, options.steps, options.seed)
            results[name].append(found)
            report.console.print(name, found)
    setup = {"steps": options.steps, "seed": options.seed, "elements": NUMEL}
    return [report.write_json(options.out / "codes.json", facts, **setup, results=results)]


if __name__ == "__main__":
    main()
