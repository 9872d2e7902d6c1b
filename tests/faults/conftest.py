"""Gradients, switched on after each test."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def grad_mode():
    """An interrupt in the middle of torch's own context managers leaves gradients switched off."""
    yield
    torch.set_grad_enabled(True)
