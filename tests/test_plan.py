"""csrc/plan, without Python: what tests/native/plan.cpp finds of records, overlaps and work."""

from __future__ import annotations

import pytest
from conftest import compiled


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("native"), "plan", "-O1")


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
