"""Other compilers, and other GPUs."""

from __future__ import annotations

import nvrtc
import pytest
from conftest import stand_in
from test_kernels import params_of

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
