"""Steps per second of several processes that share the cores, against torch.optim in as many.

    python -m bench.processes --processes 8

Every process has its own model and optimizer and the number of threads that torch chooses, as in a
parameter search. The optimizers take turns of a few seconds in all processes together.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fusedopt
from bench import report
from bench.workloads import WORKLOADS, shapes

MODES = {
    "fusedopt": (fusedopt.AdamW, {}),
    "torch, fused": (torch.optim.AdamW, {"fused": True}),
    "torch, foreach": (torch.optim.AdamW, {"foreach": True}),
}


def work(workload: str, rounds: int, seconds: float, barrier: Any, results: Any) -> None:
    opts = {}
    for mode, (cls, options) in MODES.items():
        params = [torch.randn(shape, requires_grad=True) for shape in shapes(workload)]
        for param in params:
            param.grad = torch.randn_like(param)
        opts[mode] = cls(params, **options)
        opts[mode].step()
    for _ in range(rounds):
        for mode, opt in opts.items():
            barrier.wait()
            begin, steps = time.perf_counter(), 0
            while time.perf_counter() - begin < seconds:
                opt.step()
                steps += 1
            results.put((mode, steps / (time.perf_counter() - begin)))


def rates(workload: str, processes: int, rounds: int, seconds: float) -> dict[str, float]:
    """Steps per second of all processes together, by mode."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    arguments = (workload, rounds, seconds, barrier, results)
    running = [context.Process(target=work, args=arguments) for _ in range(processes)]
    for process in running:
        process.start()
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(processes * rounds * len(MODES)):
        mode, rate = results.get(timeout=600)
        found[mode].append(rate)
    for process in running:
        process.join()
    return {mode: processes * statistics.mean(rate) for mode, rate in found.items()}


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run all and return the files written."""
    parser = argparse.ArgumentParser(prog="python -m bench.processes", description=__doc__)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, default=["many_small", "mlp_100x10k"]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each mode in each round")
    parser.add_argument("--out", type=Path, default=Path("bench/out"))
    options = parser.parse_args(argv)
    facts = report.environment(torch.device("cpu"))
    cores = len(os.sched_getaffinity(0))
    table = report.table(f"AdamW, steps per second, {cores} cores", "workload", "processes", *MODES)
    results = []
    for workload in options.workloads:
        for processes in (1, options.processes):
            rate = rates(workload, processes, options.rounds, options.seconds)
            results.append({"workload": workload, "processes": processes, "steps_per_s": rate})
            table.add_row(workload, str(processes), *(f"{r:,.0f}" for r in rate.values()))
    table.caption = f"Of all processes together, each with {torch.get_num_threads()} threads."
    report.console.print(table)
    setup = {"cores": cores, "rounds": options.rounds, "seconds": options.seconds}
    return [report.write_json(options.out / "processes.json", facts, **setup, results=results)]


if __name__ == "__main__":
    main()
