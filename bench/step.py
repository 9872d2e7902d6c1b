"""Times `step()` of fusedopt, of every implementation in torch.optim, and of a bare memory loop.

All contenders of a cell (workload, dtype, optimizer) share the parameters and take turns, so that
the noise of the machine hits all alike. Before every step a backward makes new gradients: what a
step costs with warm gradients at last step's addresses is not what it costs in training. A training
has one optimizer: a turn of quick steps is a few in a row, and the first, whose state others have
pushed out of the cache, is not timed.

On a GPU there are three times. `median_ms` is the wall's: from an idle GPU until it has finished.
`host_ms` ends when step() returns. `device_ms` is the GPU's own, with all launches in its queue:
the cost of a step in a training whose host runs ahead; the share of the memory floor is of this.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from functools import cache, partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import fusedopt
from bench import optimizers, report, step_plots
from bench.timing import OtherWork, device_ms, pick_device, wall_and_host_ms
from bench.workloads import FOR_A_GPU, LARGE, OWN_GROUPS, REPORTED, WORKLOADS, shapes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What a first look should show, in this order. On a CPU: the gain where the host's work decides,
# where the cache does, and where memory does and float32 cannot gain. On a GPU: memory, then the
# host; small_10k has few, for its backward, which is not timed, takes longer than a step.
COMMON = ("adam", "sgd", "rmsprop")
BRIEF = {
    "cpu": {
        ("many_small", "fp32"): optimizers.WIDELY_USED,
        ("mlp_100x10k", "fp32"): COMMON,
        ("mlp_100x10k", "bf16"): ("adam",),
        ("resnet50", "fp32"): ("adam", "sgd"),
        ("resnet50", "bf16"): ("adam",),
        ("gpt2_124m", "bf16"): ("adam",),
    },
    "cuda": {
        ("gpt2_124m", "fp32"): COMMON,
        ("gpt2_124m", "bf16"): COMMON,
        ("resnet50", "fp32"): COMMON,
        ("resnet50", "bf16"): ("adam",),
        ("groups_465", "fp32"): ("adam", "sgd"),
        ("small_10k", "fp32"): ("adam", "sgd"),
        ("lora_2048", "fp32"): ("adamw",),
        ("lora_2048", "bf16"): ("adamw",),
        ("many_small", "fp32"): COMMON,
        ("one_large", "fp32"): ("adam",),
        ("llama_1b", "bf16"): ("adamw",),
    },
}
DEFAULT_BF16 = {
    "cpu": {"mlp_100x10k": optimizers.WIDELY_USED, "gpt2_124m": ("adam",)},
    "cuda": dict.fromkeys(LARGE, optimizers.WIDELY_USED),
}
ARGUMENTS = {"sgd": {"momentum": 0.9}}
STOCK_MODES = ("forloop", "foreach", "fused")
MODES = (*STOCK_MODES, "fusedopt", "floor")
MAX_GRAD_NORM = 1.0

MINIMUM_ROUNDS = 5
SLOW_MS = 50.0
SLOW_RATIO = 3.0
SLOW_STRIDE = 2  # a slow contender steps in every other round
QUICK_MS = 5.0
QUICK_STEPS = 3  # timed, of a turn

COPY_BYTES = 2**30  # far beyond any cache, and small beside the states of a large model
HEAD_START = 1.5  # of the time that the host took for the last step
HEAD_START_MS = 0.2

GPU_NOTE = "GPU only: speed-up without the time to launch; GB/s and floor likewise"
BF16_SGD_NOTE = "† torch until 2.13 computes bf16 fused SGD wrongly on the CPU (pytorch #191763)"


@dataclass(frozen=True)
class Cell:
    """One line of a table."""

    workload: str
    dtype: str
    optimizer: str


class Model:
    """The parameters that all optimizers of one workload and dtype share."""

    def __init__(
        self, workload: str, dtype: torch.dtype, device: torch.device, keep_grads: bool = False
    ):
        def tensors(fill: Callable[[Tensor], Tensor]) -> list[Tensor]:
            empty = partial(torch.empty, dtype=dtype, device=device)
            return [fill(empty(shape)) for shape in shapes(workload)]

        self.device = device
        self.has_own_groups = workload in OWN_GROUPS
        self.params = [nn.Parameter(tensor) for tensor in tensors(torch.zero_)]
        self.grads = tensors(lambda tensor: tensor.uniform_(-0.01, 0.01))
        self.keep_grads = keep_grads
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
    def groups(self) -> list[nn.Parameter] | list[dict[str, Any]]:
        """What an optimizer is made from."""
        return [{"params": [p]} for p in self.params] if self.has_own_groups else self.params

    @property
    def numel(self) -> int:
        return sum(param.numel() for param in self.params)

    def bytes_per_step(self, states: int, clip: bool) -> int:
        """Gradients are read; parameters and `states` tensors like them are read and written.

        Clipping has to read the gradients twice: there is no coefficient before the norm.
        """
        return self.numel * self.params[0].itemsize * (1 + clip + 2 * (1 + states))

    def floor(self, states: int, clip: bool) -> Contender | None:
        """A loop over as many bytes as a step has to move, without the optimizer.

        On a GPU it is the rate of a copy of fixed size, in the time that this many bytes take.
        """
        if self.device.type == "cuda":
            return copy_floor(self.device, self.bytes_per_step(states, clip))
        if (native := fusedopt.backend.native) is None or clip:
            return None
        while len(self.scratch) < 2 + states:
            self.scratch.append(stream(len(self.scratch), self.numel, self.params[0].dtype))
        grad, *written = self.scratch[: 2 + states]
        loop = partial(native.memory_floor, [grad], written, torch.get_num_threads())
        return Contender("floor", loop)


def stream(at: int, numel: int, dtype: torch.dtype) -> Tensor:
    """The ``at``-th array of the floor. Each begins at another place in its page: four of 128 MiB
    that begin at the same are read and written several times slower (AMD EPYC, 2026-11)."""
    skipped = at * 17 * 64 // dtype.itemsize  # neighbours are 17 cache lines apart
    # Not zeros: pages that nobody has written yet are all one page of zeros, in the cache.
    return torch.ones(skipped + numel, dtype=dtype)[skipped:]


def copy_floor(device: torch.device, moved: int) -> Contender:
    """A copy in the time of so many bytes. It is beyond any cache: no backward changes its time."""
    scale = moved / (2 * COPY_BYTES)
    return Contender("floor", copy_on(device), scale, takes_gradients=False)


@cache
def copy_on(device: torch.device) -> Callable[[], object]:
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source)


@dataclass
class Contender:
    """What takes its turn, and the milliseconds of every turn, times `scale`."""

    name: str
    work: Callable[[], object]
    scale: float = 1.0
    takes_gradients: bool = True
    wall: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)

    @property
    def total(self) -> list[float]:
        """The samples behind `median_ms`; scaling fits only the time of the copy itself."""
        return self.device if self.device and self.name == "floor" else self.wall

    def take_turn(self, model: Model) -> None:
        quick = bool(self.wall) and min(self.wall) < QUICK_MS
        if quick:
            self.make_gradients(model)
            self.work()
        for _ in range(QUICK_STEPS if quick else 1):
            self.time_step(model)

    def make_gradients(self, model: Model) -> None:
        if self.takes_gradients:
            model.backward()

    def time_step(self, model: Model) -> None:
        self.make_gradients(model)
        wall, host = wall_and_host_ms(self.work, model.device)
        self.wall.append(wall * self.scale)
        self.host.append(host * self.scale)
        if model.device.type == "cuda":
            self.make_gradients(model)
            head_start = HEAD_START_MS + HEAD_START * host
            self.device.append(device_ms(self.work, model.device, head_start) * self.scale)


def build_optimizers(
    model: Model, name: str, modes: Sequence[str], clip: bool
) -> dict[str, torch.optim.Optimizer]:
    class_name, arguments = optimizers.NAMES[name], ARGUMENTS.get(name, {})
    clipping = {"max_grad_norm": MAX_GRAD_NORM} if clip else {}
    ours, stock = getattr(fusedopt, class_name), optimizers.stock(class_name)
    built = {"fusedopt": ours(model.groups, **arguments, **clipping)}
    for mode, flags in optimizers.stock_modes(class_name).items():
        if mode in modes and optimizers.runs(class_name, mode, model.device):
            built[mode] = stock(model.groups, **arguments, **flags)
    return built


def clip_and_step(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
    optimizer.step()


def states_per_parameter(optimizer: torch.optim.Optimizer) -> int:
    param = optimizer.param_groups[0]["params"][0]
    return sum(value.shape == param.shape for value in optimizer.state[param].values())


def measure(model: Model, cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    gc.collect()  # an optimizer in a cycle of references would still hold its state
    built = build_optimizers(model, cell.optimizer, options.modes, options.clip)
    contenders = []
    for mode, optimizer in built.items():
        ours = mode == "fusedopt"
        clips = options.clip and not ours
        work = partial(clip_and_step, model.params, optimizer) if clips else optimizer.step
        contenders.append(Contender(mode, work))
    memory = {contender.name: warm_up(contender, model) for contender in contenders}
    states = states_per_parameter(built["fusedopt"])
    if floor := model.floor(states, options.clip):
        contenders.append(floor)
    others = OtherWork()
    take_turns(contenders, model, options.budget)
    seen = others.seen(model.device)
    moved = model.bytes_per_step(states, options.clip)
    return summarize(cell, contenders, model, moved) | gpu_summary(contenders, memory) | seen


def warm_up(contender: Contender, model: Model) -> int | None:
    """Take the first step, which makes the state, and see what memory the second needs besides."""
    for _ in range(2):
        model.backward()
        if cuda := model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
            before = torch.cuda.memory_allocated(model.device)
        contender.work()
    return torch.cuda.max_memory_allocated(model.device) - before if cuda else None


def take_turns(contenders: list[Contender], model: Model, budget: float) -> None:
    """A turn of each per round, from another first one every round, for `budget` seconds."""
    deadline = time.perf_counter() + budget
    number = 0
    while number < MINIMUM_ROUNDS or time.perf_counter() < deadline:
        first = number % len(contenders)
        slow = slow_ones(contenders) if number % SLOW_STRIDE else ()
        for contender in contenders[first:] + contenders[:first]:
            if contender.name not in slow:
                contender.take_turn(model)
        number += 1


def slow_ones(contenders: list[Contender]) -> set[str]:
    """Who takes so long that a sample of each round would starve the others."""
    medians = medians_of(contenders, "total")
    limit = max(SLOW_MS, SLOW_RATIO * min(medians.values()))
    return {name for name, median in medians.items() if median > limit}


def summarize(cell: Cell, contenders: list[Contender], model: Model, moved: int) -> dict[str, Any]:
    """The figures of a cell: the fastest of torch is the one with the shortest wall time, and the
    memory floor is compared with what keeps the memory busy, on a GPU the device time."""
    medians = medians_of(contenders, "total")
    busy = medians_of(contenders, "device") or medians
    floor = medians.get("floor")
    stock = {name: ms for name, ms in medians.items() if name in STOCK_MODES}
    best = min(stock, key=stock.__getitem__)
    return {
        "workload": cell.workload,
        "dtype": cell.dtype,
        "optimizer": cell.optimizer,
        "tensors": len(model.params),
        "parameters": model.numel,
        "bytes_per_step": moved,
        "median_ms": medians,
        "rounds": {contender.name: len(contender.wall) for contender in contenders},
        "best_stock_mode": best,
        "speedup": stock[best] / medians["fusedopt"],
        "us_per_tensor": 1e3 * medians["fusedopt"] / len(model.params),
        "gb_per_second": moved / busy["fusedopt"] / 1e6,
        "fraction_of_floor": floor and floor / busy["fusedopt"],
        "stock_fraction_of_floor": floor and floor / min(busy[mode] for mode in stock),
    }


def medians_of(contenders: list[Contender], clock: str) -> dict[str, float]:
    samples = {contender.name: getattr(contender, clock) for contender in contenders}
    return {name: statistics.median(ms) for name, ms in samples.items() if ms}


def gpu_summary(contenders: list[Contender], memory: dict[str, int | None]) -> dict[str, Any]:
    """What only a GPU has: the other two clocks, the rate of the copy, memory used by a step."""
    device, host = medians_of(contenders, "device"), medians_of(contenders, "host")
    if not device:
        return {}
    copy = next(contender for contender in contenders if contender.name == "floor")
    del host["floor"]
    stock = [ms for name, ms in device.items() if name in STOCK_MODES]
    return {
        "device_ms": device,
        "fastest_device_ms": {contender.name: min(contender.device) for contender in contenders},
        "device_speedup": min(stock) / device["fusedopt"],
        "host_ms": host,
        "copy_gb_per_second": 2 * COPY_BYTES / (device["floor"] / copy.scale) / 1e6,
        "temporary_bytes": memory,
    }


def run(cells: list[Cell], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The result of one cell after the other; those of one workload and dtype share a model.

    After `options.seconds` no further cell begins.
    """
    deadline = time.perf_counter() + options.seconds
    with report.progress_bar() as progress:
        task = progress.add_task("", total=len(cells))
        for workload, of_workload in groupby(cells, key=lambda cell: cell.workload):
            results = []
            for dtype, of_dtype in groupby(of_workload, key=lambda cell: cell.dtype):
                if time.perf_counter() > deadline:
                    break
                model = Model(workload, DTYPES[dtype], options.device, options.grads == "kept")
                for cell in of_dtype:
                    if time.perf_counter() > deadline:
                        break
                    progress.update(task, description=f"{workload} {dtype} {cell.optimizer}")
                    results.append(measure(model, cell, options))
                    progress.advance(task)
                    yield results[-1]
                del model  # two of them would not fit beside each other
                if options.device.type == "cuda":
                    torch.cuda.empty_cache()  # what is cached fits the next model badly
            if results:
                report.console.print(tabulate(results))


