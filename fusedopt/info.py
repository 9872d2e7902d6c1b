"""``python -m fusedopt.info``: each backend, its status, the original error if it has one, and what
runs on each device."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import __version__, backend


def _devices() -> list[torch.device]:
    cpu = torch.device("cpu")
    if torch.cuda.is_available():
        return [cpu, *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    other = torch.accelerator.current_accelerator(check_available=True)
    if other is None:
        return [cpu]
    return [cpu, *(torch.device(other.type, i) for i in range(torch.accelerator.device_count()))]


def _what_runs(native: Any, device: torch.device) -> str:
    """What steps the parameters of a device, and if it is not the native module, why. Uses none."""
    if problem := backend.missing_kernels(device):
        return f"torch.optim's own steps, and rules for the options that it lacks: {problem}"
    is_gpu = device.type == native.KERNEL_DEVICE != "cpu"
    return f"native, {native.describe_device(device.index)}" if is_gpu else "native"


def _without_gpus(native: Any) -> str:
    """Why there is no GPU."""
    if native is None:
        return "not used: the kernels are in the native module"
    return native.device_problem(0) or "this torch cannot use the GPUs"


def report() -> str:
    """What ``python -m fusedopt.info`` prints."""
    native, devices = backend.native, _devices()
    lines = [("in use", backend.status())]
    if native is not None:
        lines.append(("native", f"available, {native.__file__}"))
        problem = native.layout_problem
        slow = f"asked of torch at each step, which is slower: {problem}"
        lines.append(("tensors", slow if problem else "recognised"))
    else:
        first, *rest = (backend.error or "").splitlines()
        lines.append(("native", f"not used: {first}"))
        lines += [("", line) for line in rest]
    lines += [("python", "available")]
    lines += [(str(device), _what_runs(native, device)) for device in devices]
    if not any(device.type == "cuda" for device in devices):
        lines.append(("cuda", _without_gpus(native)))
    if native is not None and torch.version.cuda is not None:
        when = "compiled when a step on a GPU first needs them"
        lines.append(("kernels", f"{when}, {native.describe_cache()}"))
    head = (
        f"fusedopt {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}"
    )
    return "\n".join([head, *(f"{f'{name}:' if name else '':8} {text}" for name, text in lines)])


if __name__ == "__main__":
    print(report())
