"""Fixtures: the backend that a test runs on, and fresh random numbers whose seed is shown."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fusedopt

SEED = int(os.environ.get("FUSEDOPT_TEST_SEED", random.SystemRandom().randrange(2**31)))


def pytest_report_header() -> str:
    return f"fusedopt: {fusedopt.backend.status()}; random inputs: FUSEDOPT_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(SEED)
    random.seed(SEED)


@pytest.fixture(autouse=True)
def step_threads() -> Iterator[Callable[[int], None]]:
    """Native steps run on several threads, or as many as a test asks for, and all else on one:
    on a busy machine, torch's operators would spend the time waiting for each other."""
    count, before = 3, torch.get_num_threads()

    def choose(threads: int) -> None:
        nonlocal count
        count = threads

    def pre(opt: torch.optim.Optimizer, *_: object) -> None:
        native = fusedopt.backend.native and type(opt).__module__.startswith("fusedopt")
        torch.set_num_threads(count if native else 1)

    torch.set_num_threads(1)
    hooks = [
        register_optimizer_step_pre_hook(pre),
        register_optimizer_step_post_hook(lambda *_: torch.set_num_threads(1)),
    ]
    yield choose
    for hook in hooks:
        hook.remove()
    torch.set_num_threads(before)


def require_native() -> None:
    if fusedopt.backend.native is None:
        if os.environ.get("FUSEDOPT_REQUIRE_NATIVE", "0") not in ("", "0"):
            pytest.fail(f"FUSEDOPT_REQUIRE_NATIVE is set, but: {fusedopt.backend.error}")
        pytest.skip("no native module")


@pytest.fixture(params=["python", "native"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test on both backends, within one process."""
    if request.param == "native":
        require_native()
    else:
        monkeypatch.setattr(fusedopt.backend, "native", None)
    return request.param


@pytest.fixture
def native() -> None:
    """For tests of what only the native module promises."""
    require_native()
