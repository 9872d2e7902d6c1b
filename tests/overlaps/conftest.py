"""The sizes of tensors that overlap."""

from __future__ import annotations

import random

import pytest


@pytest.fixture
def size() -> int:
    """So few that one thread takes them, or so many that threads share them."""
    return random.choice([6, 20_000])
