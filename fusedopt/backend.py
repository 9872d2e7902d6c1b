"""Loads the native module, or says exactly why it is not used.

``FUSEDOPT_BACKEND=native`` insists on it, ``FUSEDOPT_BACKEND=python`` leaves it out.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
import os
import sys
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import memory, torch_layout

# What the kernels compute on, as it is.
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def build_error() -> str:
    """What setup.py left when the native module could not be built."""
    file = Path(__file__).with_name("_build_error.txt")
    return file.read_text() if file.exists() else ""


def _gpu_library() -> tuple[str, str]:
    """The library with which torch brings NVRTC and the driver, or why there is none."""
    if torch.version.hip is not None:
        return "", "this torch is built for ROCm, and the kernels are for CUDA"
    if torch.version.cuda is None:
        return "", "this torch is built without CUDA"
    own, name = Path(torch.__file__).with_name("lib"), "libcaffe2_nvrtc.so"
    for folder in itertools.chain([own], _folders_of("libtorch_cuda.so")):
        if (folder / name).exists():
            return str(folder / name), ""
    return "", f"torch has no {name} in {own} or beside its libtorch_cuda.so"


def _folders_of(library: str) -> Iterator[Path]:
    """Where this process has loaded it from: some distributions move torch's libraries."""
    maps = Path("/proc/self/maps")
    text = os.fsdecode(maps.read_bytes()) if maps.exists() else ""
    for line in text.splitlines():
        if f"/{library}" in line:
            yield Path(line.split(maxsplit=5)[-1]).parent


def _tell(is_warning: bool, text: str) -> None:
    """What the native module has to say when it has loaded kernels: that one of them is not used,
    or that it took more than a second. The latter goes to the logger "fusedopt", or to stderr
    where logging is not set up."""
    if is_warning:
        warnings.warn(f"fusedopt: {text}", RuntimeWarning, stacklevel=2)
    elif (logger := logging.getLogger("fusedopt")).hasHandlers():
        logger.info(text)
    else:
        print(f"fusedopt: {text}", file=sys.stderr)


def _free_memory() -> None:
    """What torch keeps of the memory of GPUs and does not use. A kernel that takes some is the
    driver's, and has none of torch's."""
    torch.cuda.empty_cache()


def _bind(module: Any) -> None:
    """Hands the native module torch's DLPack exchange table, and where the driver is."""
    for name in ("__dlpack_c_exchange_api__", "__c_dlpack_exchange_api__"):
        table = getattr(torch.Tensor, name, None)
        if table is not None:
            module.bind(
                table,
                torch.Tensor,
                torch.nn.Parameter,
                torch._C._increment_version,
                torch._C._len_torch_function_stack,
                memory.parts_of,
                memory.reading_problem,
                defaultdict,
            )
            module.use_gpu(*_gpu_library(), _tell, _free_memory)
            module.layout_problem = torch_layout.prove(module) or ""
            return
    raise ImportError(
        f"torch {torch.__version__} does not export the DLPack C exchange API on torch.Tensor; "
        "fusedopt needs torch 2.10 or newer"
    )


def _load(choice: str) -> tuple[Any, str | None]:
    """The native module, or None and why."""
    if choice not in ("", "native", "python"):
        raise ValueError(f"FUSEDOPT_BACKEND must be 'native' or 'python', got {choice!r}")
    if choice == "python":
        return None, "FUSEDOPT_BACKEND=python"
    try:
        module = importlib.import_module("fusedopt._native")
        _bind(module)
    except Exception as error:
        why = "".join(traceback.format_exception_only(error)).strip()
        why = f"{why}\n{build_error()}".rstrip()
        if choice == "native":
            raise ImportError(
                f"FUSEDOPT_BACKEND=native, but the native module cannot be used: {why}"
            ) from error
        warnings.warn(
            "fusedopt: the native module cannot be used, steps are left to torch's operators: "
            f"{why.splitlines()[0]} (`python -m fusedopt.info` prints all of it)",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, why
    return module, None


native, error = _load(os.environ.get("FUSEDOPT_BACKEND", ""))


def has_kernels(device: torch.device) -> bool:
    """Whether the native module has kernels, in the sense of a GPU's, for a device.

    If this GPU, its driver or NVRTC is not what the kernels need, warns once and says why.
    """
    return native is not None and device.type == native.KERNEL_DEVICE and not _problem(device)


@functools.cache
def _problem(device: torch.device) -> str:
    problem: str = native.device_problem(device.index or 0)
    if problem:
        warn_of_missing_kernels(device.type, problem)
    return problem


def missing_kernels(device: torch.device) -> str:
    """Why torch's operators step the parameters of a device; empty where the native module does."""
    if native is None:
        return (error or "").split("\n", 1)[0]
    if device.type == native.KERNEL_DEVICE:
        problem: str = native.device_problem(device.index or 0)
        return problem
    return "" if device.type == "cpu" else f"fusedopt has no kernels for {device.type}"


@functools.cache
def warn_of_missing_kernels(device_type: str, problem: str) -> None:
    """Once for each reason."""
    warnings.warn(
        f"fusedopt: steps on {device_type} are left to torch's operators: {problem}. They are "
        "torch.optim's own where it has all options of the group, and slower where it has not; "
        "`python -m fusedopt.info` says what runs where",
        RuntimeWarning,
        stacklevel=2,
    )


class PutOff:
    """Kernels that a GPU had no memory for, as who steps without them sees them."""

    def __init__(self) -> None:
        self._seen = 0

    def may_be_there(self) -> bool:
        """Whether one of them is there, or to be tried again, since this was asked last."""
        before = self._seen
        self._seen = 0 if native is None else native.num_put_off_no_longer()
        return before != self._seen


def is_accelerator(device: torch.device) -> bool:
    return device.type != "cpu" or has_kernels(device)


@functools.cache
def widest_float(device: torch.device) -> torch.dtype:
    """The most exact dtype that a device computes with."""
    if device.type == "mps":
        return torch.float32
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return torch.float32
    return torch.float64


def widened(number: Tensor) -> Tensor:
    """In the most exact dtype that its device computes with."""
    return number.to(widest_float(number.device))


def moved(number: Tensor, device: torch.device) -> Tensor:
    """As exact as both devices can have it, and widened there."""
    dtype = widest_float(device)
    shared = min(number.dtype, dtype, key=lambda dtype: dtype.itemsize)
    there = number.to(shared).to(device, non_blocking=device.type == "cuda")
    return there.to(dtype)


def runs_on(device: torch.device) -> bool:
    """Whether the native module takes tensors on this device."""
    if native is None or device.type == native.KERNEL_DEVICE:
        return has_kernels(device)
    return device.type == "cpu"


def is_capturing() -> bool:
    """Whether the current stream records a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def capture_error(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what}, which cannot be captured into a CUDA graph: run a step before the capture"
    )


def use_on_stream(tensor: Tensor, streams: dict[Tensor, int]) -> None:
    """Keeps the memory until the current stream has done what it is given now, if the stream is not
    the one in ``streams``, where it is the last."""
    if tensor.is_cuda:
        stream = torch._C._cuda_getCurrentRawStream(tensor.device.index)
        if streams.get(tensor) != stream:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
            streams[tensor] = stream


def lasting_zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for what one step leaves to the next; a captured graph would make it anew."""
    if device.type == "cuda" and is_capturing():
        raise capture_error("the first step sets memory aside")
    return torch.zeros(size, dtype=dtype, device=device)


def status() -> str:
    """Which backend runs, in one line."""
    if native is None:
        return f"python ({(error or '').splitlines()[0]})"
    return f"native ({native.describe()})"
