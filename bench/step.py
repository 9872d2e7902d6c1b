"""Times `step()` of fusedopt, of every implementation in torch.optim, and of a bare memory loop.

All contenders of a cell (workload, dtype, optimizer) share the parameters and take turns, one step
each per round, so that the noise of the machine hits all alike. Before every step a backward makes
new gradients: what a step costs with warm gradients at last step's addresses is not what it costs
in training.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import fusedopt
from bench import optimizers, report, step_plots
from bench.timing import OtherWork, elapsed_ms, pick_device
from bench.workloads import WORKLOADS, shapes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_BF16 = {"mlp_100x10k": list(optimizers.NAMES), "gpt2_124m": ["adam"]}
ARGUMENTS = {"sgd": {"momentum": 0.9}}
MODES = ("forloop", "foreach", "fused", "fusedopt", "floor")

MINIMUM_ROUNDS = 5
SLOW_MS = 50.0
SLOW_RATIO = 3.0
SLOW_STRIDE = 2  # a slow contender steps in every other round

BF16_SGD_NOTE = "† torch 2.13 computes bf16 fused SGD wrongly on the CPU (pytorch #191763)"


@dataclass(frozen=True)
class Cell:
    """One line of a table."""

    workload: str
    dtype: str
    optimizer: str


class Model:
    """The parameters that all optimizers of one workload and dtype share."""

    def __init__(self, workload: str, dtype: torch.dtype, device: torch.device, grads: str):
        def tensors(fill: Callable[[Tensor], Tensor]) -> list[Tensor]:
            empty = partial(torch.empty, dtype=dtype, device=device)
            return [fill(empty(shape)) for shape in shapes(workload)]

        self.device = device
        self.params = [nn.Parameter(tensor) for tensor in tensors(torch.zero_)]
        self.grads = tensors(lambda tensor: tensor.uniform_(-0.01, 0.01))
        self.keep_grads = grads == "kept"
        self.scratch: list[Tensor] = []
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad

    def backward(self) -> None:
        """The cheapest backward that makes gradients as any other does: in C++, in new memory."""
        if self.keep_grads:
            return
        for param in self.params:
            param.grad = None
        torch.autograd.backward(self.params, self.grads)

    @property
    def numel(self) -> int:
        return sum(param.numel() for param in self.params)

    def bytes_per_step(self, states: int) -> int:
        """Gradients are read; parameters and `states` tensors like them are read and written."""
        return self.numel * self.params[0].itemsize * (1 + 2 * (1 + states))

    def floor(self, states: int) -> Callable[[], object] | None:
        """A loop over as many bytes as a step has to move, without the optimizer."""
        if self.device.type == "cuda":
            half = self.bytes_per_step(states) // 2
            source = torch.zeros(half, dtype=torch.uint8, device=self.device)
            return partial(torch.empty_like(source).copy_, source)
        if (native := fusedopt.backend.native) is None:
            return None
        while len(self.scratch) < 2 + states:
            # Not zeros: pages that nobody has written yet are all one page of zeros, in the cache.
            self.scratch.append(torch.ones(self.numel, dtype=self.params[0].dtype))
        grad, *written = self.scratch[: 2 + states]
        return partial(native.memory_floor, [grad], written, torch.get_num_threads())


@dataclass
class Contender:
    name: str
    work: Callable[[], object]
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def build_optimizers(model: Model, name: str) -> dict[str, torch.optim.Optimizer]:
    class_name, arguments = optimizers.NAMES[name], ARGUMENTS.get(name, {})
    stock = getattr(torch.optim, class_name)
    built = {"fusedopt": getattr(fusedopt, class_name)(model.params, **arguments)}
    for mode, flags in optimizers.stock_modes(class_name).items():
        built[mode] = stock(model.params, **arguments, **flags)
    return built


def states_per_parameter(optimizer: torch.optim.Optimizer) -> int:
    param = optimizer.param_groups[0]["params"][0]
    return sum(value.shape == param.shape for value in optimizer.state[param].values())


def measure(model: Model, cell: Cell, budget: float) -> dict[str, Any]:
    built = build_optimizers(model, cell.optimizer)
    for optimizer in built.values():
        model.backward()
        optimizer.step()
    contenders = [Contender(mode, optimizer.step) for mode, optimizer in built.items()]
    states = states_per_parameter(built["forloop"])
    if floor := model.floor(states):
        contenders.append(Contender("floor", floor))
    others = OtherWork()
    take_turns(contenders, model, budget)
    busy = {"busy": others.disturbs(), "cores_of_others": round(others.cores(), 2)}
    return summarize(cell, contenders, model, states) | busy


def take_turns(contenders: list[Contender], model: Model, budget: float) -> None:
    """Time one step of each per round, from another first one every round, for `budget` seconds."""
    deadline = time.perf_counter() + budget
    number = 0
    while number < MINIMUM_ROUNDS or time.perf_counter() < deadline:
        first = number % len(contenders)
        slow = slow_ones(contenders) if number % SLOW_STRIDE else ()
        for contender in contenders[first:] + contenders[:first]:
            if contender.name not in slow:
                model.backward()
                contender.samples.append(elapsed_ms(contender.work, model.device))
        number += 1


def slow_ones(contenders: list[Contender]) -> set[str]:
    """Who takes so long that a sample of each round would starve the others."""
    limit = max(SLOW_MS, SLOW_RATIO * min(contender.median for contender in contenders))
    return {contender.name for contender in contenders if contender.median > limit}


def summarize(cell: Cell, contenders: list[Contender], model: Model, states: int) -> dict[str, Any]:
    medians = {contender.name: contender.median for contender in contenders}
    ours, floor = medians["fusedopt"], medians.get("floor")
    stock = {name: ms for name, ms in medians.items() if name not in ("fusedopt", "floor")}
    best = min(stock, key=stock.__getitem__)
    moved = model.bytes_per_step(states)
    return {
        "workload": cell.workload,
        "dtype": cell.dtype,
        "optimizer": cell.optimizer,
        "tensors": len(model.params),
        "parameters": model.numel,
        "bytes_per_step": moved,
        "median_ms": medians,
        "fastest_ms": {contender.name: min(contender.samples) for contender in contenders},
        "rounds": {contender.name: len(contender.samples) for contender in contenders},
        "best_stock_mode": best,
        "speedup": stock[best] / ours,
        "us_per_tensor": 1e3 * ours / len(model.params),
        "gb_per_second": moved / ours / 1e6,
        "fraction_of_floor": floor and floor / ours,
        "stock_fraction_of_floor": floor and floor / stock[best],
    }


def run(cells: list[Cell], budget: float, grads: str, device: torch.device) -> Iterator[dict]:
    """Measure `cells`; those that follow each other on one workload and dtype share its model."""
    with report.progress_bar() as progress:
        task = progress.add_task("", total=len(cells))
        for workload, of_workload in groupby(cells, key=lambda cell: cell.workload):
            results = []
            for dtype, of_dtype in groupby(of_workload, key=lambda cell: cell.dtype):
                model = Model(workload, DTYPES[dtype], device, grads)
                for cell in of_dtype:
                    progress.update(task, description=f"{workload} {dtype} {cell.optimizer}")
                    results.append(measure(model, cell, budget))
                    progress.advance(task)
                del model  # two of them would not fit beside each other
            report.console.print(tabulate(results))
            yield from results


def tabulate(results: list[dict[str, Any]]) -> Table:
    first = results[0]
    size = f"{first['parameters']:,} parameters in {first['tensors']:,} tensors"
    columns = ["ms per step", *MODES, "speed-\nup", "µs per\ntensor", "GB/s", "of\nfloor"]
    table = report.table(f"{first['workload']}: {size}", *columns)
    for result in results:
        table.add_row(*row(result))
    notes = {
        report.BUSY_NOTE: any(result["busy"] for result in results),
        BF16_SGD_NOTE: any(map(wrong_in_stock, results)),
    }
    table.caption = "\n".join(note for note, applies in notes.items() if applies)
    return table


def row(result: dict[str, Any]) -> list[str]:
    medians = {name: significant(ms) for name, ms in result["median_ms"].items()}
    if wrong_in_stock(result):
        medians["fused"] += "†"
    fraction = result["fraction_of_floor"]
    return [
        f"{result['optimizer']} {result['dtype']}",
        *(medians.get(mode, "-") for mode in MODES),
        f"{'?' if result['busy'] else ''}{significant(result['speedup'])}x",
        significant(result["us_per_tensor"]),
        significant(result["gb_per_second"]),
        f"{fraction:.0%}" if fraction else "-",
    ]


def wrong_in_stock(result: dict[str, Any]) -> bool:
    return (result["optimizer"], result["dtype"]) == ("sgd", "bf16")


def significant(value: float) -> str:
    """Three significant digits, but no more than three decimals."""
    decimals = 2 - math.floor(math.log10(value))
    return f"{value:,.{min(max(decimals, 0), 3)}f}"


def select_cells(options: argparse.Namespace) -> list[Cell]:
    """All the cells asked for; unless told otherwise, bf16 only where it says something new."""
    dtypes = options.dtypes or list(DTYPES)
    cells = (Cell(*names) for names in product(options.workloads, dtypes, options.optimizers))
    if options.full or options.dtypes:
        return list(cells)
    return [
        cell
        for cell in cells
        if cell.dtype == "fp32" or cell.optimizer in DEFAULT_BF16.get(cell.workload, ())
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    names = list(optimizers.NAMES)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--optimizers", nargs="+", type=str.lower, choices=names, default=names)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: fp32, some bf16")
    parser.add_argument("--grads", choices=("fresh", "kept"), default="fresh")
    parser.add_argument("--budget", type=float, help="seconds per cell; default 1, full 6")
    parser.add_argument("--full", action="store_true", help="every dtype, larger budget")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("bench/out"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run the benchmark and return the files it wrote."""
    options = parse(argv)
    device = pick_device(options.device)
    torch.set_num_threads(options.threads)
    facts = report.environment(device)
    budget = options.budget or (6.0 if options.full else 1.0)
    report.console.print(f"step() on {report.headline(facts)}, {options.grads} gradients")
    results = list(run(select_cells(options), budget, options.grads, device))
    setup = {"grads": options.grads, "budget_seconds": budget}
    return [
        report.write_json(options.out / "step.json", facts, **setup, results=results),
        *step_plots.draw(results, report.headline(facts), options.out),
    ]


if __name__ == "__main__":
    main()
