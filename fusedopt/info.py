"""``python -m fusedopt.info``: each backend, its status, and the original error if it has one."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import __version__, backend


def _gpus(native: Any) -> list[str]:
    """What runs on each GPU, or why nothing does. Uses none of them."""
    lines = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        problem = native.device_problem(index)
        lines.append(f"cuda:{index}:  {problem or native.describe_device(index)}")
    if not lines:
        lines.append(f"cuda:    {native.device_problem(0) or 'this torch cannot use the GPUs'}")
    if torch.version.cuda is not None:
        when = "compiled when a step on a GPU first needs them"
        lines.append(f"kernels: {when}, {native.describe_cache()}")
    return lines


def report() -> str:
    """What ``python -m fusedopt.info`` prints."""
    lines = [
        f"fusedopt {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}",
        f"in use:  {backend.status()}",
    ]
    if backend.native is not None:
        lines.append(f"native:  available, {backend.native.__file__}")
        problem = backend.native.layout_problem
        slow = f"asked of torch at each step, which is slower: {problem}"
        lines.append(f"tensors: {slow if problem else 'recognised'}")
        lines += _gpus(backend.native)
    else:
        first, *rest = (backend.error or "").splitlines()
        lines.append(f"native:  not used: {first}")
        lines += [f"         {line}" for line in rest]
        lines.append("cuda:    not used: the kernels are in the native module")
    lines.append("python:  available")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