def tabulate(results: list[dict[str, Any]]) -> Table:
    first = results[0]
    size = f"{first['parameters']:,} parameters in {first['tensors']:,} tensors"
    modes = [mode for mode in MODES if any(mode in result["median_ms"] for result in results)]
    gpu = ["µs per\ntensor"]
    if "device_ms" in first:
        modes.remove("floor")  # for the width of the table
        gpu = ["host µs\na tensor", "GPU\nonly"]
    columns = ["ms per step", *modes, "speed-\nup", *gpu, "GB/s", "of\nfloor"]
    table = report.table(f"{first['workload']}: {size}", *columns)
    for result in results:
        table.add_row(*row(result, modes))
    notes = {
        GPU_NOTE: "device_ms" in first,
        BF16_SGD_NOTE: any(map(wrong_in_stock, results)),
        report.busy_note(results): True,
        f"torch fused was reported to take {REPORTED.get(first['workload'])}": (
            first["workload"] in REPORTED and "device_ms" in first
        ),
    }
    table.caption = "\n".join(note for note, applies in notes.items() if applies and note)
    return table


def row(result: dict[str, Any], modes: list[str]) -> list[str]:
    medians = {name: significant(ms) for name, ms in result["median_ms"].items()}
    if wrong_in_stock(result):
        medians["fused"] += "†"
    fraction = result["fraction_of_floor"]
    gpu = [significant(result["us_per_tensor"])]
    if "device_ms" in result:
        host = 1e3 * result["host_ms"]["fusedopt"] / result["tensors"]
        gpu = [significant(host), f"{significant(result['device_speedup'])}x"]
    return [
        f"{result['optimizer']} {result['dtype']}",
        *(medians.get(mode, "-") for mode in modes),
        f"{'?' if result['busy'] else ''}{significant(result['speedup'])}x",
        *gpu,
        significant(result["gb_per_second"]),
        f"{fraction:.0%}" if fraction else "-",
    ]


