"""Reads the machine code of CUDA kernels and fails where it is not what the source promises.

    python tests/native/check_sass.py fusedopt/_native*.so --archs sm_75 sm_90

No kernel uses local memory (spilled registers, arrays that are indexed at run time) or too many
registers. Kernels that load move 16 bytes at a time, and those of the update rules on every path on
which they should.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

RELEVANT = re.compile(r"LD|ST|REG:")
LOCAL_MEMORY = re.compile(r"\b(LDL|STL)\b")
WIDE_LOAD = re.compile(r"\bLDG\.\S*\b(128|256)\b")
WIDE_STORE = re.compile(r"\bSTG\.\S*\b(128|256)\b")
# A rule loads all of its slots and stores all but the gradient, with 16 bytes each, as often as it
# has vectors in flight: in double twice; in float32 and in the mix of dtypes twice, in bfloat16 and
# in float16 once. So many more loads than stores there are.
GRAD_LOADS = {"update_kernel<double": 2, "update_kernel<float": 6}


def find_cuobjdump() -> str:
    """On the path, or from its package."""
    found = shutil.which("cuobjdump")
    spec = find_spec("nvidia")
    for packages in (spec.submodule_search_locations or []) if spec and not found else []:
        found = next(map(str, Path(packages).glob("*/bin/cuobjdump")), None) or found
    if not found:
        sys.exit("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr or done.stdout}")
    return done.stdout


def read_kernels(file: str, what: str) -> dict[tuple[str, str], str]:
    """The resources or memory accesses of each kernel, by architecture and name."""
    kernels: dict[tuple[str, str], str] = {}
    arch = name = ""
    for line in run(find_cuobjdump(), what, file).splitlines():
        if found := re.match(r"arch = (\S+)", line):
            arch, name = found[1], ""
        elif found := re.match(r"\s+Function ?: ?(\S+)$|\s+Function (\S+):$", line):
            name = found[1] or found[2]
            kernels[arch, name] = ""
        elif name and RELEVANT.search(line):
            kernels[arch, name] += line + "\n"
    return kernels


def demangle(names: list[str]) -> list[str]:
    noise = re.compile(r"^void |\((?!anonymous).*|\(anonymous namespace\)::|fusedopt::")
    return [noise.sub("", name) for name in run("c++filt", *names).splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="a module or an object")
    parser.add_argument("--archs", nargs="+", default=[], help="must all be there")
    # 65,536 registers are then enough for two blocks of 256 threads.
    parser.add_argument("--max-registers", type=int, default=128)
    parser.add_argument("--wide-loads", nargs="+", default=[], metavar="KERNEL")
    args = parser.parse_args()

    usage = read_kernels(args.file, "--dump-resource-usage")
    sass = read_kernels(args.file, "--dump-sass")
    if not usage or usage.keys() != sass.keys():
        sys.exit(f"{args.file}: {len(usage)} kernels with resources, {len(sass)} with code")
    archs = sorted({arch for arch, _ in sass}, key=lambda arch: int(arch[3:]))
    names = sorted({name for _, name in sass})
    shown = dict(zip(names, demangle(names), strict=True))

    failures = [f"no kernel for {arch}" for arch in args.archs if arch not in archs]
    for prefix in args.wide_loads:
        if not any(name.startswith(prefix) for name in shown.values()):
            failures.append(f"no kernel is called {prefix}")
    registers = {}
    for key in sorted(sass):
        arch, name = key[0], shown[key[1]]
        used = {what: int(count) for what, count in re.findall(r"(\w+):(\d+)", usage[key])}
        registers[key] = used["REG"]
        local = len(LOCAL_MEMORY.findall(sass[key]))
        loads, stores = (len(op.findall(sass[key])) for op in (WIDE_LOAD, WIDE_STORE))
        grads = next((n for prefix, n in GRAD_LOADS.items() if name.startswith(prefix)), None)
        for failed, what in (
            (used["REG"] > args.max_registers, f"{used['REG']} registers"),
            (
                local or used["STACK"] or used["LOCAL"],
                f"local memory: {local} accesses, {used['STACK'] + used['LOCAL']} bytes",
            ),
            (name.startswith(tuple(args.wide_loads)) and not loads, "no 16-byte load"),
            (
                grads and loads - stores != grads,
                f"{loads} loads and {stores} stores of 16 bytes; {grads} more loads expected",
            ),
        ):
            if failed:
                failures.append(f"{arch} {name}: {what}")

    print(*archs, " registers of")
    for mangled, name in shown.items():
        print(*(f"{registers.get((arch, mangled), '-'):>{len(arch)}}" for arch in archs), "", name)
    print(*failures, sep="\n", end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
