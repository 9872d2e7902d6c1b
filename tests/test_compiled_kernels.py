"""The compiled code of the kernels, executed on a CPU: PTX as NVRTC makes it of the sources in the
module, with barriers, shared memory, shuffles, tickets, bounds and alignment. It gives the bits of
the CPU path. What is left for a GPU: from PTX to machine code, the order of memory, the driver.

``make kernels`` also runs all tests of the kernels in this way.
"""

from __future__ import annotations

import contextlib
import math
import random
import re
import warnings
from typing import Any

import compiled_kernels
import numpy as np
import nvrtc
import pytest
import seam
import stored
import torch
from cases import CASES, RICHEST, RICHEST_OF, TABLES, Case
from conftest import SEED, stand_in
from ptx.launch import Launcher
from ptx.memory import Fault
from ptx.parse import Unsupported
from ptx.tables import rule_of
from test_kernels import (
    BLOCK,
    Memory,
    measured,
    params_of,
    running,
    set_grads,
    values_of,
)

import fusedopt

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SIZES = (1, 7, 66, BLOCK + 5)


@pytest.fixture
def compiler() -> nvrtc.Nvrtc:
    return compiled_kernels.require_compiler()


@pytest.fixture
def compiled(kernels, compiler) -> compiled_kernels.CompiledKernels:
    driver, launcher = stand_in(), Launcher(races=True)
    return compiled_kernels.CompiledKernels(kernels, driver, compiler, launcher)


def compare(compiled: compiled_kernels.CompiledKernels, run: Any) -> None:
    """``run`` makes and steps an optimizer, and gets whether the kernels do it. It ends with the
    same bits as on the CPU path, and the compiled code has run. The kernels were loaded before:
    what a kernel proves before its first use, its body does."""
    number, before = random.randrange(2**31), compiled.launcher.launches
    ends = []
    for module, runs in (
        (fusedopt.backend.native, contextlib.nullcontext()),
        (compiled.module, contextlib.nullcontext()),
        (compiled.module, compiled.running()),
    ):
        torch.manual_seed(number)
        random.seed(number)
        with running(module), runs:
            ends.append(run(module is compiled.module))
    ends = ends[::2]
    stored.assert_same_outcome(ends[1], ends[0])
    if ends[0].grad_norm is not None:
        stored.assert_bits(ends[1].grad_norm, ends[0].grad_norm, "grad_norm")
    assert compiled.launcher.launches > before


def steps(opt: Any, params: Any, count: int = 2) -> Any:
    for at in range(count):
        set_grads(params, special=at == 1)
        opt.step()
        assert all((tickets == 0).all() for tickets in seam.tickets(opt))
    return opt


def is_capturable(name: str) -> bool:
    return "capturable" in seam.torch_options(getattr(fusedopt, name))


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
    """As its update is prepared by the host, of one tensor that has a tail."""
    for case in CASES:
        if seam.rule_of(getattr(fusedopt, case.name)).name != rule:
            continue
        for dtype, options in forms_of(case):
            params = (4096 + 3,) if options else (67,)

            def run(_, case=case, dtype=dtype, options=options, params=params):
                tensors = params_of(params, dtype)
                return steps(case.ours(tensors, **options), tensors, 1)

            compare(compiled, run)
    expected = {kernel for kernel in compiled.module.kernels() if rule_of(kernel) == rule}
    assert expected <= {*compiled.launcher.kernels}


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
    def run(_):
        params = params_of((5, 4096, 4097, BLOCK + 67), dtype)
        opt = fusedopt.Adam(params, lr=0.1, weight_decay=0.1, **stored.WAYS[way][0])
        return steps(opt, params)

    compare(compiled, run)


@pytest.mark.parametrize("name", [name for name in ("Adam", "NAdam", "RAdam") if name in TABLES])
def test_stored_and_counted_by_the_kernel(name, compiled):
    def run(on_kernels):
        params = params_of((5, 2 * BLOCK + 67), BF16)
        more = {"rounding": "stochastic", "state_dtype": "8bit", "capturable": on_kernels}
        return steps(getattr(fusedopt, name)(params, lr=0.1, **more), params)

    compare(compiled, run)


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


# Other compilers, other GPUs -------------------------------------------------------------------


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


# The order of threads -------------------------------------------------------------------------

ORDERS = {
    "Adam": lambda params, _: fusedopt.Adam(params, lr=0.1),
    "capturable": lambda params, on: fusedopt.Adam(params, lr=0.1, capturable=on),
    "clipped": lambda params, _: fusedopt.SGD(params, lr=0.1, max_grad_norm=0.5),
    "8bit": lambda params, _: fusedopt.SGD(params, lr=0.1, momentum=0.9, state_dtype="8bit"),
}


@pytest.mark.parametrize("name", ORDERS)
def test_any_order_of_threads(name, kernels, compiler):
    """Blocks, warps and threads go on at random, down to single accesses of memory."""
    launcher = Launcher(np.random.default_rng(SEED), races=True)
    compiled = compiled_kernels.CompiledKernels(kernels, stand_in(), compiler, launcher, fine=True)

    def run(on_kernels):
        sizes = {"8bit": (4100,), "capturable": (5, BLOCK + 70)}
        params = params_of(sizes.get(name, (5, 1000, 2080)), F32)
        return steps(ORDERS[name](params, on_kernels), params)

    compare(compiled, run)


