"""Times `step()` for every way of storing bfloat16 parameters and their state, and counts bytes.

All contenders share parameters and gradients and take turns, as in bench.step. Bytes moved and held
are counted from the tensors themselves: gradients are read, all else is read and written. The floor
is a loop over as many bytes in as many arrays. Peers take part where they are installed.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusedopt
from bench import optimizers, peers, report
from bench.step import (
    ARGUMENTS,
    Contender,
    Model,
    copy_floor,
    medians_of,
    stream,
    take_turns,
)
from bench.timing import OtherWork, pick_device
from bench.workloads import WORKLOADS

VARIANTS: dict[str, dict[str, Any]] = {
    "bf16 state": {},
    "fp32 state": {"state_dtype": torch.float32},
    "8-bit state": {"state_dtype": "8bit"},
    "split, fp32 state": {"master_weights": "split", "state_dtype": torch.float32},
    "split, bf16 state": {"master_weights": "split"},
    "split, 8-bit state": {"master_weights": "split", "state_dtype": "8bit"},
    "whole master, fp32 state": {"master_weights": "fp32", "state_dtype": torch.float32},
    "stochastic, 8-bit state": {"rounding": "stochastic", "state_dtype": "8bit"},
    "split, fp32 state, ema": {
        "master_weights": "split",
        "state_dtype": torch.float32,
        "ema": 0.999,
    },
}


def tensors_of(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    """Everything that a step writes, but step counts."""
    inner = [_parts(value) for param in params for value in optimizer.state[param].values()]
    return [*params, *(part for parts in inner for part in parts if part.ndim)]


def _parts(value: Any) -> list[Tensor]:
    """The memory behind a state tensor; subclasses of torchao's have several parts."""
    if not isinstance(value, Tensor):
        return []
    if hasattr(value, "__tensor_flatten__"):
        return [
            part for name in value.__tensor_flatten__()[0] for part in _parts(getattr(value, name))
        ]
    return [value]


def floor(moved: int, written: int, device: torch.device) -> Contender | None:
    """A loop over `moved` bytes in one array that is read and `written` that are read and written;
    on a GPU a copy in the time of as many bytes."""
    if device.type == "cuda":
        return copy_floor(device, moved)
    if (native := fusedopt.backend.native) is None:
        return None
    size = moved // (1 + 2 * written) // 4
    grad, *arrays = (stream(at, size, torch.float32) for at in range(1 + written))
    return Contender("floor", partial(native.memory_floor, [grad], arrays, torch.get_num_threads()))


def measure(
    model: Model, name: str, build: Callable[[list[nn.Parameter]], Any], options: argparse.Namespace
) -> dict[str, Any]:
    gc.collect()
    optimizer = build(model.params)
    for _ in range(2):
        model.backward()
        optimizer.step()
    written = tensors_of(optimizer, model.params)
    grads = sum(param.grad.nbytes for param in model.params)
    moved = grads + 2 * sum(tensor.nbytes for tensor in written)
    streams = round(len(written) / len(model.params))
    contenders = [Contender("step", optimizer.step)]
    if bound := floor(moved, min(streams, 4), model.device):
        contenders.append(bound)
    others = OtherWork()
    take_turns(contenders, model, options.budget)
    medians = medians_of(contenders, "device") or medians_of(contenders, "total")
    return {
        "variant": name,
        "bytes_moved": moved / model.numel,
        "bytes_held": (moved + grads) / 2 / model.numel,
        "median_ms": medians,
        "gb_per_second": moved / medians["step"] / 1e6,
        "fraction_of_floor": medians["floor"] / medians["step"] if "floor" in medians else None,
        **others.seen(model.device),
    }


def builders(name: str, options: argparse.Namespace) -> dict[str, Callable[..., Any]]:
    """What builds each contender for optimizer `name`."""
    class_name, arguments = optimizers.NAMES[name], ARGUMENTS.get(name, {})
    mode, flags = optimizers.best_stock_mode(class_name)
    stock = partial(optimizers.stock(class_name), **arguments, **flags)
    ours = partial(getattr(fusedopt, class_name), **arguments)
    result: dict[str, Callable[..., Any]] = {f"torch {mode}, bf16 state": stock}
    result |= {label: partial(ours, **variant) for label, variant in VARIANTS.items()}
    if name == "adamw" and options.peers:
        result |= peers.installed()
    return result


def run(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """All results so far, after each; after `options.seconds` no further begins."""
    deadline = time.perf_counter() + options.seconds
    results: list[dict[str, Any]] = []
    with report.progress_bar() as progress:
        for workload in options.workloads:
            model = Model(workload, torch.bfloat16, options.device)
            for name in options.optimizers:
                table = report.table(
                    f"{workload}, {name}, bfloat16 parameters",
                    *("", "bytes\nheld", "bytes\nmoved", "ms per\nstep", "GB/s", "of\nfloor"),
                )
                built = builders(name, options)
                task = progress.add_task(f"{workload} {name}", total=len(built))
                for label, build in built.items():
                    if time.perf_counter() > deadline:
                        break
                    result = measure(model, label, build, options)
                    results.append({"workload": workload, "optimizer": name, **result})
                    table.add_row(*row(result))
                    progress.advance(task)
                    yield results
                table.caption = report.busy_note(results)
                report.console.print(table)


def row(result: dict[str, Any]) -> list[str]:
    fraction = result["fraction_of_floor"]
    return [
        result["variant"],
        f"{result['bytes_held']:.2f}",
        f"{result['bytes_moved']:.2f}",
        f"{'?' if result['busy'] else ''}{result['median_ms']['step']:.3g}",
        f"{result['gb_per_second']:.3g}",
        f"{fraction:.0%}" if fraction else "-",
    ]


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run the benchmark and return the files it wrote."""
    parser = argparse.ArgumentParser(prog="python -m bench.storage", description=__doc__)
    names = list(optimizers.NAMES)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["gpt2_124m"])
    parser.add_argument("--optimizers", nargs="+", type=str.lower, choices=names, default=["adamw"])
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for each line")
    parser.add_argument("--seconds", type=float, default=math.inf, help="then no line begins")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("bench/out"))
    options = parser.parse_args(argv)
    options.device = pick_device(options.device)
    torch.set_num_threads(options.threads)
    facts = report.environment(options.device)
    report.console.print(f"Storage on {report.headline(facts)}, fresh gradients")
    path = options.out / "storage.json"
    for results in run(options):  # written each time: a run that is cut short keeps what it has
        report.write_json(path, facts, results=results)
    return [path]


if __name__ == "__main__":
    main()
