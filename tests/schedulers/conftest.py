"""A model and its batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


@pytest.fixture
def batches():
    """Of noise: the loss has plateaus from the start."""
    return [[torch.randn(5, n, dtype=torch.float64) for n in (4, 2)] for _ in range(12)]
