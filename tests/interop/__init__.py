"""Real training frameworks: each trains one small model with stock and with fusedopt."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import RICHEST, RICHEST_OF, Case, assert_near, leaf
from conftest import skip_or_fail
from torch import Tensor, nn

Build = Callable[..., torch.optim.Optimizer]

SGD, ADAMW = (RICHEST_OF[name] for name in ("SGD", "AdamW"))
every_case = pytest.mark.parametrize("case", RICHEST, ids=lambda case: case.name)
two_cases = pytest.mark.parametrize("case", [SGD, ADAMW], ids=lambda case: case.name)


def package(name: str) -> ModuleType:
    """The module, or a skip (in CI an error) of the test file that asks for it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        try:
            skip_or_fail(f"{error}; 'make build' installs it")
        except pytest.skip.Exception as skip:
            raise pytest.skip.Exception(skip.msg, allow_module_level=True) from None


def ours(case: Case) -> Build:
    """With ``foreach`` stored as ``case.stock`` has it, so that checkpoints are equal in all."""
    return lambda params, **more: case.ours(params, foreach=False, **more)


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def assert_same(ours: Any, stock: Any, rtol: float = 1e-8, atol: float = 1e-10) -> None:
    """The same tree of tensors and numbers. The default is for runs in float64: the optimizers
    differ by roundings of 1e-16, which a dozen steps through a model enlarge."""
    torch.testing.assert_close(ours, stock, rtol=rtol, atol=atol, equal_nan=True)


class Recording:
    """What an optimizer was given at each step, to give stock the same.

    For runs in low precision: there the last bit of a weight can round to another activation, and
    two runs drift apart although both are right.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.start = [leaf(p) for p in self.params]
        self.steps: list[tuple[list[Tensor | None], list[dict[str, Any]]]] = []
        # After the step, as a closure may make the gradients.
        optimizer.register_step_post_hook(self._record)

    @property
    def params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _record(self, *_: Any) -> None:
        grads = [None if p.grad is None else p.grad.clone() for p in self.params]
        groups = self.optimizer.param_groups
        self.steps.append((grads, [{k: v for k, v in g.items() if k != "params"} for g in groups]))

    def assert_stock_agrees(self, build: Build) -> None:
        """Stock makes the same weights of the same gradients and options.

        Where a penalty nearly cancels with a gradient, what is left is rounding errors, which the
        adaptive rules blow up to full-sized steps: a weight may be off by what stock makes of
        inputs that are two roundings away.
        """
        exact = self._trained(build)
        rounding = 2 * torch.finfo(torch.float32).eps
        moved = self._trained(build, scale=1 - rounding, grad_scale=1 + rounding)
        for i, (param, expected, other) in enumerate(zip(self.params, exact, moved, strict=True)):
            near = (param.double() - expected).abs() <= 2 * (other - expected).abs()
            compared = torch.where(near, expected.to(param.dtype), param)
            assert_near(compared, expected, f"parameter {i}")

    @torch.no_grad()
    def _trained(self, build: Build, scale: float = 1.0, grad_scale: float = 1.0) -> list[Tensor]:
        """The weights that stock makes in float64."""
        params = [leaf(p.double() * scale) for p in self.start]
        left = iter(params)
        groups = [[next(left) for _ in group["params"]] for group in self.optimizer.param_groups]
        stock = build([{"params": members} for members in groups])
        for grads, options in self.steps:
            for group, now in zip(stock.param_groups, options, strict=True):
                group.update(now)
            for param, grad in zip(params, grads, strict=True):
                param.grad = None if grad is None else grad.double() * grad_scale
            stock.step()
        return params
