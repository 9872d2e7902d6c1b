"""What the GPU's kernels are made of, read from their machine code: no GPU is needed.

    python -m bench.kernel_model --kernels AdamUpdate_float grad_norm --gpus 80 90

Compiles kernels with NVRTC (``make test`` puts three into build/nvrtc; or set FUSEDOPT_NVRTC) and
prints registers, how many blocks of 256 threads they leave room for on a multiprocessor, and
barriers. Where ``nvdisasm`` is (CUDA's, or nvidia-nvdisasm of PyPI), also of each loop that reads
memory: the loads and stores of a turn, its instructions, and the bytes that all threads of a
multiprocessor load in a turn. Counted is all that the loop has but for calls, which rare numbers
take: of loops with several ways in them that is too much. What a GPU makes of it, no model says.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import fusedopt

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import nvrtc

THREADS = 256
# Of a multiprocessor: registers, and blocks of so many threads, where it has not 2,048.
REGISTERS, MOST_BLOCKS = 65_536, {75: 4, 86: 6, 89: 6, 120: 6}

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ +)?([A-Z0-9.]+)([^;]*);")
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
    jumps: list[tuple[int, str]] = []
    blocks = [0]  # where instructions begin that come one after the other
    for line in text.splitlines():
        if label := LABEL.match(line.strip()):
            labels[label[1]] = len(operations)
            blocks.append(len(operations))
        elif found := INSTRUCTION.search(line):
            operations.append(found[1])
            if found[1].startswith("BRA") and (to := re.search(r"\.L_\w+", found[2])):
                jumps.append((len(operations) - 1, to[0]))
                blocks.append(len(operations))
    # Roots and quotients of rare numbers are called.
    rare: set[int] = set()
    for begin, end in pairwise([*blocks, len(operations)]):
        if any(operation.startswith("CALL") for operation in operations[begin:end]):
            rare.update(range(begin, end))
    spans = sorted((labels[to], at + 1) for at, to in jumps if labels.get(to, at + 1) <= at)
    inner = [
        (begin, end)
        for begin, end in spans
        if not any((begin, end) != (b, e) and begin <= b and e <= end for b, e in spans)
    ]
    loops = [Loop([operations[i] for i in range(*span) if i not in rare]) for span in inner]
    return [loop for loop in loops if loop.moved("LDG")]


def disassembled(code: bytes) -> str | None:
    program = shutil.which("nvdisasm")
    if program is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [program, "--print-code", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def report_on(module: Any, compiler: nvrtc.Nvrtc, kernel: str, gpu: int) -> None:
    cubin = compiler.cubin(module, kernel, gpu)
    blocks = REGISTERS // (THREADS * -(-cubin.registers // 8) * 8)
    blocks = min(blocks, MOST_BLOCKS.get(gpu, 8))
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
