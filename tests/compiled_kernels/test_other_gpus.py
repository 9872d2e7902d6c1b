"""Other compilers, other GPUs, and older drivers."""

from __future__ import annotations

import nvrtc
import pytest
import seam
from conftest import stand_in
from ptx.launch import Launcher
from test_kernels import BLOCK, params_of

import compiled_kernels
import fusedopt
from compiled_kernels.comparison import BF16, F16, F32, compare, steps


@pytest.mark.parametrize("gpu", [75, 80, 120])
@pytest.mark.parametrize("version", [(12, 1), (12, 8), (13, 0)], ids=lambda v: "{}.{}".format(*v))
def test_what_another_compiler_makes_for_another_gpu(version, gpu, kernels):
    """sm_75 has no instruction for bfloat16; each compiler has its own way with the rest."""
    compiled_kernels.require_compiler()
    found = [it for it in nvrtc.compilers() if it.version == version and gpu in it.architectures]
    if not found:
        pytest.skip("no such NVRTC, or none that knows this GPU")
    compiled = compiled_kernels.CompiledKernels(kernels, stand_in(), found[0], architecture=gpu)
    for dtype in (F32, BF16, F16):

        def plain(_, dtype=dtype):
            params = params_of((7, 66, 2051), dtype, special=True)
            return steps(fusedopt.Adam(params, lr=0.1, max_grad_norm=0.5), params)

        compare(compiled, plain)

    def otherwise(on_kernels):
        params = params_of((5, 4160), BF16)
        more = {"state_dtype": "8bit", "rounding": "stochastic", "capturable": on_kernels}
        return steps(fusedopt.Adam(params, lr=0.1, **more), params)

    compare(compiled, otherwise)


@pytest.fixture
def small_tables(kernels, compiler, monkeypatch, tmp_path):
    """As for a driver older than CUDA 12.1: 4,096 bytes of arguments."""
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path))
    stand_in().set(driver_version=12000)
    seam.use_driver(kernels, stand_in().path)
    yield compiled_kernels.CompiledKernels(
        kernels, stand_in(), compiler, Launcher(races=True), argument_bytes=4096
    )
    stand_in().reset()
    seam.use_driver(kernels, stand_in().path)


@pytest.mark.parametrize("capturable", [False, True], ids=["", "capturable"])
def test_tables_of_an_older_driver(capturable, small_tables):
    """Several for the norm, and several for the step."""
    begin = small_tables.module.num_launches()

    def run(on_kernels):
        params = params_of([*(n % 7 for n in range(200)), BLOCK + 70], F32)
        more = {"capturable": capturable and on_kernels}
        return steps(fusedopt.Adam(params, lr=0.1, max_grad_norm=0.5, **more), params)

    compare(small_tables, run)
    for kernel in ("fusedopt_AdamUpdate_float_false", "fusedopt_grad_norm"):
        (table,) = small_tables.code(kernel).functions[kernel].params.values()
        assert 4000 < table.size <= 4096
    launches = small_tables.module.num_launches() - begin
    assert launches > 2 * 2 * 2 * 2  # twice the norm and the step, twice, each of several tables
