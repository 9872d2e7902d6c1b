"""What the scaler does not allow."""

from __future__ import annotations

import pytest
import torch
from cases import NAMES, Case, those_with

from amp import Run, assert_alike, plain


def step_twice(run):
    run.scaler.step(run.opt)
    run.scaler.step(run.opt)


def unscale_twice(run):
    run.scaler.unscale_(run.opt)
    run.scaler.unscale_(run.opt)


def unscale_after_step(run):
    run.scaler.step(run.opt)
    run.scaler.unscale_(run.opt)


def step_without_gradients(run):
    run.opt.zero_grad()
    run.scaler.step(run.opt)


def update_without_gradients(run):
    step_without_gradients(run)
    run.scaler.update()


def step_before_scale(run):
    run.scaler = torch.amp.GradScaler("cpu")
    run.scaler.step(run.opt)


MISUSES = {
    "closure": lambda run: run.scaler.step(run.opt, closure=lambda: None),
    "update before step": lambda run: run.scaler.update(),
    "step twice": step_twice,
    "unscale_ twice": unscale_twice,
    "unscale_ after step": unscale_after_step,
    "step without gradients": step_without_gradients,
    "update without gradients": update_without_gradients,
    "step before scale": step_before_scale,
}


@pytest.mark.parametrize(
    ("name", "fused"),
    # torch has no fused RMSprop to compare with.
    [
        (name, fused)
        for name in NAMES
        for fused in (False, True)
        if not fused or name in those_with("fused")
    ],
)
@pytest.mark.parametrize("misuse", MISUSES.values(), ids=list(MISUSES))
def test_misuse(misuse, name, fused, model, batches):
    """The same error as with stock, or none, and training goes on as there."""
    case, runs, raised = Case(name, {"lr": 0.01}), [], []
    for build, options in (
        (case.ours, {"amp_fused": fused}),
        (case.stock, {"foreach": None, "fused": True} if fused else {}),
    ):
        run = Run(build, model, **options)
        plain(run, batches[:2])
        run.opt.zero_grad()
        run.backward(run.loss(batches[2]))
        try:
            misuse(run)
            raised.append(None)
        except (RuntimeError, AssertionError) as error:
            raised.append((type(error), str(error)))
        run.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        plain(run, batches[3:])
        runs.append(run)
    assert raised[0] == raised[1]
    assert_alike(*runs)
