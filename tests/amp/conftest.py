"""A model and its batches."""

from __future__ import annotations

import pytest
import torch

from amp import new_model


@pytest.fixture
def model():
    return new_model()


@pytest.fixture
def batches():
    return [[torch.randn(5, n, dtype=torch.float64) for n in (4, 2)] for _ in range(9)]