def wrong_in_stock(result: dict[str, Any]) -> bool:
    on_cpu = "device_ms" not in result
    wrong = on_cpu and (result["optimizer"], result["dtype"]) == ("sgd", "bf16")
    return wrong and "fused" in result["median_ms"]


def significant(value: float) -> str:
    """Three significant digits, but no more than three decimals."""
    decimals = 2 - math.floor(math.log10(value))
    return f"{value:,.{min(max(decimals, 0), 3)}f}"


def select_cells(options: argparse.Namespace) -> list[Cell]:
    """All the cells asked for; unless told otherwise, bf16 only where it says something new."""
    dtypes = options.dtypes or list(DTYPES)
    names = options.optimizers or list(optimizers.NAMES)
    cells = [Cell(*names) for names in product(options.workloads, dtypes, names)]
    if options.brief:
        chosen = BRIEF[options.device.type].items()
        brief = [Cell(*key, name) for key, names in chosen for name in names]
        return [cell for cell in brief if cell in cells]
    if not (options.full or options.optimizers):
        common = optimizers.WIDELY_USED
        cells = [c for c in cells if c.workload == "many_small" or c.optimizer in common]
    if options.full or options.dtypes:
        return cells
    bf16 = DEFAULT_BF16[options.device.type]
    return [
        cell
        for cell in cells
        if cell.dtype == "fp32" or cell.optimizer in bf16.get(cell.workload, ())
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    names = list(optimizers.NAMES)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, help="default: all that fit")
    parser.add_argument(
        "--optimizers",
        nargs="+",
        type=str.lower,
        choices=names,
        help="default: all, but only widely used ones for more than many_small",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: fp32, some bf16")
    parser.add_argument("--modes", nargs="+", choices=STOCK_MODES, default=STOCK_MODES)
    parser.add_argument("--clip", action="store_true", help="and clip the norm of the gradients")
    parser.add_argument("--grads", choices=("fresh", "kept"), default="fresh")
    parser.add_argument("--budget", type=float, help="seconds per cell; default 1, full 6")
    parser.add_argument("--seconds", type=float, default=math.inf, help="then no cell begins")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--brief", action="store_true", help="the few cells that tell most")
    amount.add_argument("--full", action="store_true", help="every dtype, larger budget")
    parser.add_argument("--no-plots", dest="plots", action="store_false", help="only the JSON file")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("bench/out"))
    options = parser.parse_args(argv)
    options.device = pick_device(options.device)
    options.budget = options.budget or (6.0 if options.full else 1.0)
    skipped = FOR_A_GPU if options.device.type == "cpu" else ()
    options.workloads = options.workloads or [name for name in WORKLOADS if name not in skipped]
    if not {"foreach", "forloop"} & set(options.modes):
        parser.error("--modes: not every optimizer of torch has a fused mode, name another too")
    return options


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run the benchmark and return the files it wrote."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    facts = report.environment(options.device)
    title = f"step(){' with clipping' if options.clip else ''} on {report.headline(facts)}"
    report.console.print(f"{title}, {options.grads} gradients")
    setup = {"grads": options.grads, "clip": options.clip, "budget_seconds": options.budget}
    path = options.out / ("step_clip.json" if options.clip else "step.json")
    results: list[dict[str, Any]] = []
    cells = select_cells(options)
    report.write_json(path, facts, **setup, results=results)
    for result in run(cells, options):
        results.append(result)  # written each time: a run that is cut short keeps what it has
        report.write_json(path, facts, **setup, results=results)
    if left := [" ".join(astuple(cell)) for cell in cells[len(results) :]]:
        report.console.print(f"Left out after {options.seconds:.0f} seconds: {', '.join(left)}")
    return [path, *(step_plots.draw(results, title, path) if options.plots else ())]


if __name__ == "__main__":
    main()
