"""The native module's instruction sets and the GPU's kernels give the same bits."""

from __future__ import annotations

import json

import pytest
import test_kernels
import torch
from conftest import SEED, require_kernels, require_native
from test_native import script

# What is compared, of which each process has a digest or a value for each case.
FOUND = """
import json, test_kernels, test_native, test_same_bits, test_subnormals
print(json.dumps({
    "special values": test_native.digests(),
    "stored and clipped": test_same_bits.digests(),
    "subnormals": test_subnormals.digests(False),
    "subnormals, flushed": test_subnormals.digests(True),
    "norms": test_kernels.norms(),
}))
"""
LEVELS = {"DEFAULT": 1, "AVX2": 2}.get(torch.backends.cpu.get_cpu_capability(), 3)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, dict[str, str]]]:
    """By each instruction set of this processor, in a process of its own."""
    require_native()
    return {
        isa: json.loads(
            script(
                FOUND,
                FUSEDOPT_CPU_ISA=isa,
                FUSEDOPT_TEST_SEED=str(SEED),
                OMP_NUM_THREADS="1",
            )
        )
        for isa in ("baseline", "avx2", "avx512")[:LEVELS]
    }


@pytest.mark.parametrize(
    "what", ["special values", "stored and clipped", "subnormals", "subnormals, flushed", "norms"]
)
def test_instruction_sets_agree(what, found):
    expected = found["baseline"][what]
    assert expected
    for isa, others in found.items():
        assert not [key for key in expected if others[what][key] != expected[key]], isa


def test_the_mode_of_the_processor_changes_no_bit(found):
    """What is stored in float16 comes back as it was, also where the processor flushes."""
    assert found["baseline"]["subnormals, flushed"] == found["baseline"]["subnormals"]


def test_the_kernels_measure_the_same_norms(found):
    with test_kernels.running(require_kernels()):
        assert test_kernels.norms() == found["baseline"]["norms"]
