"""Training loops with one optimizer and one scaler."""

from __future__ import annotations

import math

import pytest
import torch
from cases import assert_trained_alike
from torch import nn

from amp import LIMIT, MOST_DIFFERENT, WAYS, Run, assert_alike, every_case, plain


def poisoned(batches, at):
    """An infinite target, and from it infinite gradients and NaN, in some of the batches."""
    return [
        [inputs, torch.full_like(targets, math.inf)] if i in at else [inputs, targets]
        for i, (inputs, targets) in enumerate(batches)
    ]


def accumulating(run, batches):
    """Over three batches; if one overflows, none of them counts."""
    for at, batch in enumerate(batches):
        run.backward(run.loss(batch) / 3)
        if at % 3 == 2:
            run.step()
            run.opt.zero_grad()


def zeroing_in_place(run, batches):
    for batch in batches:
        run.opt.zero_grad(set_to_none=False)
        run.backward(run.loss(batch))
        run.step()


def several_losses(run, batches):
    """Scaled together, through one graph."""
    for inputs, targets in batches:
        run.opt.zero_grad()
        outputs = run.model(inputs)
        losses = [(outputs - targets).square().mean(), outputs.abs().mean()]
        for loss in run.scaler.scale(losses):
            loss.backward(retain_graph=True)
        run.step()


def parts_without_gradients(run, batches):
    """The last layer takes no part in every other step, nor in the first."""
    for at, (inputs, targets) in enumerate(batches):
        run.opt.zero_grad()
        outputs = run.model(inputs) if at % 2 else run.model[0](inputs)[:, :2]
        run.backward((outputs - targets).square().mean())
        run.step()


def gradient_penalty(run, batches):
    """Through the graph of scaled gradients."""
    for batch in batches:
        run.opt.zero_grad()
        loss = run.loss(batch)
        scaled = torch.autograd.grad(run.scaler.scale(loss), run.params, create_graph=True)
        norms = [(grad / run.scaler.get_scale()).square().sum() for grad in scaled]
        run.backward(loss + sum(norms))
        run.step()


def scheduled(run, batches):
    """The schedule moves only if the step was taken."""
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        run.opt, 0.03, 12, cycle_momentum="lr_decay" not in run.opt.defaults
    )
    for batch in batches:
        before = run.scaler.get_scale()
        plain(run, [batch])
        if run.scaler.get_scale() >= before:
            schedule.step()
        run.log.append(schedule.get_last_lr())


def scales_by_hand(run, batches):
    for at, batch in enumerate(batches):
        plain(run, [batch])
        if at in (1, 4):
            run.scaler.update(2.0 ** (at + 5))


def checkpoints(run, batches):
    for at, batch in enumerate(batches):
        if at in (1, 3, 6):
            run.reload()
        plain(run, [batch])


def switching(run, batches):
    """amp_fused on and off; stock has no such attribute, and does not mind."""
    for at, batch in enumerate(batches):
        if at in (0, 2, 3, 5, 8):
            run.opt.amp_fused = not getattr(run.opt, "amp_fused", False)
        plain(run, [batch])


def disabled(run, batches):
    run.scaler = torch.amp.GradScaler("cpu", enabled=False)
    plain(run, batches)


# Each with the batches that overflow.
FLOWS = {
    "plain": (plain, []),
    "overflow at the first step": (plain, [0]),
    "overflow in the middle": (plain, [4]),
    "repeated overflow": (plain, [0, 1, 3, 4, 5, 6]),
    "accumulating": (accumulating, []),
    "accumulating, overflow in one of three": (accumulating, [1, 8]),
    "zeroing in place": (zeroing_in_place, [1, 2]),
    "several losses": (several_losses, [3]),
    "parts without gradients": (parts_without_gradients, [0, 1, 4]),
    "gradient penalty": (gradient_penalty, [2]),
    "scheduled": (scheduled, [0, 5]),
    "scales by hand": (scales_by_hand, [3]),
    "checkpoints": (checkpoints, [0, 5]),
    "switching": (switching, [0, 3, 4]),
    "disabled": (disabled, []),
}


@every_case
@pytest.mark.parametrize(
    ("flow", "way"),
    [
        (flow, way)
        for flow, (loop, _) in FLOWS.items()
        for way in (WAYS if loop is plain else MOST_DIFFERENT)
    ],
)
def test_flows(case, way, flow, model, batches, backend):
    loop, overflows = FLOWS[flow]
    clip, options = WAYS[way]
    clips = clip or "max_grad_norm" in options
    ours = Run(case.ours, model, clip, **options)
    stock = Run(case.stock, model, nn.utils.clip_grad_norm_ if clips else None)
    for run in (ours, stock):
        loop(run, poisoned(batches, overflows))
    assert_alike(ours, stock)


@every_case
@pytest.mark.parametrize("way", ["amp_fused", "max_grad_norm, amp_fused"])
def test_unscaling_by_any_scale_is_exact(case, way, model, batches, backend):
    """torch unscales by a float32 reciprocal; here the result is that of no scaling at all."""
    _, options = WAYS[way]
    ours, stock = Run(case.ours, model, **options), Run(case.stock, model)
    ours.scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_factor=1.7)
    ours.scaler.set_growth_interval(2)
    plain(ours, batches)
    for batch in batches:
        stock.opt.zero_grad()
        stock.loss(batch).backward()
        if "max_grad_norm" in options:
            nn.utils.clip_grad_norm_(stock.params, LIMIT)
        stock.opt.step()
    assert_trained_alike(ours.opt, ours.params, stock.opt, stock.params)
