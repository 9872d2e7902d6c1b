"""What a step costs the host per tensor: where tensors are small this is all of it, and on a GPU it
is what the launch waits for.

    python -m bench.host_cost --cases adam groups

Instructions are counted by callgrind where valgrind is installed: unlike times they hardly depend
on the machine and on what else it does. Times are medians of contenders that take turns.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import fusedopt
from bench import report
from bench.timing import elapsed_ms

NUM_TENSORS, NUMEL, NUM_GROUPS = 1_000, 64, 465
WARM_UP, COUNTED = 5, 1  # steps


class Contender(NamedTuple):
    step: Callable[[], Any]
    num_tensors: int
    prepare: Callable[[], Any] = lambda: None  # before each step, not counted


def tensors(count: int = NUM_TENSORS) -> list[Tensor]:
    params: list[Tensor] = [torch.nn.Parameter(torch.randn(NUMEL)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(NUMEL)
    return params


def dtensors() -> list[Tensor]:
    """Shards as FSDP2 makes them, in a process group of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    params: list[Tensor] = []
    for param in tensors():
        shards = (param.detach(), torch.randn(NUMEL))
        sharded, grad = (DTensor.from_local(shard, mesh, [Shard(0)]) for shard in shards)
        params.append(torch.nn.Parameter(sharded))
        params[-1].grad = grad
    return params


def stepping(
    cls: Any,
    params: list[Tensor],
    *,
    in_groups: bool = False,
    new_grads: bool = False,
    **options: Any,
) -> Contender:
    opt = cls([{"params": [param]} for param in params] if in_groups else params, **options)

    def make_grads() -> None:
        opt.zero_grad()
        torch.stack([param.square().sum() for param in params]).sum().backward()

    return (
        Contender(opt.step, len(params), make_grads)
        if new_grads
        else Contender(opt.step, len(params))
    )


def clipping(cls: Any, params: list[Tensor], **options: Any) -> Contender:
    """As without max_grad_norm=."""
    opt = cls(params, **options)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()

    return Contender(step, len(params))


def cases() -> dict[str, tuple[str, dict[str, Callable[[], Contender]]]]:
    """By name: what it is, and the contenders. The first one is fusedopt's."""
    ours, stock = fusedopt.Adam, torch.optim.Adam
    sgd: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9}
    return {
        "adam": (
            "Adam, gradients in place",
            {
                "": lambda: stepping(ours, tensors()),
                "torch, fused": lambda: stepping(stock, tensors(), fused=True),
            },
        ),
        "new_grads": (
            "Adam, gradients made anew",
            {
                "": lambda: stepping(ours, tensors(), new_grads=True),
                "torch, fused": lambda: stepping(stock, tensors(), new_grads=True, fused=True),
            },
        ),
        "sgd": (
            "SGD with momentum",
            {
                "": lambda: stepping(fusedopt.SGD, tensors(), **sgd),
                "torch, fused": lambda: stepping(torch.optim.SGD, tensors(), fused=True, **sgd),
            },
        ),
        "groups": (
            f"Adam, {NUM_GROUPS} groups of one",
            {
                "": lambda: stepping(ours, tensors(NUM_GROUPS), in_groups=True),
                "one group": lambda: stepping(ours, tensors(NUM_GROUPS)),
                "torch, fused": lambda: stepping(
                    stock, tensors(NUM_GROUPS), in_groups=True, fused=True
                ),
            },
        ),
        "clip": (
            "Adam, clipped",
            {
                "": lambda: stepping(ours, tensors(), max_grad_norm=1.0),
                "without": lambda: stepping(ours, tensors()),
                "torch, clip + fused": lambda: clipping(stock, tensors(), fused=True),
            },
        ),
        "dtensors": (
            "Adam, DTensors",
            {
                "": lambda: stepping(ours, dtensors()),
                "tensors": lambda: stepping(ours, tensors()),
                "torch, fused": lambda: stepping(stock, dtensors(), fused=True),
            },
        ),
        "clip_dtensors": (
            "Adam, DTensors, clipped",
            {
                "": lambda: stepping(ours, dtensors(), max_grad_norm=1.0),
                "without": lambda: stepping(ours, dtensors()),
                "torch, clip + fused": lambda: clipping(stock, dtensors(), fused=True),
            },
        ),
    }