# Before the first use -------------------------------------------------------------------------


@pytest.fixture
def unproven(compiled, monkeypatch, tmp_path):
    """Kernels that are compiled, and tried out, when they are needed."""
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path))  # where the verdicts are left
    monkeypatch.setenv("FUSEDOPT_SELF_TEST", "always")
    seam.use_driver(compiled.module, compiled.driver.path)
    yield compiled
    monkeypatch.undo()
    seam.use_driver(compiled.module, compiled.driver.path)


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


# Planted faults -------------------------------------------------------------------------------

BARRIER = re.compile(r"\bbar(?:rier)?\.sync[^;]*;")


def step_with(compiled: compiled_kernels.CompiledKernels, make: Any, sizes: Any) -> None:
    """Fails if the compiled code does not give the bits of the CPU."""

    def run(on_kernels):
        params = params_of(sizes, F32)
        return steps(make(params, on_kernels), params)

    compare(compiled, run)


def is_caught(kernels, compiler, make: Any, edit: Any, sizes: Any = (5, BLOCK + 9)) -> str:
    """What the machine, or the comparison, says of a kernel whose PTX was changed."""
    changed = []

    def with_note(text: str) -> str:
        changed.append(edit(text) != text)
        return edit(text)

    edited = compiled_kernels.CompiledKernels(kernels, stand_in(), compiler, edit=with_note)
    try:
        step_with(edited, make, sizes)
    except (Fault, Unsupported, AssertionError, pytest.fail.Exception) as error:
        assert any(changed)
        return f"{type(error).__name__}: {error}"
    assert any(changed), "nothing was changed"
    return ""


ADAM, CAPTURABLE, CLIPPED, CODED = ORDERS.values()

FAULTS = {
    "no barrier": (ADAM, lambda text: BARRIER.sub("", text), "race in shared memory"),
    "loads 4 bytes off": (
        ADAM,
        lambda text: re.sub(r"(ld\.global\.cs\.v4\.\w+\s[^[]*\[%rd\d+)\]", r"\1+4]", text),
        "misaligned",
    ),
    "loads 16 bytes off": (
        ADAM,
        lambda text: re.sub(r"(ld\.global\.cs\.v4\.\w+\s[^[]*\[%rd\d+)\]", r"\1+16]", text),
        "no memory",
    ),
    "stores 16 bytes off": (
        ADAM,
        lambda text: re.sub(r"(st\.global\.cs\.v4\.\w+\s\[%rd\d+)\]", r"\1+16]", text),
        "no memory",
    ),
    "a ticket that does not wrap": (
        CAPTURABLE,
        lambda text: text.replace("atom.global.inc.u32", "atom.global.add.u32"),
        "",
    ),
    "a ticket that wraps late": (
        CAPTURABLE,
        lambda text: re.sub(
            r"(atom\.global\.inc\.u32\s+%r\d+, \[%rd\d+\]), %r\d+;", r"\1, 7;", text
        ),
        "",
    ),
    "a ticket of the norm that wraps late": (
        CLIPPED,
        lambda text: re.sub(
            r"(atom\.global\.inc\.u32\s+%r\d+, \[%rd\d+\]), %r\d+;", r"\1, 7;", text
        ),
        "",
    ),
    "two operations that may become one": (
        ADAM,
        lambda text: text.replace("add.rn.f32", "add.f32"),
        "not rounded to nearest",
    ),
    "a scale of four lanes": (
        CODED,
        lambda text: re.sub(r"(shfl\.sync\.bfly\.b32\s+[^,]*, )%r\d+,", r"\1 0,", text),
        "",
    ),
}


@pytest.mark.parametrize(("make", "edit", "says"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(make, edit, says, kernels, compiler):
    sizes = (4160, BLOCK + 70) if make is CODED else (5, BLOCK + 8)
    found = is_caught(kernels, compiler, make, edit, sizes)
    assert found
    assert says in found, found


def test_every_barrier_of_the_norm_is_needed(kernels, compiler):
    """But for two of each sum of 2,048 columns: 256 threads find there what they have written
    themselves, and the last one, behind which there is only thread 0."""
    text = compiled_kernels.ptx_of(compiler, kernels, "fusedopt_grad_norm")
    needless = []
    for number in range(len(BARRIER.findall(text))):

        def edit(text: str, number: int = number) -> str:
            if "grad_norm" not in text:
                return text
            found = [*BARRIER.finditer(text)][number]
            return text[: found.start()] + text[found.end() :]

        # Gradients in float, in double, and such that float is not enough.
        needless += [number] if not caught_in_the_norm(kernels, compiler, edit) else []
    assert len(needless) <= 5, needless


def caught_in_the_norm(kernels, compiler, edit: Any) -> bool:
    compiled = compiled_kernels.CompiledKernels(kernels, stand_in(), compiler, edit=edit)
    for grads in ([torch.ones(3000)], [torch.ones(3000, dtype=F64)], [torch.full((3000,), 1e-30)]):
        try:
            with running(kernels), compiled.running():
                measured(grads, 1.0)
        except Fault:
            return True
    return False
