"""What the optimizer keeps of tensors and models between steps: nothing that autograd, the garbage
collector or a swap would notice."""

from __future__ import annotations

import pytest
import torch

OPTIONS = {
    "plain": {},
    "average": {"ema": 0.9},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
    "clipped": {"max_grad_norm": 10.0},
}
with_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def train(opt, loss, steps: int = 2) -> None:
    for _ in range(steps):
        opt.zero_grad()
        loss().backward()
        opt.step()
