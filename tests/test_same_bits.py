"""The same bits, however the native module cuts a step up: with any number of threads, in any
memory, for tensors in any order, together or one by one, and every time. With any instruction set:
test_instruction_sets.py.

What test_native.py and test_kernels.py have of it for plain storage, small tensors and the GPU's
kernels is not repeated.
"""

from __future__ import annotations

import functools
import hashlib
import math
import pickle
import random
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from cases import DTYPES, LOOPS, RICHEST, Case, bits, gradient_like, leaf, states
from conftest import SEED
from stored import WAYS
from torch import Tensor

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# Together more than what a step needs to be worth threads; codes, and pieces, have tails in most.
SHAPES = ((150_001,), (4_099,), (), (3, 40_007), (65,), (0,), (70_003,))
STEPS = 2


@dataclass(frozen=True)
class Setup:
    """How values are stored: the dtypes that parameters have in turn, and that of gradients."""

    name: str
    params: tuple[torch.dtype, ...]
    options: dict[str, Any]
    grads: torch.dtype | None = None
    max_grad_norm: float | None = None

    def __str__(self) -> str:
        return self.name


_PLAIN = [
    *[Setup(str(dtype)[6:], (dtype,), {}) for dtype in DTYPES],
    Setup("mixed", (F32, BF16, F64, F16), {}),
    Setup("bfloat16 gradients", (F32,), {}, BF16),
]
_STORED = [
    Setup(f"{way}, {str(dtype)[6:]}", (dtype,), options)
    for way, (options, dtypes) in WAYS.items()
    for dtype in dtypes
]
# Several ways at once; only for digests().
COMBINED = [
    Setup(
        "split, 8-bit, ema", (BF16,), {"master_weights": "split", "state_dtype": "8bit", "ema": 0.9}
    ),
    Setup("stochastic, float16", (BF16,), {"rounding": "stochastic", "state_dtype": F16}),
    Setup("whole master, 8-bit", (F16,), {"master_weights": "fp32", "state_dtype": "8bit"}),
]
SETUPS = [
    *_PLAIN,
    *_STORED,
    *[
        Setup(f"{s.name}, clipped", s.params, s.options, s.grads, max_grad_norm=0.7)
        for s in (*_PLAIN, *_STORED)
    ],
]


@dataclass
class Run:
    """Parameters and state after a first step, and gradients for the next ones."""

    case: Case
    setup: Setup
    params: list[Tensor]
    state: list[dict[str, Tensor]]
    grads: list[list[Tensor]]


def step_on(case: Case, setup: Setup, params: list[Tensor], state: list, grads: list) -> list:
    opt = case.ours(params, max_grad_norm=setup.max_grad_norm, **setup.options)
    for p, kept in zip(params, state, strict=True):
        if setup.grads is not None:
            p.grad_dtype = None
        if kept:
            opt.state[p] = kept
    for now in grads:
        for p, grad in zip(params, now, strict=True):
            p.grad = grad
        opt.step()
    return states(opt, params)


@functools.cache
def inputs(
    shapes: tuple[tuple[int, ...], ...],
    params: tuple[torch.dtype, ...],
    grads: torch.dtype | None,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    torch.manual_seed(SEED)
    values = [torch.randn(s).to(params[i % len(params)]) for i, s in enumerate(shapes)]
    return values, [
        [gradient_like(v.float(), 2.0**step).to(grads or v.dtype) for v in values]
        for step in range(1 + STEPS)
    ]


def begin(case: Case, setup: Setup, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> Run:
    """The same every time that it is called."""
    values, grads = inputs(shapes, setup.params, setup.grads)
    params = [leaf(v) for v in values]
    torch.manual_seed(SEED)  # which rounding at random is seeded with
    state = step_on(case, setup, params, [{}] * len(params), grads[:1])
    return Run(case, setup, params, state, grads[1:])


def placed(tensor: Tensor, shift: int) -> Tensor:
    """A copy, that many elements behind the begin of its memory."""
    memory = torch.empty(tensor.numel() + shift, dtype=tensor.dtype)
    return memory[shift:].view(tensor.shape).copy_(tensor.detach())


def go_on(run: Run, which: list[int] | None = None, shift: int = 0) -> dict[int, list]:
    """The bits of some of the tensors after some more steps with them, in this order."""
    which = [*range(len(run.params))] if which is None else which
    params = [placed(run.params[i], shift).requires_grad_() for i in which]
    state = [{k: placed(v, shift) for k, v in run.state[i].items()} for i in which]
    grads = [[placed(now[i], shift) for i in which] for now in run.grads]
    state = step_on(run.case, run.setup, params, state, grads)
    return {i: written(p, s) for i, p, s in zip(which, params, state, strict=True)}


def written(param: Tensor, state: dict[str, Tensor]) -> list:
    """Where a NaN is a NaN: which one an operation returns depends on the order of its operands."""
    found = []
    for key, value in [("param", param.detach()), *state.items()]:
        if value.is_floating_point():
            value = value.masked_fill(value.isnan(), math.nan)
        found.append((key, bits(value)))
    return found


def assert_same(found: dict[int, list], expected: dict[int, list], how: str) -> None:
    for i, tensors in found.items():
        differ = [k for (k, a), (_, b) in zip(tensors, expected[i], strict=True) if a != b]
        assert not differ, f"{how}: {differ} of tensor {i}, {SHAPES[i]}"


CROSSED = [(c, s) for s in SETUPS for c in (LOOPS if s.max_grad_norm is None else RICHEST)]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("case", "setup"),
    # A norm is nothing to the class.
    [(c, s) for c, s in CROSSED if s.max_grad_norm is None or c.name == "AdamW"],
    ids=str,
)
def test_in_one_process(case, setup, step_threads):
    """The norm of all gradients is a sum in the order of the parameters, as torch's is: clipped
    steps are not tried in another order, and one by one they would be others."""
    step_threads(1)
    run = begin(case, setup)
    expected = go_on(run)
    for threads, shift in ((2, 0), (3, 1), (7, 34)):
        step_threads(threads)
        assert_same(go_on(run, shift=shift), expected, f"{threads} threads, {shift} further")
    assert_same(go_on(begin(case, setup)), expected, "once more")
    if setup.max_grad_norm is not None:
        return
    order = random.sample(range(len(SHAPES)), len(SHAPES))
    assert_same(go_on(run, order), expected, f"in the order {order}")
    for i in range(len(SHAPES)):
        assert_same(go_on(run, [i]), expected, "alone")


def digests() -> dict[str, str]:
    """One for each case and setup, the same in every process with the same seed."""
    found = {}
    for case, setup in (*CROSSED, *product(RICHEST, COMBINED)):
        run = begin(case, setup, ((4_099,), (67, 65), (), (65,)))
        found[f"{case}, {setup}"] = hashlib.sha256(pickle.dumps(go_on(run))).hexdigest()
    return found
