"""These tests need a GPU, and the kernels."""

from __future__ import annotations

import os

import pytest
import torch

import fusedopt
from on_gpu import DEVICE


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if not fusedopt.backend.has_kernels(torch.device(DEVICE, 0)):
        text = f"no kernels for this GPU: {fusedopt.backend.status()}"
        if os.environ.get("FUSEDOPT_REQUIRE_NATIVE", "0") not in ("", "0"):
            pytest.fail(text)
        pytest.skip(text)
