"""Several optimizers with one scaler."""

from __future__ import annotations

import math

import pytest
import torch
from cases import assert_trained_alike
from torch import nn

from amp import LIMIT, Run, every_case, new_model


def shared_losses(a, b, scaler, batches, spoil):
    """Two losses, of which one reaches both models. Only one optimizer is unscaled by hand."""
    for at, (inputs, targets) in enumerate(batches):
        for run in (a, b):
            run.opt.zero_grad()
        both = 2 * a.model(inputs) + 3 * b.model(inputs)
        scaler.scale((both - targets).square().mean()).backward(retain_graph=True)
        scaler.scale((b.model(inputs) + targets).square().mean()).backward()
        spoil(at)
        scaler.unscale_(a.opt)
        nn.utils.clip_grad_norm_(a.params, LIMIT)
        scaler.step(a.opt)
        scaler.step(b.opt)
        scaler.update()


def adversaries(a, b, scaler, batches, spoil):
    """The second loss goes through the model that has just been updated."""
    for at, (inputs, targets) in enumerate(batches):
        a.opt.zero_grad()
        made = b.model(inputs)
        scaler.scale((a.model(inputs) - made.detach()).square().mean()).backward()
        spoil(at, a)
        scaler.step(a.opt)
        b.opt.zero_grad()
        scaler.scale((made - a.model(inputs) * targets).square().mean()).backward()
        spoil(at, b)
        scaler.step(b.opt)
        scaler.update()


@every_case
@pytest.mark.parametrize("loop", [shared_losses, adversaries])
@pytest.mark.parametrize("fused", [(False, False), (True, False), (True, True)], ids=str)
def test_two_optimizers_with_one_scaler(case, loop, fused, model, batches, backend):
    """A step is skipped for the optimizer whose gradients overflow, and for no other."""
    other, results = new_model(), []
    for build, options in (
        (case.ours, [{"amp_fused": value} for value in fused]),
        (case.stock, [{}, {}]),
    ):
        runs = [Run(build, m, **more) for m, more in zip((model, other), options, strict=True)]
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)

        def spoil(at, run=None, runs=runs):
            for bad in (runs[i] for i in OVERFLOWS.get(at, ())):
                if run in (None, bad):
                    bad.params[0].grad[0, 0] = math.inf

        loop(*runs, scaler, batches, spoil)
        results.append((runs, scaler.state_dict()))
    (ours, scale), (stock, expected) = results
    assert scale == expected
    for run, exact in zip(ours, stock, strict=True):
        assert_trained_alike(run.opt, run.params, exact.opt, exact.params)


# By step, whose gradients overflow.
OVERFLOWS = {0: [1], 2: [0], 3: [0, 1], 6: [1]}
