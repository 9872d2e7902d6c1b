"""Any order of threads, and faults that are planted in the PTX."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SEED, stand_in
from ptx.launch import Launcher
from ptx.memory import Fault
from ptx.parse import Unsupported
from test_kernels import BLOCK, measured, params_of, running

import compiled_kernels
from compiled_kernels.comparison import F32, F64, ORDERS, compare, steps

# The order of threads -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORDERS)
def test_any_order_of_threads(name, kernels, compiler):
    """Blocks, warps and threads go on at random, down to single accesses of memory."""
    launcher = Launcher(np.random.default_rng(SEED), races=True)
    compiled = compiled_kernels.CompiledKernels(kernels, stand_in(), compiler, launcher, fine=True)

    def run(on_kernels):
        sizes = {"8bit": (4100,), "capturable": (5, BLOCK + 70)}
        params = params_of(sizes.get(name, (5, 1000, 2080)), F32)
        return steps(ORDERS[name](params, on_kernels), params)

    compare(compiled, run)


# Planted faults -------------------------------------------------------------------------------


BARRIER = re.compile(r"\bbar(?:rier)?\.sync[^;]*;")


def step_with(compiled: compiled_kernels.CompiledKernels, make: Any, sizes: Any) -> None:
    """Fails if the compiled code does not give the bits of the CPU."""

    def run(on_kernels):
        params = params_of(sizes, F32)
        return steps(make(params, on_kernels), params)

    compare(compiled, run)


def is_caught(kernels, compiler, make: Any, edit: Any, sizes: Any = (5, BLOCK + 9)) -> str:
    """What the machine, or the comparison, says of a kernel whose PTX was changed."""
    changed = []

    def with_note(text: str) -> str:
        changed.append(edit(text) != text)
        return edit(text)

    edited = compiled_kernels.CompiledKernels(kernels, stand_in(), compiler, edit=with_note)
    try:
        step_with(edited, make, sizes)
    except (Fault, Unsupported, AssertionError, pytest.fail.Exception) as error:
        assert any(changed)
        return f"{type(error).__name__}: {error}"
    assert any(changed), "nothing was changed"
    return ""


ADAM, CAPTURABLE, CLIPPED, CODED = ORDERS.values()
FAULTS = {
    "no barrier": (ADAM, lambda text: BARRIER.sub("", text), "race in shared memory"),
    "loads 4 bytes off": (
        ADAM,
        lambda text: re.sub(r"(ld\.global\.cs\.v4\.\w+\s[^[]*\[%rd\d+)\]", r"\1+4]", text),
        "misaligned",
    ),
    "loads 16 bytes off": (
        ADAM,
        lambda text: re.sub(r"(ld\.global\.cs\.v4\.\w+\s[^[]*\[%rd\d+)\]", r"\1+16]", text),
        "no memory",
    ),
    "stores 16 bytes off": (
        ADAM,
        lambda text: re.sub(r"(st\.global\.cs\.v4\.\w+\s\[%rd\d+)\]", r"\1+16]", text),
        "no memory",
    ),
    "a ticket that does not wrap": (
        CAPTURABLE,
        lambda text: text.replace("atom.global.inc.u32", "atom.global.add.u32"),
        "",
    ),
    "a ticket that wraps late": (
        CAPTURABLE,
        lambda text: re.sub(
            r"(atom\.global\.inc\.u32\s+%r\d+, \[%rd\d+\]), %r\d+;", r"\1, 7;", text
        ),
        "",
    ),
    "a ticket of the norm that wraps late": (
        CLIPPED,
        lambda text: re.sub(
            r"(atom\.global\.inc\.u32\s+%r\d+, \[%rd\d+\]), %r\d+;", r"\1, 7;", text
        ),
        "",
    ),
    "two operations that may become one": (
        ADAM,
        lambda text: text.replace("add.rn.f32", "add.f32"),
        "not rounded to nearest",
    ),
    "a scale of four lanes": (
        CODED,
        lambda text: re.sub(r"(shfl\.sync\.bfly\.b32\s+[^,]*, )%r\d+,", r"\1 0,", text),
        "",
    ),
}


@pytest.mark.parametrize(("make", "edit", "says"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(make, edit, says, kernels, compiler):
    sizes = (4160, BLOCK + 70) if make is CODED else (5, BLOCK + 8)
    found = is_caught(kernels, compiler, make, edit, sizes)
    assert found
    assert says in found, found


def test_every_barrier_of_the_norm_is_needed(kernels, compiler):
    """Each is taken out of the PTX, and a race is found."""
    text = compiled_kernels.ptx_of(compiler, kernels, "fusedopt_grad_norm")
    with running(kernels):
        measured([torch.ones(3)], 1.0)  # so that it is known as one that passed its trial
    needless, count = [], len(BARRIER.findall(text))
    assert count > 5
    for number in range(count):

        def edit(text: str, number: int = number) -> str:
            if "grad_norm" not in text:
                return text
            found = [*BARRIER.finditer(text)][number]
            return text[: found.start()] + text[found.end() :]

        # Gradients in float, in double, and such that float is not enough.
        needless += [number] if not caught_in_the_norm(kernels, compiler, edit) else []
    assert needless == []


def caught_in_the_norm(kernels, compiler, edit: Any) -> bool:
    compiled = compiled_kernels.CompiledKernels(kernels, stand_in(), compiler, edit=edit)
    for grads in ([torch.ones(3000)], [torch.ones(3000, dtype=F64)], [torch.full((3000,), 1e-30)]):
        try:
            with running(kernels), compiled.running():
                measured(grads, 1.0)
        except Fault:
            return True
    return False
