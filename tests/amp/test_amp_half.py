"""Half precision: autocast, and half parameters."""

from __future__ import annotations

import pytest
import torch
from cases import assert_near, snapshot
from torch import nn

from amp import MOST_DIFFERENT, WAYS, Run, assert_alike, every_case, plain


@every_case
@pytest.mark.parametrize("way", MOST_DIFFERENT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(case, way, dtype, model, backend):
    """The scale is so large that float16 overflows, until it has fallen, and again once it has
    grown."""
    clip, options = WAYS[way]
    clips = clip or "max_grad_norm" in options
    ours = Run(case.ours, model.float(), clip, **options)
    stock = Run(case.stock, model.float(), nn.utils.clip_grad_norm_ if clips else None)
    scales = []
    for run in (ours, stock):
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=2)
    for _ in range(13):
        batch = [torch.randn(5, 4), 3 + torch.randn(5, 2)]
        for run in (ours, stock):
            run.opt.zero_grad()
            with torch.autocast("cpu", dtype):
                outputs = run.model(batch[0])
            run.backward((outputs - batch[1]).square().mean())
            run.step()
        for p, q in zip(ours.params, stock.params, strict=True):
            assert_near(p, q)
            with torch.no_grad():
                p.copy_(q)  # rounded to another float16, it would give another gradient
        scales.append(ours.scaler.get_scale())
    assert_alike(ours, stock)
    grown = [b > a for a, b in zip(scales, scales[1:], strict=False)]
    assert True in grown and (False in grown or dtype == torch.bfloat16)


@every_case
def test_half_parameters(case, model, backend):
    """torch's error, and nothing has changed; amp_fused trains them as without a scaler."""
    batches = [[torch.randn(5, 4).half(), 3 + torch.randn(5, 2).half()] for _ in range(4)]
    run = Run(case.ours, model.half())
    run.backward(run.loss(batches[0]))
    before = snapshot(run.opt)
    with pytest.raises(ValueError, match="unscale FP16 gradients"):
        run.step()
    assert snapshot(run.opt) == before
    runs = [Run(case.ours, model, amp_fused=True) for _ in range(2)]
    runs[1].scaler = torch.amp.GradScaler("cpu", enabled=False)
    for run in runs:
        plain(run, batches)
    for p, q in zip(runs[0].params, runs[1].params, strict=True):
        assert_near(p, q)
