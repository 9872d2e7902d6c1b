"""The stand-in for the driver, as it is at first, and one whose kernels do nothing."""

from __future__ import annotations

import ctypes

import pytest
import seam
from conftest import stand_in

import fusedopt


@pytest.fixture
def driver(kernels, monkeypatch, tmp_path):
    """The stand-in as it is at first, with a cache of its own, under the module for kernels."""
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSEDOPT_SELF_TEST", raising=False)
    monkeypatch.setattr(fusedopt.backend, "native", kernels)
    stand_in().reset()
    seam.use_driver(kernels, stand_in().path)
    yield stand_in()
    monkeypatch.delenv("FUSEDOPT_SELF_TEST", raising=False)
    stand_in().reset()
    stand_in().run_with(kernels.RUN_ON_HOST)
    seam.use_driver(kernels, stand_in().path)


HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p
)


@pytest.fixture
def broken(driver, kernels):
    """A GPU whose kernels do nothing; what they are called with."""
    seen = []
    hook = HOOK(lambda name, *rest: seen.append(name.decode()) or 1)
    driver.run_with(ctypes.cast(hook, ctypes.c_void_p).value)
    yield seen
    driver.run_with(kernels.RUN_ON_HOST)
