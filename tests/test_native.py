"""What only the native module promises: the same bits however it runs, and nobody in its way."""

from __future__ import annotations

import gc
import hashlib
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import seam
import torch
from cases import (
    CASES,
    DTYPES,
    RICHEST_OF,
    SCALARS,
    assert_near,
    bits,
    draw,
    every_case_or_dtype,
    every_dtype,
    leaf,
    richest,
    snapshot,
    step_through,
    train,
)

import fusedopt

pytestmark = pytest.mark.usefixtures("native")
linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")


def script(code, **environment):
    """Runs Python code in a fresh process that can import fusedopt and the cases."""
    paths = [str(Path(fusedopt.__file__).parents[1]), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# The same bits --------------------------------------------------------------------------------


@richest
@every_dtype
def test_thread_count_does_not_matter(case, dtype, step_threads):
    values, grads = draw([(200_003,), (5,), (32_768,), (133, 377), (0,), (65,)], 2, dtype)
    results = []
    for count in (1, 2, 3):
        step_threads(count)
        results.append(snapshot(train(case.ours, values, grads)[1]))
    assert all(result == results[0] for result in results)


@every_case_or_dtype
def test_together_or_one_by_one(case, dtype):
    values, grads = draw([(5,), (400_000,), (), (17, 33), (64,)], 2, dtype)
    together, opt = train(case.ours, values, grads)
    for i, p in enumerate(together):
        (q,), alone = train(case.ours, values[i : i + 1], [now[i : i + 1] for now in grads])
        assert bits(p) == bits(q)
        for key, value in alone.state[q].items():
            assert bits(opt.state[p][key]) == bits(value), key


@every_case_or_dtype
def test_an_element_does_not_depend_on_its_place(case, dtype):
    """In a vector, in a tail, in another thread's share: the arithmetic is the same."""
    value, first, second = (torch.randn(()).add(3 * (i > 0)).to(dtype) for i in range(3))
    values = [value.expand(n).clone() for n in (1, 2, 3, 7, 31, 100, 70_001)]
    grads = [[g.expand(len(v)).clone() for v in values] for g in (first, second)]
    params, opt = train(case.ours, values, grads)
    for p in params:
        for tensor in (p.detach(), *(v for k, v in opt.state[p].items() if k not in SCALARS)):
            raw = tensor.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.itemsize])
            assert (raw == raw[0]).all()
        assert torch.equal(p[:1], params[0])


def digests():
    """A hash per case and dtype, over ordinary and special values; the same in every process."""
    special = [0.0, -0.0, 1.0, -2.0, math.inf, -math.inf, math.nan, 1e-40, -1e-42, 3e38, 65519.0]
    grid = torch.cartesian_prod(*[torch.tensor(special, dtype=torch.float64)] * 3)
    torch.manual_seed(20)
    columns = torch.cat([grid, torch.randn(997, 3, dtype=torch.float64)]).unbind(1)
    found = {}
    for case in CASES:
        for dtype in DTYPES:
            value, *grads = (c.to(dtype) for c in columns)
            (p,), opt = train(case.ours, [value], [[g] for g in grads])
            digest = hashlib.sha256()
            for tensor in (p.detach(), *opt.state[p].values()):
                # Which NaN an operation returns depends on the order of its operands.
                digest.update(bits(tensor.masked_fill(tensor.isnan(), math.nan))[-1])
            found[f"{case} {dtype}"] = digest.hexdigest()
    return found


@pytest.mark.parametrize(
    "variable", ["FUSEDOPT_CPU_ISA", "FUSEDOPT_CPU_THREADS", "FUSEDOPT_SELF_TEST"]
)
def test_settings_that_do_not_exist(variable):
    code = "import fusedopt.info; print(fusedopt.info.report())"
    chosen = {variable: "x", "FUSEDOPT_BACKEND": ""}  # native would be an error at import
    out = script("import warnings; warnings.simplefilter('ignore')\n" + code, **chosen)
    assert f"{variable}=x" in out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_operation_rounds(dtype):
    """No multiplication is fused with an addition, on whatever processor."""
    values, grads = draw([(1000,)], 2, dtype)
    (param,), opt = train(fusedopt.SGD, values, grads, lr=0.3, momentum=0.7, weight_decay=0.2)
    p, first, second = values[0], grads[0][0], grads[1][0]
    lr, momentum, decay = (torch.tensor(x, dtype=dtype) for x in (0.3, 0.7, 0.2))
    buffer = first + decay * p
    p = p - lr * buffer
    buffer = momentum * buffer + (second + decay * p)
    p = p - lr * buffer
    assert bits(param) == bits(p)
    assert bits(opt.state[param]["momentum_buffer"]) == bits(buffer)


