"""Any size, address, dtype and way of storing."""

from __future__ import annotations

import contextlib
import random

import pytest
import stored
import torch
from cases import RICHEST, RICHEST_OF, TABLES, Case
from conftest import SEED
from test_kernels import BLOCK, Memory, params_of, running, values_of

import fusedopt
from compiled_kernels.comparison import BF16, F16, F32, F64, compare, is_capturable, steps

SIZES = (1, 7, 66, BLOCK + 5)

# Elements -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", RICHEST, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_tails_of_several_tensors(case, dtype, compiled):
    def run(_):
        params = params_of(SIZES, dtype, special=True)
        return steps(case.ours(params), params)

    compare(compiled, run)


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_misalignment(dtype, compiled):
    """Of parameter and gradient, by themselves and together; nothing between tensors is touched."""
    shifts = [(a, b) for a in (0, 1, 2, 4, 8) for b in (0, 1, 4)]

    def run(_):
        sizes = [random.choice([3, 8, 67, 260]) for _ in shifts]
        sizes[random.randrange(len(sizes))] = BLOCK + 3
        memory = Memory(params_of(sizes, dtype), [a for a, _ in shifts])
        grads = Memory(params_of(sizes, dtype), [b for _, b in shifts])
        params = [view.detach().requires_grad_() for view in memory.views]
        opt = RICHEST_OF["Adam"].ours(params)
        for _ in range(2):
            for p, grad in zip(params, grads.views, strict=True):
                p.grad = grad.copy_(values_of(len(p), dtype))
            opt.step()
        memory.check()
        grads.check()
        return opt

    compare(compiled, run)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize("case", [RICHEST_OF["Adam"], Case("SGD", {"lr": 0.1})], ids=str)
def test_mixtures_of_dtypes(case, compiled):
    def run(_):
        params = []
        for n in (5, 12, 300):
            for dtype in (F32, BF16, F16):
                params += params_of([n], dtype)
                params[-1].grad_dtype = None
        opt = case.ours(params)
        for _ in range(2):
            for p in params:
                p.grad = values_of(len(p), random.choice([F32, BF16, F16]))
            opt.step()
        return opt

    compare(compiled, run)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", [name for name in TABLES if is_capturable(name)])
def test_what_the_kernel_counts_and_prepares(name, dtype, compiled):
    """Step counts and options on the device; several blocks of a tensor move its count once. In
    float64 a power is that of the device: it may differ in its last bit."""
    ends = []

    def run(on_kernels):
        params = params_of((0, 5, 2 * BLOCK + 1), dtype)
        options = {**RICHEST_OF[name].options, "lr": torch.tensor(0.01)}
        opt = getattr(fusedopt, name)(params, **options, capturable=on_kernels)
        ends.append(params)
        return steps(opt, params, 3)

    if dtype is F32:
        compare(compiled, run)
        return
    torch.manual_seed(SEED)
    with running(fusedopt.backend.native):
        run(False)
    for runs in (contextlib.nullcontext(), compiled.running()):
        torch.manual_seed(SEED)
        with running(compiled.module), runs:
            run(True)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-14, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("capturable", [False, True])
def test_as_many_tensors_as_several_tables_hold(capturable, compiled):
    def run(on_kernels):
        params = params_of([random.choice([1, 2, 5]) for _ in range(700)], F32)
        more = {"capturable": capturable and on_kernels}
        return steps(fusedopt.Adam(params, lr=0.1, **more), params, 1)

    compare(compiled, run)


# Stored ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "dtype"),
    [(way, dtypes[0]) for way, (_, dtypes) in stored.WAYS.items()],
    ids=lambda v: str(v),
)
def test_values_that_are_stored_otherwise(way, dtype, compiled):
    # Several blocks, which take long, of one way for each kind of thing that is stored.
    sizes = (5, 4097, BLOCK + 67) if way in dict(stored.KINDS) else (5, 4096, 67)

    def run(_):
        params = params_of(sizes, dtype)
        opt = fusedopt.Adam(params, lr=0.1, weight_decay=0.1, **stored.WAYS[way][0])
        return steps(opt, params)

    compare(compiled, run)
    # A float32 master is what would spill with four blocks on a multiprocessor.
    if way in dict(stored.KINDS):
        for kernel in compiled.launcher.kernels:
            assert compiled.compiler.cubin(compiled.module, kernel, 80).local_bytes == 0


@pytest.mark.parametrize("name", [name for name in ("Adam", "NAdam", "RAdam") if name in TABLES])
def test_stored_and_counted_by_the_kernel(name, compiled):
    def run(on_kernels):
        params = params_of((5, BLOCK + 67), BF16)
        more = {"rounding": "stochastic", "state_dtype": "8bit", "capturable": on_kernels}
        return steps(getattr(fusedopt, name)(params, lr=0.1, **more), params)

    compare(compiled, run)


CODES = {
    "SGD": {"momentum": 0.5},
    "Adagrad": {},
}  # whose state after one step is the gradient, or its square


@pytest.mark.parametrize("name", CODES)
def test_codes_that_are_a_close_call(name, compiled):
    """The kernels' roots are rough, as far off as they may be: codes are those of exact roots."""

    def run(_):
        (param,) = params_of([8192 + 3], F32)
        count = param.numel()
        code, near = torch.randint(1, 127, (count,)), torch.randint(-60, 60, (count,)) * 2.0**-23
        if name == "SGD":  # between two codes, where it is rounded
            shares = ((code + 0.5) / 127) ** 2
        else:  # where adding noise comes to a code, and where the noise begins to count
            carry = 1 - stored.noise(0x66757365646F7074, 1, count) / 65536
            bounds = torch.stack(
                [carry, carry, torch.zeros(count), *[torch.full((count,), 2.0**-12)] * 2]
            )
            bounds[-1] *= -1
            shares = (
                (2 * code + bounds[torch.randint(5, (count,)), torch.arange(count)]) / 255
            ) ** 2
        shares[::64] = 1.0
        scales = torch.rand(-(-count // 64)).repeat_interleave(64)[:count] + 1e-6
        param.grad = shares * (1 + near) * scales * torch.randn(count).sign()
        opt = getattr(fusedopt, name)([param], lr=0.0, state_dtype="8bit", **CODES[name])
        opt.step()
        return opt

    compare(compiled, run)
