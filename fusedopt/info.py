"""``python -m fusedopt.info``: each backend, its status, and the original error if it has one."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import __version__, backend


def _gpus(native: Any) -> list[str]:
    """What runs on each GPU, or why nothing does. Uses none of them."""
    if not torch.cuda.is_available():
        return [f"cuda:    {native.device_problem(0) or 'this torch cannot use the GPUs'}"]
    lines = []
    for index in range(torch.cuda.device_count()):
        problem = native.device_problem(index)
        lines.append(f"cuda:{index}:  {problem or native.describe_device(index)}")
    return [*lines, f"kernels: {native.describe_cache()}"]


def _devices() -> list[torch.device]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = 0 if accelerator is None else torch.accelerator.device_count()
    others = [torch.device(accelerator.type, i) for i in range(count)] if accelerator else []
    return [torch.device("cpu"), *others]


def _what_runs(device: torch.device) -> str:
    problem = backend.missing_kernels(device)
    if not problem:
        return "native"
    return f"torch's own implementations, the rule for options that torch does not have: {problem}"


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
    lines += [f"{device}: {_what_runs(device)}" for device in _devices()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
