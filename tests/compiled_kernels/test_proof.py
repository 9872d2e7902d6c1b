"""Compiled code proves itself before its first use."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from conftest import SEED
from test_kernels import params_of, running

import fusedopt
from compiled_kernels.comparison import F32, ORDERS, steps


def one_step(make: Any, module: Any) -> Any:
    torch.manual_seed(SEED)
    with running(module):
        params = params_of((5, 4160), F32)
        return steps(make(params, module is not fusedopt.backend.native), params, 1)


@pytest.mark.parametrize("name", ORDERS)
def test_compiled_code_proves_itself(name, unproven):
    """On every path of access that the module tries, with nothing touched between its tensors."""
    with warnings.catch_warnings(), unproven.running():
        warnings.simplefilter("error")
        one_step(ORDERS[name], unproven.module)
    assert unproven.launcher.launches > len(unproven.launcher.kernels)


def test_wrong_code_does_not_prove_itself(unproven):
    """It is not used, and the step is right all the same."""
    unproven.edit = lambda text: text.replace("sqrt.rn.f32", "abs.f32")
    with pytest.warns(RuntimeWarning, match="fusedopt_AdamUpdate_float_false is not used"):
        with unproven.running():
            ended = one_step(ORDERS["Adam"], unproven.module)
    launches = unproven.launcher.launches
    with unproven.running():
        one_step(ORDERS["Adam"], unproven.module)
    assert unproven.launcher.launches == launches
    expected = one_step(ORDERS["Adam"], fusedopt.backend.native)
    for a, b in zip(
        ended.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True
    ):
        torch.testing.assert_close(a, b)