# Threads and processes ------------------------------------------------------------------------


def test_the_interpreter_lock_is_released(step_threads):
    """Another Python thread gets on in the middle of a long step."""
    step_threads(1)
    params = [torch.ones(8_000_000, requires_grad=True)]
    params[0].grad = torch.ones(8_000_000)
    opt = fusedopt.Adam(params)
    opt.step()
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0)

    def during_a_step():
        ticks.clear()
        start = time.perf_counter()
        opt.step()
        end = time.perf_counter()
        middle = (end - start) / 4
        return any(start + middle < t < end - middle for t in list(ticks))

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        # The scheduler may give the other thread nothing for a while, but not every time.
        assert any(during_a_step() for _ in range(30))
    finally:
        stop.set()
        thread.join()


def test_optimizers_step_in_several_threads_at_once():
    values, grads = draw([(500_000,), (7,)], 3)
    expected = snapshot(train(RICHEST_OF["Adam"].ours, values, grads)[1])
    results = [None] * 6

    def work(i):
        results[i] = snapshot(train(RICHEST_OF["Adam"].ours, values, grads)[1])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert all(result == expected for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_after_a_step_can_step():
    out = script(
        """
import os, signal, sys, torch, warnings
from cases import *
warnings.simplefilter("ignore")
torch.set_num_threads(4)
values, grads = draw([(300_000,), (5,)], 1)
params, opt = train(RICHEST_OF["Adam"].ours, values, grads)
twin_params, twin = train(RICHEST_OF["Adam"].ours, values, grads)
opt.step()
small, late = train(RICHEST_OF["Adam"].ours, values[1:], [])
small[0].grad = params[1].grad
child = os.fork()
if child == 0:  # torch's own large operators would hang here, so there are none
    signal.alarm(30)
    twin.step()
    late.step()
    torch.set_num_threads(1)
    os._exit(0 if snapshot(twin) == snapshot(opt) else 3)
_, status = os.waitpid(child, 0)
opt.step()
print(os.waitstatus_to_exitcode(status), opt.state[params[0]]["step"].item() == 3)
"""
    )
    assert out.split() == ["0", "True"]


def test_aliases_while_threads_are_quick():
    """Threads that wait actively start at the same time, and would meet in shared elements."""
    script(
        """
import torch
from cases import RICHEST_OF
from layouts import test_shared_tensors
torch.set_num_threads(2)
for test in (
    test_shared_tensors.test_two_parameters_in_one_storage,
    test_shared_tensors.test_gradient_that_is_another_parameter,
):
    test(RICHEST_OF["Adam"], None)
""",
        OMP_WAIT_POLICY="active",
        GOMP_SPINCOUNT="infinite",
    )


@linux
def test_the_number_of_threads_is_that_of_torch():
    if "without OpenMP" in fusedopt.backend.native.describe():
        pytest.skip("built without OpenMP")
    out = script(
        """
import os, torch
from cases import *
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
values, grads = draw([(500_000,)], 1)
before = count()
params, opt = train(RICHEST_OF["Adam"].ours, values, grads)
alone = count()
torch.set_num_threads(4)
opt.step()
four = count()
torch.ones(1_000_000).add_(1)
shared = count()
print(alone - before, four - alone, shared - four)
"""
    )
    new, four, more = map(int, out.split())
    assert new == 0, "one thread means the calling thread"
    assert four == 3
    assert more == 0, "torch and fusedopt share one pool of threads"


# Memory ---------------------------------------------------------------------------------------


def allocated(step):
    """Bytes of tensor memory that a call asks for."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    return sum(max(0, e.cpu_memory_usage) for e in profile.function_events), [
        e.name for e in profile.function_events
    ]


@richest
@every_dtype
def test_a_steady_step_makes_no_tensors_and_calls_no_operators(case, dtype):
    values, grads = draw([(5,), (4096,), (17, 33), (100_000,)], 2, dtype)
    _, opt = train(case.ours, values, grads)
    size, names = allocated(opt.step)
    assert size == 0
    assert not [name for name in names if name.startswith("aten::")]
    assert allocated(lambda: torch.ones(64))[0] >= 256  # the measurement measures


@richest
def test_fresh_gradients_and_moved_parameters_stay_on_the_fast_path(case):
    """A backward pass makes new gradients; only a rebuilt plan may cost tensors."""
    values, grads = draw([(5,), (4096,)], 4)
    params, opt = train(case.ours, values, grads[:2])
    for now in grads[2:]:
        for p, g in zip(params, now, strict=True):
            p.grad = g
        assert allocated(opt.step)[0] == 0


def test_optimizers_and_their_tensors_are_released():
    """Nothing that was stepped is kept alive by a plan."""
    params, opt = train(RICHEST_OF["Adam"].ours, *draw([(5,), (500_000,)], 2))
    watched = [weakref.ref(opt), *map(weakref.ref, params)]
    watched += [weakref.ref(v) for s in opt.state.values() for v in s.values()]
    watched += [weakref.ref(p.grad) for p in params]
    del params, opt
    gc.collect()
    assert not [ref for ref in watched if ref() is not None]


def test_replaced_gradients_are_not_kept():
    params, opt = train(RICHEST_OF["Adam"].ours, *draw([(5,)], 2))
    old = weakref.ref(params[0].grad)
    params[0].grad = None
    assert old() is None
    opt.step()


@richest
def test_large_and_many(case):
    """More chunks than threads, more tensors than a block, in one call."""
    values, grads = draw([(100_000,)] * 3 + [(3,)] * 700 + [(0,)] * 5, 2)
    params, _ = train(case.ours, values, grads)
    (expected,), _ = train(case.ours, [torch.cat(values)], [[torch.cat(now)] for now in grads])
    assert bits(torch.cat([p.detach() for p in params])) == bits(expected)


@every_dtype
def test_many_counts_of_steps_in_one_call(dtype):
    """Each tensor has its own step count, and so its own bias correction."""
    values, grads = draw([(9,)] * 12, 12, dtype)
    for at, now in enumerate(grads):
        for i in range(12):
            now[i] = now[i] if i <= at else None
    params, opt = train(RICHEST_OF["Adam"].ours, values, grads)
    assert sorted(int(opt.state[p]["step"]) for p in params) == [*range(1, 13)]
    for i, p in enumerate(params):
        (q,), _ = train(RICHEST_OF["Adam"].ours, [values[i]], [[now[i]] for now in grads[i:]])
        assert bits(p) == bits(q)
        assert_near(p, q)


def test_the_plan_is_not_part_of_a_pickle():
    _, opt = train(RICHEST_OF["Adam"].ours, *draw([(5,)], 2))
    assert set(opt.__getstate__()) == {"defaults", "state", "param_groups"}


@richest
def test_switching_backends_within_a_run(case, monkeypatch):
    values, grads = draw([(35,), (4, 4)], 6)
    params, opt = train(case.ours, values, grads[:2])
    native = fusedopt.backend.native
    monkeypatch.setattr(fusedopt.backend, "native", None)
    seam.forget_plan(opt)
    step_through(opt, params, grads[2:4])
    monkeypatch.setattr(fusedopt.backend, "native", native)
    step_through(opt, params, grads[4:])
    exact = [leaf(v, torch.float64) for v in values]
    step_through(case.exact(exact), exact, grads)
    for p, q in zip(params, exact, strict=True):
        assert_near(p, q)


GRADIENTS_EXCHANGED = """
import gc, linecache, sys, threading, time
import torch, fusedopt
torch.set_num_threads(1)
big = 16 << 20  # takes longer than the thread sleeps, and is memory of its own
params = [torch.nn.Parameter(torch.zeros(n)) for n in (big, *[64] * 12)]
opt = fusedopt.SGD(params, lr=0.5)
spares, old, go = [torch.ones(big) for _ in range(8)], [], threading.Event()

def backward():
    opt.zero_grad()
    torch.stack([p.sum() for p in params[1:]]).sum().backward()
    params[0].grad = torch.ones(big)

def exchange(phase, info):
    frame = sys._getframe(1)
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    if phase == "start" and spares and "= plan.step(" in line:
        old.append(params[0].grad)
        params[0].grad = spares.pop()
        go.set()

def drop():
    go.wait()
    time.sleep(0.001)
    params[0].grad = None

for _ in range(4):
    backward()
    opt.step()
thread = threading.Thread(target=drop)
thread.start()
backward()
gc.callbacks.append(exchange)
gc.set_threshold(1)
opt.step()
gc.set_threshold(0)
gc.callbacks.clear()
assert old or sys.version_info >= (3, 12), "nothing was exchanged within the native call"
go.set()
thread.join()
assert (params[0] == -2.5).all()
"""


def test_gradients_exchanged_while_others_are_asked_for():
    """By the garbage collector, between the first gradient and those that no Python code has seen;
    a thread drops it while the step reads it."""
    script(GRADIENTS_EXCHANGED)
