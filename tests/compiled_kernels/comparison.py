"""Steps of the compiled code, held against those of the CPU path."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import seam
import stored
import torch
from test_kernels import running, set_grads

import compiled_kernels
import fusedopt

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def compare(compiled: compiled_kernels.CompiledKernels, run: Any) -> None:
    """``run`` makes and steps an optimizer, and gets whether the kernels do it. It ends with the
    same bits as on the CPU path, and the compiled code has run. The kernels were loaded before:
    what a kernel proves before its first use, its body does."""
    number, before = random.randrange(2**31), compiled.launcher.launches
    ends = []
    for module, runs in (
        (fusedopt.backend.native, contextlib.nullcontext()),
        (compiled.module, contextlib.nullcontext()),
        (compiled.module, compiled.running()),
    ):
        torch.manual_seed(number)
        random.seed(number)
        with running(module), runs:
            ends.append(run(module is compiled.module))
    ends = ends[::2]
    stored.assert_same_outcome(ends[1], ends[0])
    if ends[0].grad_norm is not None:
        stored.assert_bits(ends[1].grad_norm, ends[0].grad_norm, "grad_norm")
    assert compiled.launcher.launches > before


def steps(opt: Any, params: Any, count: int = 2) -> Any:
    for at in range(count):
        set_grads(params, special=at == 1)
        opt.step()
        assert all((tickets == 0).all() for tickets in seam.tickets(opt))
    return opt


def is_capturable(name: str) -> bool:
    return "capturable" in seam.torch_options(getattr(fusedopt, name))


ORDERS = {
    "Adam": lambda params, _: fusedopt.Adam(params, lr=0.1),
    "capturable": lambda params, on: fusedopt.Adam(params, lr=0.1, capturable=on),
    "clipped": lambda params, _: fusedopt.SGD(params, lr=0.1, max_grad_norm=0.5),
    "8bit": lambda params, _: fusedopt.SGD(params, lr=0.1, momentum=0.9, state_dtype="8bit"),
}
