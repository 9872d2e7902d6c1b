"""Kernels as NVRTC compiles them, run by the machine in ptx/."""

from __future__ import annotations

import nvrtc
import pytest
import seam
from conftest import stand_in
from ptx.launch import Launcher

import compiled_kernels


@pytest.fixture
def compiler() -> nvrtc.Nvrtc:
    return compiled_kernels.require_compiler()


@pytest.fixture
def compiled(kernels, compiler) -> compiled_kernels.CompiledKernels:
    driver, launcher = stand_in(), Launcher(races=True)
    return compiled_kernels.CompiledKernels(kernels, driver, compiler, launcher)


@pytest.fixture
def unproven(compiled, monkeypatch, tmp_path):
    """Kernels that are compiled, and tried out, when they are needed."""
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path))  # where the verdicts are left
    monkeypatch.setenv("FUSEDOPT_SELF_TEST", "always")
    seam.use_driver(compiled.module, compiled.driver.path)
    yield compiled
    monkeypatch.undo()
    seam.use_driver(compiled.module, compiled.driver.path)
