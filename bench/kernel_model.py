"""What the GPU's kernels are made of, read from their machine code: no GPU is needed.

    python -m bench.kernel_model --kernels AdamUpdate_float grad_norm --gpus 80 90

Compiles kernels with NVRTC (``make test`` puts three into build/nvrtc; or set FUSEDOPT_NVRTC) and
prints registers, how many blocks of 256 threads they leave room for on a multiprocessor, and
barriers. Where ``nvdisasm`` is (CUDA's, or nvidia-nvdisasm of PyPI), also of each loop that reads
memory: the loads and stores of a turn, its instructions, and the bytes that all threads of a
multiprocessor load in a turn. Of several ways through a loop the shortest is counted that moves
all: what rare numbers take is longer. What a GPU makes of it, no model says.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fusedopt

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import nvrtc

THREADS = 256
# Of a multiprocessor: registers, and blocks of so many threads, where it has not 2,048.
REGISTERS, MOST_BLOCKS = 65_536, {75: 4, 86: 6, 89: 6, 120: 6}

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\d+ +)?([A-Z0-9.]+)([^;]*);")
LABEL = re.compile(r"^(\.L_\S+):")
WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128)\b")
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass
class Loop:
    operations: list[str]  # with their suffixes

    def moved(self, name: str) -> list[int]:
        """Bytes of each load or store of a turn."""
        found = []
        for operation in self.operations:
            if operation.startswith(name):
                width = WIDTH.search(operation)
                found.append(BYTES[width[1]] if width else 4)
        return found

    def describe(self, blocks: int) -> str:
        loads, stores = self.moved("LDG"), self.moved("STG")
        loaded = sum(loads) * THREADS * blocks / 1024
        return (
            f"    {len(loads):3} loads of {_widths(loads):8} {len(stores):3} stores of "
            f"{_widths(stores):8} bytes, {len(self.operations):5} instructions, "
            f"{loaded:4.0f} KiB loaded"
        )


def _widths(moved: list[int]) -> str:
    return "/".join(map(str, sorted({*moved})))


def loops_of(text: str) -> list[Loop]:
    """Those that read memory and have no other in them."""
    operations: list[str] = []
    labels: dict[str, int] = {}
    jumps: dict[int, tuple[str, bool]] = {}  # whether it may go on, too
    for line in text.splitlines():
        if label := LABEL.match(line.strip()):
            labels[label[1]] = len(operations)
        elif found := INSTRUCTION.search(line):
            if found[2].startswith("BRA") and (to := re.search(r"\.L_\w+", found[3])):
                on_condition = bool(found[1]) or re.match(r"\s*!?U?P\d", found[3]) is not None
                jumps[len(operations)] = to[0], on_condition
            operations.append(found[2])
    spans = sorted(
        (labels[to], at + 1) for at, (to, _) in jumps.items() if labels.get(to, at + 1) <= at
    )
    inner = [
        (begin, end)
        for begin, end in spans
        if not any((begin, end) != (b, e) and begin <= b and e <= end for b, e in spans)
    ]
    ways = {at: (labels[to], may) for at, (to, may) in jumps.items() if to in labels}
    turns = [shortest_turn(operations, *span, ways) for span in inner]
    loops = [Loop([operations[at] for at in turn]) for turn in turns]
    return [loop for loop in loops if loop.moved("LDG")]


def shortest_turn(
    operations: list[str], begin: int, end: int, jumps: dict[int, tuple[int, bool]]
) -> list[int]:
    """Of a loop, whose last instruction jumps back, of those that move all and call nothing: roots
    and quotients of rare numbers are called."""
    kept, called = ("LDG", "STG"), "CALL"
    best: dict[int, tuple[int, list[int]]] = {end - 1: (0, [end - 1])}
    for at in range(end - 2, begin - 1, -1):
        to, may_go_on = jumps.get(at, (at + 1, False))
        after = [best[next] for next in {to, *([at + 1] if may_go_on else [])} if at < next in best]
        if after:
            worth, turn = max(after, key=lambda it: (it[0], -len(it[1])))
            worth += operations[at].startswith(kept) - 1000 * operations[at].startswith(called)
            best[at] = worth, [at, *turn]
    return best[begin][1] if begin in best else []


def disassembled(code: bytes) -> str | None:
    program = shutil.which("nvdisasm")
    if program is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [program, "--print-code", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def blocks_of(registers: int, gpu: int) -> int:
    """How many fit a multiprocessor."""
    blocks = REGISTERS // (THREADS * -(-registers // 8) * 8)
    return min(blocks, MOST_BLOCKS.get(gpu, 8))


def report_on(module: Any, compiler: nvrtc.Nvrtc, kernel: str, gpu: int) -> None:
    cubin = compiler.cubin(module, kernel, gpu)
    blocks = blocks_of(cubin.registers, gpu)
    text = disassembled(cubin.data)
    barriers = "" if text is None else f", {len(re.findall(r'BAR.SYNC', text))} barriers"
    print(f"{kernel} sm_{gpu}: {cubin.registers} registers, {blocks} blocks{barriers}")
    for loop in loops_of(text or ""):
        print(loop.describe(blocks))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernel_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernels", nargs="+", default=["AdamUpdate_float_false", "grad_norm"])
    parser.add_argument("--gpus", nargs="+", type=int, default=[80, 90])
    options = parser.parse_args(arguments)
    module = fusedopt.backend.native
    if module is None or not nvrtc.compilers():
        sys.exit("needs the native module, and NVRTC in build/nvrtc or at FUSEDOPT_NVRTC")
    compiler = nvrtc.compilers()[-1]
    print(compiler)
    for kernel in module.kernels():
        if any(part in kernel for part in options.kernels):
            for gpu in options.gpus:
                report_on(module, compiler, kernel, gpu)


if __name__ == "__main__":
    main()
