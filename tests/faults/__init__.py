"""Interrupts, failed allocations, raising hooks, killed processes: after each the optimizer is as
before the step or fully stepped, and the next step is right."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import RICHEST_OF, Case, gradient_like, leaf
from torch import Tensor

BF16 = torch.bfloat16


class Interrupt:
    """Raises KeyboardInterrupt at the nth place where CPython delivers one: when a function begins,
    and after C code was called."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __enter__(self) -> Interrupt:
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def __call__(self, frame: Any, event: str, _arg: Any) -> None:
        is_generator = frame.f_code.co_flags & inspect.CO_GENERATOR  # "call" also when it is closed
        if event == "c_return" or (event == "call" and not is_generator):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def odd_params() -> list[Tensor]:
    """What the native call takes, what is copied for it, and what takes the Python rule."""
    dense, transposed, gaps, complex_ = (torch.randn(*s) for s in [(7, 9), (5, 3), (6, 8), (4, 2)])
    params = [
        leaf(dense),
        leaf(transposed),
        leaf(torch.randn(3, 2), BF16),
        gaps[:, ::2].requires_grad_(),
        leaf(torch.view_as_complex(complex_)),
        leaf(torch.randn(11)),
    ]
    for param in params:
        param.grad = gradient_like(param.detach())
    params[1].grad = params[1].grad.t().contiguous().t()
    return params


def even_params(dtype: torch.dtype) -> list[Tensor]:
    params = [leaf(torch.randn(*shape), dtype) for shape in [(4100,), (3, 5), (0,), (17,)]]
    for param in params:
        param.grad = gradient_like(param.detach())
    return params


def sparse_params() -> list[Tensor]:
    params = [leaf(torch.randn(8, 3)) for _ in range(3)]
    for param in params:
        param.grad = torch.sparse_coo_tensor([[1, 4]], torch.randn(2, 3), (8, 3))
    params[0].grad = torch.randn(8, 3)
    return params


def scaled(opt: Any) -> None:
    opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(0.0)


def two_groups(case: Case, params: list[Tensor], **more: Any) -> Any:
    return case.ours([{"params": params[:2]}, {"params": params[2:]}], **more)


SGD, ADAM, ADAMW, RMSPROP, ADAGRAD = (
    RICHEST_OF[name] for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad")
)
MODELS: dict[str, Callable[[], Any]] = {
    "adam": lambda: two_groups(ADAM, odd_params()),
    "sgd": lambda: two_groups(SGD, odd_params(), max_grad_norm=1.0),
    "rmsprop": lambda: two_groups(RMSPROP, odd_params(), ema=0.9),
    "adagrad": lambda: two_groups(ADAGRAD, odd_params()),
    "even rmsprop": lambda: two_groups(RMSPROP, even_params(torch.float32)),
    "even nadam": lambda: two_groups(RICHEST_OF["NAdam"], even_params(torch.float32)),
    "sparse sgd": lambda: SGD.ours(sparse_params(), weight_decay=0, nesterov=False),
    "sparse adagrad": lambda: ADAGRAD.ours(sparse_params(), weight_decay=0),
    "clipped and scaled": lambda: two_groups(
        ADAMW, even_params(torch.float32), max_grad_norm=0.5, amp_fused=True
    ),
    "split masters, 8 bits, ema": lambda: two_groups(
        ADAMW, even_params(BF16), master_weights="split", state_dtype="8bit", ema=0.5
    ),
    "whole masters": lambda: two_groups(
        SGD, even_params(torch.float16), master_weights="fp32", state_dtype=torch.float32
    ),
    "stochastic rounding": lambda: two_groups(
        RMSPROP, even_params(BF16), rounding="stochastic", state_dtype=BF16
    ),
}


def with_new_group(opt: Any) -> None:
    params = [leaf(torch.randn(6)), leaf(torch.randn(2, 2))]
    for param in params:
        param.grad = torch.randn_like(param)
    opt.add_param_group({"params": params})


def with_moved_tensors(opt: Any) -> None:
    for param, state in opt.state.items():
        param.data = copy.deepcopy(param.data)  # with its strides
        for value in state.values():
            value.data = value.data.clone()


# (model, steps taken before, what is changed then)
SITUATIONS = [
    *((name, 0, None) for name in MODELS if not name.startswith("even")),
    *((name, 2, None) for name in MODELS if not name.startswith("even")),
    # As the step before.
    ("even rmsprop", 5, None),
    ("even nadam", 5, None),
    ("adam", 1, with_moved_tensors),
    ("adam", 1, with_new_group),
    ("adagrad", 1, with_new_group),
]
every_situation = pytest.mark.parametrize(
    ("model", "steps", "change"),
    SITUATIONS,
    ids=[f"{m} after {s} {getattr(c, '__name__', '')}".strip() for m, s, c in SITUATIONS],
)


def step(opt: Any) -> None:
    torch.manual_seed(7)  # the seeds of stochastic rounding are drawn at the first step
    if opt.amp_fused:
        scaled(opt)
    opt.step()


def run(opt: Any, steps: int) -> None:
    for _ in range(steps):
        step(opt)
