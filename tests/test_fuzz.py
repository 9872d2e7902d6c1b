"""Random programs, and random single steps, in lockstep with torch's for-loop.

``make fuzz N=5000`` runs 5,000 programs and a million single steps; without it a test run does 500
and 1,000. Inputs are fresh in every run: ``FUSEDOPT_TEST_SEED`` in the header repeats one, and a
failing program is printed in its shortest form, with the line that reproduces it. What the
programs are made of is in ``fuzz/``.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from cases import SCALARS, bits
from conftest import SEED, require_native
from fuzz import kept
from fuzz.choices import NATIVE, choose_backend, random_case, random_storage, random_values
from fuzz.gradient_moves import GradientMoves
from fuzz.lockstep import Lockstep
from fuzz.setting_moves import SettingMoves
from fuzz.tensor_moves import TensorMoves
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

import fusedopt

ASKED = os.environ.get("FUSEDOPT_FUZZ")
PROGRAMS = int(ASKED or 500)
SINGLE_STEPS = 200 * PROGRAMS if ASKED else 1000


@pytest.fixture(autouse=True)
def keep_backend():
    yield
    fusedopt.backend.native = NATIVE


@seed(SEED)
class Programs(TensorMoves, GradientMoves, SettingMoves):
    pass


def test_programs():
    require_native()
    run_state_machine_as_test(
        Programs,
        settings=settings(
            max_examples=PROGRAMS,
            stateful_step_count=10,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


# Single steps ---------------------------------------------------------------------------------


def single_step(number: int) -> None:
    """One step, from nothing or from a state that nobody has trained."""
    rng = random.Random(number)
    choose_backend(rng)
    run = Lockstep(rng, random_case(rng), random_storage(rng))
    if rng.random() < 0.3:
        run.ours.max_grad_norm = rng.choice((0.1, 1.0, 100.0))
    if rng.random() < 0.7:
        for p in run.params:
            p.grad = torch.ones_like(p)
        run.ours.step()
        for p in run.params:
            for key, value in run.ours.state.get(p, {}).items():
                if key == "mu_product":
                    value.fill_(rng.choice((0.9, 0.3, 1e-3, 1e-20, 0.0)))
                elif key in SCALARS:
                    value.fill_(rng.choice((0, 1, 2, 30, 1000, 10**6)))
                elif key in run.table.slots and not kept.is_code(value):
                    fresh = random_values(rng, p.shape, value.dtype)
                    if key in run.table.unsigned:
                        parts = torch.view_as_real(fresh) if fresh.is_complex() else fresh
                        parts.copy_(parts.abs() + 1)
                    value.copy_(fresh)
    run.set_gradients(rng)
    run.step()
    for memory, before in run.around:
        assert bits(memory) == before, "memory beside a parameter was written"


def test_single_steps():
    require_native()
    for number in range(SEED, SEED + SINGLE_STEPS):
        try:
            single_step(number)
        except Exception as error:
            raise AssertionError(f"single_step({number})") from error
