"""Averages of parameters without a gradient."""

from __future__ import annotations

import contextlib

import torch
from cases import bits, gradient_like, richest
from torch import nn

from averages import make_model


@richest
def test_averages_of_frozen_parameters(case, backend):
    """A parameter without a gradient is left alone, with its state. Until its first gradient its
    average is the parameter, and so it begins wherever that is."""
    late, frozen = (nn.Parameter(torch.randn(7)) for _ in range(2))
    opt = case.ours([late, frozen], ema=0.9)
    for _ in range(2):
        frozen.grad = gradient_like(frozen.detach())
        opt.step()
    first, average = opt.ema_parameters()
    assert first is late
    kept = bits(average)
    frozen.grad = None
    for step in range(3):
        before = late.detach().clone()
        late.grad = gradient_like(before)
        opt.step()
        if step == 0:
            expected = before.double() + (1 - 0.9) * (late.detach().double() - before.double())
            torch.testing.assert_close(next(opt.ema_parameters()).double(), expected)
    assert bits(opt.state[frozen]["ema"]) == kept


@torch.no_grad()
def average_the_idle(optimizer, *_):
    """As docs/storage.md has it."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            average = optimizer.state.get(param, {}).get("ema")
            if param.grad is None and average is not None:
                average.lerp_(param.to(average.dtype), 1 - group["ema"])


@richest
def test_a_hook_that_averages_them_too(case, backend):
    """With it the averages are those that torch's AveragedModel keeps."""
    model = make_model()
    opt = case.ours(model.parameters(), ema=0.75)
    opt.register_step_post_hook(average_the_idle)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.75)
    )
    averaged.update_parameters(model)  # the first copies
    for step in range(6):
        for i, p in enumerate(model.parameters()):
            p.grad = None if i in (0, 2) and step > 2 else gradient_like(p.detach())
        opt.step()
        averaged.update_parameters(model)
    for ours, theirs in zip(opt.ema_parameters(), averaged.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach())
    with contextlib.ExitStack() as stack:
        stack.enter_context(opt.swap_ema())
        for p, q in zip(model.parameters(), averaged.module.parameters(), strict=True):
            torch.testing.assert_close(p, q)
