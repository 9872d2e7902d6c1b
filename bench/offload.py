"""Times the optimizer on the host (`fusedopt.offload`), and on a GPU the training with it.

What the host computes for each way of storing bfloat16 parameters, in nanoseconds per parameter,
beside torch's fused AdamW on float32 masters with casts to and from bfloat16, and DeepSpeed's
CPUAdam with the same where it is installed; all take turns. Then what a chunk costs beside its
arithmetic. Then a GPT is trained without offload and with each `overlap`: are the bits the same,
how much memory is used at most, and how long does an iteration take? On a GPU also how fast copies
are. Without one, parameters stay on the host: the numbers of the training say nothing then.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import fusedopt
from bench import peers, report
from bench.attached import peak_bytes
from bench.storage import VARIANTS
from bench.timing import OtherWork, elapsed_ms, pick_device
from bench.train_gpt import GPT, HYPERPARAMETERS, Corpus, Size

STORED = ("bf16 state", "split, fp32 state", "split, bf16 state", "split, 8-bit state")
# As they are called in the table, with the arguments of offload(); None trains without it.
WAYS: dict[str, dict[str, Any] | None] = {
    "not offloaded": None,
    "in step()": {"overlap": None},
    "in the backward": {"overlap": "backward"},
    "across the forward": {"overlap": "forward"},
    "across the forward, clipped": {"overlap": "forward", "max_grad_norm": 1.0},
}
STORAGE = {"master_weights": "split", "state_dtype": torch.float32}
CPU = torch.device("cpu")


# The step of the host -----------------------------------------------------------------------------


def bfloat16_params(numel: int, count: int) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(numel // count).bfloat16()) for _ in range(count)]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def with_casts(params: list[nn.Parameter], build: Callable[..., Any]) -> Callable[[], None]:
    """An optimizer of float32 masters, whose gradients come and whose values go in bfloat16."""
    masters = [nn.Parameter(param.detach().float()) for param in params]
    for master in masters:
        master.grad = torch.empty_like(master)
    optimizer = build(masters)
    grads = [param.grad for param in params]

    def step() -> None:
        torch._foreach_copy_([master.grad for master in masters], grads)
        optimizer.step()
        torch._foreach_copy_([param.data for param in params], [m.data for m in masters])

    return step


def host_steps(options: argparse.Namespace) -> dict[str, float]:
    """Nanoseconds per parameter."""
    hyperparameters = HYPERPARAMETERS["adamw"]

    def params() -> list[nn.Parameter]:
        return bfloat16_params(options.numel, options.tensors)

    steps = {
        f"fusedopt, {name}": fusedopt.AdamW(params(), **hyperparameters, **VARIANTS[name]).step
        for name in STORED
    }
    builders = {
        "torch fused, float32, casts": lambda masters: torch.optim.AdamW(
            masters, fused=True, **hyperparameters
        )
    }
    if find_spec("deepspeed"):
        builders["DeepSpeed CPUAdam, float32, casts"] = lambda masters: peers.deepspeed_cpu(
            masters, **hyperparameters
        )
    steps |= {name: with_casts(params(), build) for name, build in builders.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for at in range(options.rounds + 2):
        for name, step in steps.items():
            elapsed = elapsed_ms(step, CPU)
            if at >= 2:
                times[name].append(elapsed)
    return {n: statistics.median(each) / options.numel * 1e6 for n, each in times.items()}


def cost_of_chunks(options: argparse.Namespace) -> dict[str, float]:
    """Microseconds that `step()` takes for each chunk of one small parameter: two copies and two
    changes of thread are in it."""
    count = 256
    times: dict[str, list[float]] = {"offloaded": [], "ordinary": []}
    with_chunks = bfloat16_params(64 * count, count)
    ordinary = bfloat16_params(64 * count, count)
    arguments = {**HYPERPARAMETERS["adamw"], **STORAGE}
    steps = {
        "offloaded": fusedopt.offload(
            with_chunks,
            fusedopt.AdamW,
            device="cpu",
            keep_below=0,
            chunk=1,
            gradients="device",
            **arguments,
        ).step,
        "ordinary": fusedopt.AdamW(ordinary, **arguments).step,
    }
    for _ in range(options.rounds + 2):
        for name, step in steps.items():
            times[name].append(elapsed_ms(step, CPU))
    median = {name: statistics.median(each[2:]) for name, each in times.items()}
    return {
        "us_per_chunk": median["offloaded"] / count * 1e3,
        "of_this_arithmetic_us": median["ordinary"] / count * 1e3,
    }


# Copies -------------------------------------------------------------------------------------------


def copy_rates(device: torch.device) -> dict[str, float]:
    """GB/s each way, between pinned memory and the device."""
    size = 2**28
    there = torch.empty(size, dtype=torch.uint8, device=device)
    here = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    rates = {}
    for name, target, source in (("to the device", there, here), ("to the host", here, there)):
        times = [
            elapsed_ms(lambda t=target, s=source: t.copy_(s, non_blocking=True), device)
            for _ in range(12)
        ]
        rates[name] = size / statistics.median(times[2:]) / 1e6
    return rates


# Training -----------------------------------------------------------------------------------------


def train(way: str, size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """In this process: the time of an iteration, the peak, and what the parameters are in the end.

    The first quarter of the iterations is not timed. Nothing waits for the device within the rest.
    """
    device = pick_device(options.device)
    torch.manual_seed(options.seed)
    corpus = Corpus(device)
    batches = [*Corpus.batches(corpus.train, options.steps, size, options.seed)]
    with device:
        model = GPT(size, corpus.vocabulary).bfloat16()
    arguments, settings = {**HYPERPARAMETERS["adamw"], **STORAGE}, WAYS[way]
    optimizer: Any
    if settings is None:
        optimizer = fusedopt.AdamW(model.parameters(), **arguments)
    else:
        stand_in = {"device": "cpu"} if device.type == "cpu" else {}
        optimizer = fusedopt.offload(model, fusedopt.AdamW, **settings, **stand_in, **arguments)
    losses: list[Tensor] = []
    others = OtherWork()

    def iterate(some: list[tuple[Tensor, Tensor]]) -> None:
        for batch in some:
            optimizer.zero_grad()
            loss = model(*batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        optimizer.synchronize()

    warm_up = len(batches) // 4
    iterate(batches[:warm_up])
    elapsed = elapsed_ms(lambda: iterate(batches[warm_up:]), device)
    return {
        "parameters": sum(param.numel() for param in model.parameters()),
        "step_ms": elapsed / len(batches[warm_up:]),
        "peak_bytes": active_bytes(device),
        "bits": [digest(param) for param in model.parameters()],
        "finite": bool(torch.stack(losses).isfinite().all()),
        **others.seen(device),
    }


def active_bytes(device: torch.device) -> int:
    """At most; on a GPU what is still being copied counts."""
    if device.type == "cuda":
        return int(torch.cuda.memory_stats(device)["active_bytes.all.peak"])
    return peak_bytes(device)


def digest(param: Tensor) -> int:
    """Of the bits of a parameter in bfloat16, computed where it is."""
    bits = param.detach().reshape(-1).view(torch.int16).long()
    return int((bits * torch.arange(1, 2 * bits.numel(), 2, device=bits.device)).sum())


def trainings(
    size: Size, options: argparse.Namespace, deadline: float, results: dict[str, Any]
) -> Iterator[str]:
    """Each in a process of its own, since none gives back its peak; none begins too late."""
    context = multiprocessing.get_context("spawn")
    with report.progress_bar() as progress, context.Pool(1, maxtasksperchild=1) as pool:
        task = progress.add_task("", total=len(options.ways))
        for way in options.ways:
            if time.perf_counter() > deadline:
                break
            progress.update(task, description=way)
            results[way] = pool.apply(train, (way, size, options))
            progress.advance(task)
            yield way


def tabulate(results: dict[str, dict[str, Any]]) -> Table:
    table = report.table("Training", "", "peak MB", "ms", "against none", "same bits")
    first = next(iter(results.values()))
    for way, result in results.items():
        table.add_row(
            way,
            f"{result['peak_bytes'] / 1e6:,.0f}",
            ("?" if result["busy"] else "") + f"{result['step_ms']:.1f}",
            f"{result['step_ms'] / first['step_ms']:.2f}x",
            same_bits(result, first) if "clipped" not in way else "",
        )
    table.caption = f"{first['parameters']:,} parameters in bfloat16, split masters, float32 state"
    if note := report.busy_note(results.values()):
        table.caption += f"\n{note}"
    return table


def same_bits(result: dict[str, Any], other: dict[str, Any]) -> str:
    if not (result["finite"] and other["finite"]):
        return "not finite"
    return "yes" if result["bits"] == other["bits"] else "NO"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.offload", description=__doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=("host", "training"), default=["host", "training"]
    )
    parser.add_argument("--numel", type=int, default=2**26, help="of what the host steps")
    parser.add_argument("--tensors", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--layers", type=int, help="30 (0.6 billion parameters); on a CPU 4")
    parser.add_argument("--width", type=int, help="1280, on a CPU 256; a multiple of 64")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, help="32, on a CPU 2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=math.inf, help="then no training begins")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench/out"))
    options = parser.parse_args(argv)
    is_gpu = pick_device(options.device).type == "cuda"
    defaults = {"layers": (30, 4), "width": (1280, 256), "batch": (32, 2)}
    for name, (on_gpu, on_cpu) in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, on_gpu if is_gpu else on_cpu)
    return options


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run the benchmark and return the files it wrote."""
    options = parse(argv)
    deadline = time.perf_counter() + options.seconds
    torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    facts = report.environment(device)
    report.console.print(f"The optimizer on the host, on {report.headline(facts)}")
    results: dict[str, Any] = {}
    setup = {name: getattr(options, name) for name in ("numel", "tensors", "threads", "steps")}

    def write() -> Path:
        return report.write_json(options.out / "offload.json", facts, **setup, **results)

    if "host" in options.parts:
        others = OtherWork()
        steps = host_steps(options)
        gc.collect()
        chunks = cost_of_chunks(options)
        table = report.table("AdamW on the host", "", "ns per parameter", "of torch's")
        for name, nanoseconds in steps.items():
            ratio = nanoseconds / steps["torch fused, float32, casts"]
            table.add_row(name, f"{nanoseconds:.2f}", f"{ratio:.2f}")
        seen = others.seen(CPU)
        table.caption = report.busy_note([seen]) or None
        report.console.print(table)
        report.console.print(
            f"A chunk of one small parameter takes {chunks['us_per_chunk']:.0f} us, of which "
            f"{chunks['of_this_arithmetic_us']:.1f} are the ordinary step."
        )
        results |= {"ns_per_parameter": steps, "chunks": chunks, "host": seen}
    if device.type == "cuda":
        results["copies_gb_per_second"] = rates = copy_rates(device)
        report.console.print("Copies: " + ", ".join(f"{n} {r:.1f} GB/s" for n, r in rates.items()))
    if "training" in options.parts:
        size = Size(
            options.layers, options.width, options.width // 64, options.context, options.batch
        )
        write()  # what there is, should the time not suffice
        for _ in trainings(size, options, deadline, results.setdefault("training", {})):
            write()
        if results["training"]:
            report.console.print(tabulate(results["training"]))
    return [write()]


if __name__ == "__main__":
    main()
