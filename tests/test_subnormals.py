"""Numbers below the normal range under ``torch.set_flush_denormal``, a flag of the thread: what is
stored in fewer bits comes back as it was, and float32 arithmetic follows the flag of the caller."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator

import pytest
import torch
from cases import RICHEST, bits, leaf, richest_by_options, states, step_through
from conftest import SEED
from stored import WAYS

import fusedopt

F16, F32 = torch.float16, torch.float32
SMALL = 2.0**-14  # the smallest normal float16
# Of whole vectors and tails; the largest has 8-bit state.
SIZES = (7, 300, 4_099)
STORED = [({}, F16)] + [
    (options, dtype)
    for options, dtypes in WAYS.values()
    for dtype in dtypes
    if F16 in (dtype, options.get("state_dtype"))
]
CROSSED = [(case, options, dtype) for case in RICHEST for options, dtype in STORED]
each = pytest.mark.parametrize(("case", "options", "dtype"), CROSSED, ids=str)


@pytest.fixture(autouse=True)
def flag_goes_back() -> Iterator[None]:
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor has no such flag")
    # New threads begin with the flag of the one that starts them, and keep it for other tests.
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.ones(10**6).add_(1)
    torch.set_num_threads(before)
    yield
    torch.set_flush_denormal(False)


def small(size, dtype):
    """As many below the normal range of float16 as above, some zero, rounded to float16."""
    values = torch.randn(size) * SMALL * torch.randint(0, 3, (size,))
    return values.half().to(dtype)


def steps(case, options, dtype, flush):
    """Everything after three steps, one of them with a gradient of zeros."""
    torch.manual_seed(SEED)
    params = [leaf(small(size, dtype)) for size in SIZES]
    grads = [[small(p.numel(), dtype) * scale for p in params] for scale in (1, 0, 1)]
    opt = case.ours(params, **options)
    torch.set_flush_denormal(flush)
    step_through(opt, params, grads)
    torch.set_flush_denormal(False)
    return [
        bits(v) for p, s in zip(params, states(opt, params), strict=True) for v in (p, *s.values())
    ]


@each
def test_the_flag_changes_nothing_in_float16(case, options, dtype, backend):
    assert steps(case, options, dtype, True) == steps(case, options, dtype, False)


@richest_by_options
def test_weights_without_a_gradient_stay(case, backend):
    """All float16 but NaN, whole and as the tail of a vector."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(F16)
    every = every[~every.isnan()]
    for values in (every, *every[:1000].split(7)):
        p = leaf(values)
        p.grad = torch.zeros_like(p)
        opt = case.ours([p], weight_decay=0)
        torch.set_flush_denormal(True)
        opt.step()
        torch.set_flush_denormal(False)
        assert bits(p) == bits(values)


def digests(flush: bool) -> dict[str, str]:
    """The same in every process with the same seed, and with either mode of the processor."""
    return {
        f"{case}, {options}, {dtype}": hashlib.sha256(
            pickle.dumps(steps(case, options, dtype, flush))
        ).hexdigest()
        for case, options, dtype in CROSSED
    }


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("flush", [False, True])
@richest_by_options
def test_all_threads_do_as_the_caller(case, flush, step_threads):
    """Those of the pool were there before the flag was set. Stock's one thread is the model."""
    values = torch.randn(400_000) * 1e-38
    grads = [torch.randn(400_000) * 1e-38 for _ in range(2)]
    results = []
    for threads in (3, 1):
        step_threads(threads)
        p = leaf(values)
        opt = case.ours([p])
        step_through(opt, [p], [[grads[0]]])
        torch.set_flush_denormal(flush)
        step_through(opt, [p], [[grads[1]]])
        torch.set_flush_denormal(False)
        results.append([bits(t) for t in (p, *states(opt, [p])[0].values())])
    assert results[0] == results[1]


@pytest.mark.parametrize("flush", [False, True])
def test_float32_arithmetic_flushes_as_in_torch(flush, backend):
    """Without momentum: what torch multiplies and adds at once it flushes once."""
    values, grad = torch.randn(2, 1_000) * 1e-38
    ours, stock = leaf(values), leaf(values)
    torch.set_flush_denormal(flush)
    for param, cls in ((ours, fusedopt.SGD), (stock, torch.optim.SGD)):
        step_through(cls([param], lr=1.0), [param], [[grad]])
    torch.set_flush_denormal(False)
    assert bits(ours) == bits(stock)
    assert (stock == 0).any() == flush
