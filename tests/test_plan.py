"""csrc/plan, without Python: what tests/native/plan.cpp finds of records, overlaps and work."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import skip_or_fail


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        skip_or_fail("no g++")
    target = tmp_path_factory.mktemp("native") / "plan.so"
    source = Path(__file__).parent / "native" / "plan.cpp"
    done = subprocess.run(
        [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", str(source), "-o", str(target)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(target))


@pytest.mark.parametrize(
    "what",
    [
        "roles",
        "verification",
        "gradients",
        "completeness",
        "overlaps",
        "steps",
        "second_scalars",
        "counts_that_cannot_go_on",
        "order",
    ],
)
def test_the_plan(library, what):
    line = getattr(library, what)()
    assert line == 0, f"tests/native/plan.cpp, line {line}"
