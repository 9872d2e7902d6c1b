"""The backend, as it was before each test."""

from __future__ import annotations

import pytest
from conftest import require_native

import fusedopt
from hostile import NATIVE


@pytest.fixture(autouse=True)
def keep_backend():
    require_native()
    yield
    fusedopt.backend.native = NATIVE
