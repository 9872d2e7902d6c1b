"""Measures the memory that `fusedopt.attach` saves, and the time that it takes.

A GPT of 85 million parameters is trained with each optimizer twice: as usual, and updated during
the backward. Each run is a process of its own, since a process never gives back its peak. Then the
first of the optimizers updates many small parameters: what does each of them add to a backward that
only makes gradients?
"""

from __future__ import annotations

import argparse
import inspect
import multiprocessing
import os
import resource
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import fusedopt
from bench import optimizers, report
from bench.timing import OtherWork, elapsed_ms, pick_device
from bench.train_gpt import GPT, HYPERPARAMETERS, Corpus, Size

MODES = ("ordinary", "attached")
BUCKET_BYTES: int = inspect.signature(fusedopt.attach).parameters["bucket_bytes"].default


def measure(name: str, mode: str, size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """Train for some steps in this process; what it held, its peak, and its times."""
    device = pick_device(options.device)
    torch.manual_seed(options.seed)
    corpus = Corpus(device)
    batches = Corpus.batches(corpus.train, options.steps, size, options.seed)
    model = GPT(size, corpus.vocabulary).to(device)
    cls, hyperparameters = getattr(fusedopt, optimizers.NAMES[name]), HYPERPARAMETERS[name]
    optimizer = (
        fusedopt.attach(model, cls, **hyperparameters)
        if mode == "attached"
        else cls(model.parameters(), **hyperparameters)
    )
    losses: list[float] = []
    others = OtherWork()

    def iterate(batch: tuple[Tensor, Tensor]) -> None:
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    times = [elapsed_ms(lambda batch=batch: iterate(batch), device) for batch in batches]
    params = [*model.parameters()]
    return {
        "parameter_bytes": size_of(params),
        "largest_parameter_bytes": max(size_of([param]) for param in params),
        "gradient_bytes_after_step": size_of(p.grad for p in params if p.grad is not None),
        "state_bytes": size_of(t for state in optimizer.state.values() for t in state.values()),
        "peak_bytes": peak_bytes(device),
        "step_ms": statistics.median(times[len(times) // 2 :]),
        **others.seen(device),
        "losses": losses,
    }


def size_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_bytes(device: torch.device) -> int:
    """On a GPU what torch had allocated, otherwise all memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compare(options: argparse.Namespace, size: Size) -> dict[str, dict[str, Any]]:
    """What each optimizer needs in either mode, the gain, and what was to be expected."""
    results = {}
    context = multiprocessing.get_context("spawn")
    with report.progress_bar() as progress, context.Pool(1, maxtasksperchild=1) as pool:
        task = progress.add_task("", total=len(options.optimizers) * len(MODES))
        for name in options.optimizers:
            result = {}
            for mode in MODES:
                progress.update(task, description=f"{name}, {mode}")
                result[mode] = pool.apply(measure, (name, mode, size, options))
                progress.advance(task)
            ordinary, attached = result["ordinary"], result["attached"]
            results[name] = result | {
                "gain_bytes": ordinary["peak_bytes"] - attached["peak_bytes"],
                # All gradients but those that wait, and the one that makes them too many.
                "expected_gain_bytes": ordinary["gradient_bytes_after_step"]
                - ordinary["largest_parameter_bytes"]
                - BUCKET_BYTES,
                "same_losses": ordinary["losses"] == attached["losses"],
            }
    return results


def tabulate(results: dict[str, dict[str, Any]]) -> Table:
    columns = ["optimizer", "mode", "params", "grads", "states", "peak", "gain", "expected"]
    table = report.table("Memory in MB", *columns, "step ms", "same loss", text_columns=2)
    held = ("parameter_bytes", "gradient_bytes_after_step", "state_bytes", "peak_bytes")
    for name, result in results.items():
        for mode in MODES:
            one, attached = result[mode], mode == "attached"
            megabytes = [one[key] for key in held]
            if attached:
                megabytes += [result["gain_bytes"], result["expected_gain_bytes"]]
            table.add_row(
                "" if attached else name,
                mode,
                *(f"{size / 1e6:.0f}" for size in megabytes),
                *([] if attached else ["", ""]),
                ("?" if one["busy"] else "") + f"{one['step_ms']:.0f}",
                ("yes" if result["same_losses"] else "no") if attached else "",
            )
    table.caption = "Expected gain: all gradients but a bucket and the largest."
    if note := report.busy_note(result[mode] for result in results.values() for mode in MODES):
        table.caption += f"\n{note}"
    return table


def added_us(name: str, count: int, options: argparse.Namespace) -> dict[str, float]:
    """Microseconds that each way of updating adds to a parameter of 64 elements."""
    device = pick_device(options.device)
    cls, hyperparameters = getattr(fusedopt, optimizers.NAMES[name]), HYPERPARAMETERS[name]

    def parameters() -> list[Tensor]:
        return [torch.nn.Parameter(torch.randn(64, device=device)) for _ in range(count)]

    def backward_of(params: list[Tensor], step: Callable[[], object]) -> Callable[[], None]:
        def backward() -> None:
            torch.cat(params).sum().backward()
            step()
            for param in params:
                param.grad = None

        return backward

    ways, kept = {"gradients only": backward_of(parameters(), int)}, []
    for way, size in {"attached": BUCKET_BYTES, "attached, one by one": 0}.items():
        params = parameters()
        kept.append(fusedopt.attach(params, cls, bucket_bytes=size, **hyperparameters))
        ways[way] = backward_of(params, int)
    params = parameters()
    ways["step() after it"] = backward_of(params, cls(params, **hyperparameters).step)

    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, work in ways.items():
            times[way].append(elapsed_ms(work, device))
    medians = {way: statistics.median(each[options.rounds // 5 :]) for way, each in times.items()}
    without = medians.pop("gradients only")
    return {way: (median - without) / count * 1e3 for way, median in medians.items()}


def tabulate_added(results: dict[int, dict[str, float]], name: str) -> Table:
    ways = [*next(iter(results.values()))]
    table = report.table(f"Added to a backward, us per parameter, {name}", "parameters", *ways)
    for count, added in results.items():
        table.add_row(f"{count:,}", *(f"{added[way]:.1f}" for way in ways))
    table.caption = f"Parameters of 64 elements; buckets of {BUCKET_BYTES:,} bytes."
    return table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.attached", description=__doc__)
    names = list(optimizers.WIDELY_USED)
    parser.add_argument("--optimizers", nargs="+", type=str.lower, choices=names, default=names)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--counts", type=int, nargs="+", default=[150, 1000])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument(
        "--default-malloc", action="store_true", help="on a CPU, count the holes of malloc too"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench/out"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run the benchmark and return the files it wrote."""
    options = parse(argv)
    if not options.default_malloc:
        # Memory that is freed goes back to the system, so that the peak is that of the tensors.
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**17)
    size = Size(options.layers, options.width, options.width // 64, options.context, options.batch)
    facts = report.environment(pick_device(options.device))
    report.console.print(f"The optimizer in the backward on {report.headline(facts)}")
    results = compare(options, size)
    report.console.print(tabulate(results))
    others, name = OtherWork(), options.optimizers[0]
    added = {count: added_us(name, count, options) for count in options.counts}
    report.console.print(tabulate_added(added, name))
    seen = others.seen(pick_device(options.device))
    if note := report.busy_note([seen]):
        report.console.print(note)
    setup = {"size": asdict(size), "steps": options.steps, "seed": options.seed}
    setup["default_malloc"] = options.default_malloc
    path = options.out / "attached.json"
    return [report.write_json(path, facts, **setup, results=results, added_us=added | seen)]


if __name__ == "__main__":
    main()
