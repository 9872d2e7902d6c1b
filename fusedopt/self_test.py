"""``python -m fusedopt.self_test``: compiles and tries out every kernel on every GPU.

Says for each kernel how long NVRTC took, and whether it gives the bits of the CPU on this GPU: with
all options and dtypes, aligned and misaligned. Each way to store values has kernels of its own, of
which these are one. What it compiles is kept, and so is the verdict, so that later steps find both.
Exits with 1 if a kernel is not used, or there is no GPU.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import sys
import time

import torch

from . import backend


def _try_out(index: int) -> list[str]:
    """On one GPU; the kernels that are not used there."""
    native = backend.native
    names = native.kernels()
    refused, begin = [], time.perf_counter()
    print(f"cuda:{index}: {native.describe_device(index)}", flush=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        trials = pool.map(functools.partial(native.try_out, device=index), names)
        for name, (compiled, tried, problem) in zip(names, trials, strict=True):
            took = f"compiled in {compiled:4.1f} s" if compiled else "from the cache   "
            print(
                f"  {name:<45} {took}  tried out in {tried:4.2f} s  {problem or 'passed'}",
                flush=True,
            )
            if problem:
                refused.append(name)
    seconds = time.perf_counter() - begin
    print(f"  {len(names) - len(refused)} of {len(names)} kernels passed, in {seconds:.0f} s")
    return refused


def main() -> int:
    """What ``python -m fusedopt.self_test`` does."""
    if backend.native is None:
        print(f"there are no kernels: {backend.error}")
        return 1
    count = torch.cuda.device_count()
    problems = [backend.native.device_problem(index) for index in range(max(count, 1))]
    for index, problem in enumerate(problems):
        if problem:
            print(f"cuda:{index}: no kernel can be used: {problem}")
    usable = [index for index, problem in enumerate(problems) if not problem]
    refused = [name for index in usable for name in _try_out(index)]
    if usable:
        print(f"kernels: {backend.native.describe_cache()}")
    return 1 if refused or not usable else 0


if __name__ == "__main__":
    sys.exit(main())