def microseconds(contenders: Iterable[Contender], rounds: int) -> list[float]:
    """Per tensor, of each contender."""
    contenders, cpu = list(contenders), torch.device("cpu")
    times: list[list[float]] = [[] for _ in contenders]
    for round_ in range(WARM_UP + rounds):
        for contender, samples in zip(contenders, times, strict=True):
            contender.prepare()
            elapsed = elapsed_ms(contender.step, cpu)
            if round_ >= WARM_UP:
                samples.append(elapsed * 1e3 / contender.num_tensors)
    return [statistics.median(samples) for samples in times]


# Instructions -----------------------------------------------------------------------------------


def run_counted(names: Iterable[str]) -> None:
    """In the process that callgrind watches, which writes down the instructions since the last call
    of getppid() whenever there is one."""
    torch.set_num_threads(1)
    counted = []
    for name in names:
        counted.append(cases()[name][1][""]())
        for _ in range(WARM_UP):
            counted[-1].prepare()
            counted[-1].step()
    subprocess.run(["vgdb", f"--pid={os.getpid()}", "instrumentation", "on"], check=True)
    for contender in counted:
        for _ in range(COUNTED):
            contender.prepare()
            os.getppid()
            contender.step()
            os.getppid()


def instructions(names: Sequence[str], folder: Path) -> dict[str, float]:
    """Per tensor, of fusedopt's contender in each case. The profiles stay in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("callgrind.*"):
        old.unlink()
    watch = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--dump-before=getppid"]
    watch.append(f"--callgrind-out-file={folder}/callgrind.out")
    command = [sys.executable, "-m", "bench.host_cost", "--counted", "--cases", *names]
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [*watch, *command], env={**os.environ, **one_thread}, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"valgrind: {done.stderr}")
    # Of each pair the second is from before the step to after it.
    found = {}
    for at, name in enumerate(names):
        numbers = (2 * (at * COUNTED + step) + 2 for step in range(COUNTED))
        profiles = [(folder / f"callgrind.out.{number}").read_text() for number in numbers]
        totals = [int(re.search(r"^totals: (\d+)", text, re.M)[1]) for text in profiles]  # type: ignore[index]
        count = NUM_GROUPS if name == "groups" else NUM_TENSORS
        found[name] = statistics.median(totals) / count
    return found


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run all and return the files written."""
    parser = argparse.ArgumentParser(prog="python -m bench.host_cost", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=cases(), default=[*cases()])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("bench/out"))
    parser.add_argument("--profiles", type=Path, help="keep callgrind's in this folder")
    parser.add_argument("--counted", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.counted:
        run_counted(options.cases)
        return []
    counts: dict[str, float] = {}
    if shutil.which("valgrind") and shutil.which("vgdb"):
        with tempfile.TemporaryDirectory() as folder:
            counts = instructions(options.cases, options.profiles or Path(folder))
    facts = report.environment(torch.device("cpu"))
    columns = ("case", "against", "instructions", "µs", "its µs", "ratio")
    table = report.table("Host time per tensor", *columns, text_columns=2)
    results = []
    for name in options.cases:
        title, contenders = cases()[name]
        mine, *others = microseconds((make() for make in contenders.values()), options.rounds)
        for at, (other, theirs) in enumerate(zip([*contenders][1:], others, strict=True)):
            count = f"{counts[name]:,.0f}" if name in counts else ""
            first = (title, other, count, f"{mine:.2f}") if at == 0 else ("", other, "", "")
            table.add_row(*first, f"{theirs:.2f}", f"{theirs / mine:.2f}")
        times = dict(zip(contenders, (mine, *others), strict=True))
        results.append({"case": name, "instructions": counts.get(name), "us": times})
    table.caption = "Ratio: how many times the time of fusedopt the other takes."
    report.console.print(report.headline(facts), table, sep="\n")
    return [report.write_json(options.out / "host_cost.json", facts, results=results)]


if __name__ == "__main__":
    main()
