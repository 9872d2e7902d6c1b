"""Every kernel of every rule, and the norm."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import seam
import torch
from cases import CASES, TABLES, Case
from ptx.tables import rule_of
from test_kernels import BLOCK, measured, params_of, running, set_grads, values_of

import fusedopt
from compiled_kernels.comparison import BF16, F16, F32, F64, compare, steps

# Each kernel ----------------------------------------------------------------------------------


RULES = sorted({seam.rule_of(getattr(fusedopt, name)).name for name in TABLES})


def forms_of(case: Case) -> list[tuple[torch.dtype, dict[str, Any]]]:
    coded = all(TABLES[case.name].slots[key].coded(case.options) for key in slots_of(case))
    way = {"master_weights": "split", "state_dtype": "8bit" if coded else F32}
    return [(F32, {}), (F64, {}), (BF16, way if slots_of(case) else {"master_weights": "split"})]


def slots_of(case: Case) -> tuple[str, ...]:
    return TABLES[case.name].slots_of(case.options)


@pytest.mark.parametrize("rule", RULES)
def test_every_kernel_of_a_rule(rule, compiled):
    """As its update is prepared by the host, of one tensor that has a tail. Of those for stored
    values, of which there is one for each way to store them, one."""
    for case in CASES:
        if seam.rule_of(getattr(fusedopt, case.name)).name != rule:
            continue
        for dtype, options in forms_of(case):
            params = (4096 + 3,) if options else (67,)

            def run(_, case=case, dtype=dtype, options=options, params=params):
                tensors = params_of(params, dtype)
                return steps(case.ours(tensors, **options), tensors, 1)

            compare(compiled, run)
    expected = {update_of(name) for name in compiled.module.kernels() if rule_of(name) == rule}
    assert expected == {*map(update_of, compiled.launcher.kernels)}


def update_of(kernel: str) -> str:
    """Without the way in which values are stored."""
    return re.sub("_stored_.*", "_stored", kernel)


# The norm -------------------------------------------------------------------------------------


NORMS = {
    "one thread has all": [3],
    "a row and its end": [2048 + 5],
    "two chunks": [65536 + 2049, 7],
    "many chunks": [1] * 300,
}


@pytest.mark.parametrize("sizes", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_norm(sizes, dtype, compiled):
    grads = [values_of(n, dtype) for n in sizes]
    grads.append(values_of(70, dtype)[1:])
    with running(fusedopt.backend.native):
        expected = measured(grads, 1.0)
    with running(compiled.module), compiled.running():
        found = measured(grads, 1.0)
    assert found == expected
    assert {*compiled.launcher.kernels} == {"fusedopt_grad_norm"}


@pytest.mark.parametrize("scale", [1e-30, 1e30, math.nan, math.inf])
def test_norm_that_leaves_the_range_of_float(scale, compiled):
    def run(_):
        params = params_of((3000, 70000), F32)
        opt = fusedopt.SGD(params, lr=0.1, max_grad_norm=0.5)
        for p in params:
            p.grad = values_of(len(p), F32) * scale
        opt.step()
        return opt

    compare(compiled, run)


def test_clipped_and_unscaled(compiled):
    def run(_):
        params = params_of((5, BLOCK + 7), F32)
        opt = fusedopt.Adam(params, lr=0.1, max_grad_norm=0.5)
        for _ in range(2):
            set_grads(params)
            opt.step()
        return opt

    compare(compiled, run)
