"""On a GPU: parity with stock, and with the CPU bit for bit; launches, streams, graphs, scaling."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import (
    DTYPES,
    FLOWS,
    GRAD_LAYOUTS,
    LAYOUTS,
    RICHEST,
    SCALARS,
    TABLES,
    TOLERANCE,
    Amp,
    Case,
    bits,
    draw,
    every_case,
    every_dtype,
    gradient_like,
    leaf,
    richest,
    snapshot,
    states,
    those_with,
)
from torch import nn

import fusedopt

DEVICE = "cuda"
HOST = "cpu"
# Cycles of a GPU clock below 2.5 GHz: a quarter of a second or more, many times what a step takes.
LONG = 600_000_000

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

PLAIN = [
    Case(name, {"lr": 0.1} if table.slots_of({}) else {"lr": 0.1, "momentum": 0.9})
    for name, table in TABLES.items()
]
plain = pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(autouse=True)
def gpu():
    if not fusedopt.backend.has_kernels(torch.device(DEVICE, 0)):
        text = f"no kernels for this GPU: {fusedopt.backend.status()}"
        if os.environ.get("FUSEDOPT_REQUIRE_NATIVE", "0") not in ("", "0"):
            pytest.fail(text)
        pytest.skip(text)


def num_launches():
    return fusedopt.backend.native.num_launches()


def put(tensor, device=DEVICE):
    return None if tensor is None else tensor.detach().to(device, copy=True)


def set_grads(params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.to(p.device, p.dtype, copy=True)


def step_through(opt, params, grads):
    for now in grads:
        set_grads(params, now)
        opt.step()


def train_on(device, build, values, grads, dtype=None, **more):
    params = [leaf(put(v, device), dtype or v.dtype) for v in values]
    opt = build(params, **more)
    step_through(opt, params, grads)
    return params, opt


def norm_of(grads):
    return torch.cat([g.double().reshape(-1) for g in grads]).norm().item()


def limit_for(grads):
    """One that clips, but leaves so much that no gradient cancels with a penalty."""
    return 0.6 * norm_of(grads[0])


def clip_and_step(opt, params, grads, max_norm):
    for now in grads:
        set_grads(params, now)
        nn.utils.clip_grad_norm_(params, max_norm)
        opt.step()


def assert_near(ours, exact, what="", dtype=None):
    """As in cases.py; half dtypes are measured by the largest value, which is what they round."""
    rtol, atol = TOLERANCE[dtype or ours.dtype]
    ours, exact = ours.detach().cpu().double(), exact.detach().cpu().double()
    if (dtype or ours.dtype).itemsize == 2 and exact.numel():
        atol = rtol * max(exact.nan_to_num().abs().max().item(), 1.0)
    torch.testing.assert_close(
        ours, exact, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def assert_all_near(params, exact, dtype=None):
    for i, (p, q) in enumerate(zip(params, exact, strict=True)):
        assert_near(p, q, f"parameter {i}, shape {tuple(p.shape)}", dtype or p.dtype)


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def difference(a, b):
    """How the bits of two tensors differ, in words, or None. All NaNs are the same."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
    a, b = (t.detach().cpu().contiguous().reshape(-1) for t in (a, b))
    x, y = (t.view(INTEGERS[t.dtype.itemsize]) for t in (a, b))
    differ = (x != y) & ~(a.isnan() & b.isnan())
    count = int(differ.sum())
    if count == 0:
        return None
    first = int(differ.nonzero()[0])
    magnitude = torch.iinfo(x.dtype).max
    order = [torch.where(t < 0, -(t & magnitude), t).double() for t in (x, y)]
    ulps = (order[0] - order[1])[differ].abs().max().item()
    return (
        f"{count} of {a.numel()} differ, by up to {ulps:.0f} ulp; "
        f"[{first}] is {a[first].item()!r}, not {b[first].item()!r}"
    )


def differences(opt, params, other, others):
    """The same for parameters and their state; an empty list if there are none."""
    found = []
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        here, there = opt.state.get(p, {}), other.state.get(q, {})
        assert here.keys() == there.keys()
        for key, a, b in [("values", p, q), *((key, here[key], there[key]) for key in here)]:
            if text := difference(a, b):
                found.append(f"{key} of parameter {i}, shape {tuple(p.shape)}: {text}")
    return found


def assert_same_bits(opt, params, other, others):
    found = differences(opt, params, other, others)
    assert not found, "\n".join(found)


@contextlib.contextmanager
def no_synchronization():
    """torch raises if one of its own calls waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Parity ---------------------------------------------------------------------------------------

SHAPES = [(33,), (2, 3), (), (0,), (4099,)]
SIZES = [0, 1, 7, 8, 9, 2047, 2048, 2049, 16383, 16384, 16385, 100_003]


@every_dtype
@every_case
def test_equals_stock(case, dtype):
    values, grads = draw(SHAPES, 4, dtype)
    grads[1][1] = grads[2][0] = None
    params, opt = train_on(DEVICE, case.ours, values, grads)
    exact, stock = train_on(DEVICE, case.exact, values, grads, torch.float64)
    assert_all_near(params, exact)
    for p, q in zip(params, exact, strict=True):
        assert opt.state.get(p, {}).keys() == stock.state.get(q, {}).keys()
        for key, value in opt.state.get(p, {}).items():
            assert value.device.type == ("cpu" if key in SCALARS else DEVICE)
            if dtype.itemsize > 2 or key in SCALARS:
                assert_near(value, stock.state[q][key], key, torch.float32)


def special_values(dtype):
    """Zeros, subnormals, infinities and NaN, each as a value with each as a gradient."""
    inf = float("inf")
    special = [0.0, -0.0, 1.0, -2.0, inf, -inf, float("nan"), 1e-40, -1e-42, 1e-7, 6e4, 3e38, 1e-20]
    grid = torch.cartesian_prod(*[torch.tensor(special, dtype=torch.float64).to(dtype)] * 2)
    return grid[:, 0].contiguous(), grid[:, 1].contiguous()


def off_by(offset, values):
    """The values in memory that begins so many elements after an aligned address."""
    base = torch.empty(values.numel() + offset, dtype=values.dtype, device=values.device)
    return base[offset:].copy_(values)


@every_dtype
@every_case
def test_has_the_bits_of_the_cpu(case, dtype):
    """Also where parameters or gradients are not aligned to 16 bytes."""
    sizes = SIZES * 3
    at = [(0, 0)] * len(SIZES) + [(1, 1)] * len(SIZES) + [(0, 3)] * len(SIZES) + [(0, 0)]
    values, grads = draw([(n,) for n in sizes], 3, dtype)
    value, grad = special_values(dtype)
    values.append(value)
    for now, shift in zip(grads, (0, 5, 1), strict=True):
        now.append(grad.roll(shift))
    params = [off_by(i, put(v)).requires_grad_() for v, (i, _) in zip(values, at, strict=True)]
    opt = case.ours(params)
    for now in grads:
        for p, g, (_, i) in zip(params, now, at, strict=True):
            p.grad = off_by(i, put(g))
        before = num_launches()
        opt.step()
        assert num_launches() > before
    others, other = train_on(HOST, case.ours, values, grads)
    assert_same_bits(opt, params, other, others)


@richest
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_state_of_half_parameters(case, dtype):
    """And float32, float64 and half parameters in one optimizer: the bits of the CPU."""
    kinds = [dtype, torch.float32, torch.float64, dtype, dtype]
    values, grads = draw([(2049,), (100,), (77,), (5, 7), (16_390,)], 4)
    values = [v.to(kind) for v, kind in zip(values, kinds, strict=True)]
    runs = []
    for device in (DEVICE, HOST):
        params, opt = train_on(device, case.ours, values, grads[:1])
        for p in params[:-1]:
            for key, value in opt.state[p].items():
                if value.dtype == dtype:
                    opt.state[p][key] = value.float()
        runs.append((opt, params))
    if not hasattr(params[1], "grad_dtype"):
        low = [None] * 5
    else:
        low = [None, dtype, None, torch.float32, None]  # gradients of another dtype
    for device, (opt, params) in zip((DEVICE, HOST), runs, strict=True):
        for now in grads[1:]:
            for p, g, kind in zip(params, now, low, strict=True):
                if kind:
                    p.grad_dtype = None
                p.grad = g.to(kind or p.dtype).to(p.device, copy=True)
            step_on(device, opt)
    assert_same_bits(*runs[0], *runs[1])


def step_on(device, opt):
    opt.step()


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_complex_and_sparse_take_the_python_rule(case):
    values, grads = draw([(9,), (2, 3)], 3, torch.complex64)
    params, _ = train_on(DEVICE, case.ours, values, grads)
    exact, _ = train_on(DEVICE, case.stock, values, grads)
    for p, q in zip(params, exact, strict=True):
        assert_near(torch.view_as_real(p.detach()), torch.view_as_real(q.detach()))
    if not case.table.takes_sparse:
        return
    rows = torch.sparse_coo_tensor([[0, 3, 0]], 1 + torch.rand(3, 2), (5, 2)).coalesce()
    values, grads = [torch.randn(5, 2), torch.randn(4)], [[rows, torch.randn(4)]] * 3
    params, _ = train_on(DEVICE, case.ours, values, grads)
    exact, _ = train_on(DEVICE, case.stock, values, grads)
    assert_all_near(params, exact)


@plain
def test_version_counters(case):
    params, opt = train_on(DEVICE, case.ours, *draw([(5,)], 1))
    (p,), grad = params, params[0].grad
    before = p._version, grad._version
    opt.step()
    assert p._version > before[0] and grad._version == before[1]


# Layouts --------------------------------------------------------------------------------------

# Nothing on a GPU has an address that its dtype does not divide.
PARAM_LAYOUTS = [name for name in LAYOUTS if name != "odd_bytes"]


@pytest.mark.parametrize("grad_layout", [name for name in GRAD_LAYOUTS if name != "odd_bytes"])
@pytest.mark.parametrize("layout", PARAM_LAYOUTS)
def test_layouts(layout, grad_layout):
    shape = (4, 3, 2, 5)
    for case in RICHEST:
        value, drawn = torch.randn(shape), [gradient_like(torch.randn(shape)) for _ in range(3)]
        if grad_layout == "expanded":
            drawn = [g[:1].expand(shape) for g in drawn]
        with torch.device(DEVICE):
            p, around = LAYOUTS[layout](put(value))
            grads = [GRAD_LAYOUTS[grad_layout](put(g)) for g in drawn]
        p.requires_grad_()
        strides, before = p.stride(), [bits(t) for t in around]
        opt = case.ours([p])
        for grad, near in grads:
            p.grad = grad
            unchanged = [bits(t) for t in (grad, *near)]
            opt.step()
            assert [bits(t) for t in (grad, *near)] == unchanged
        assert p.stride() == strides and [bits(t) for t in around] == before
        (exact,), _ = train_on(DEVICE, case.exact, [value], [[g] for g in drawn], torch.float64)
        assert_near(p, exact, case.name)


# Launches -------------------------------------------------------------------------------------


def many_groups(count, dtype=torch.float32):
    """Small tensors of many sizes, one large one; and the groups they are in."""
    values = [torch.randn(1 + i * 37 % 500).to(dtype) for i in range(count - 1)]
    values.append(torch.randn(70_001).to(dtype))
    return values, [(0, 200, {}), (200, 201, {"lr": 0.3}), (201, count, {"weight_decay": 0.1})]


def grouped(case, params, groups, **more):
    return case.ours([{"params": params[a:b], **g} for a, b, g in groups], **more)


@plain
@pytest.mark.parametrize(
    "more",
    [{}, {"capturable": True}, {"max_grad_norm": 1.0}],
    ids=lambda more: next(iter(more), ""),
)
def test_one_launch_for_600_tensors(case, more):
    """And one more for the norm. A step has its count as one more pointer if it is on the device,
    so 560 of those."""
    count = 560 if "capturable" in more else 600
    values, groups = many_groups(count)
    params = [leaf(put(v)) for v in values]
    opt = grouped(case, params, groups, **more)
    for at in range(3):
        grads = [torch.randn_like(p) for p in params]
        if at == 0:
            grads[5] = None  # it comes late: its step counts are others
        set_grads(params, grads)
        before = num_launches()
        opt.step()
        assert num_launches() - before == 1 + ("max_grad_norm" in more)


def test_half_and_float32_parameters_share_a_launch():
    kinds = [torch.float32, torch.bfloat16, torch.float16] * 20
    values = [torch.randn(300 + i).to(kind) for i, kind in enumerate(kinds)]
    for case in PLAIN:
        params = [leaf(put(v)) for v in values]
        opt = case.ours(params)
        for _ in range(2):
            set_grads(params, [torch.randn_like(p) for p in params])
            before = num_launches()
            opt.step()
            assert num_launches() - before == 1


@richest
def test_more_tensors_than_a_launch_holds(case):
    values, groups = many_groups(2500)
    grads = [[torch.randn_like(v) for v in values] for _ in range(2)]
    runs = []
    for device in (DEVICE, HOST):
        params = [leaf(put(v, device)) for v in values]
        opt = grouped(case, params, groups)
        for now in grads:
            set_grads(params, now)
            step_on(device, opt)
        runs.append((opt, params))
    assert_same_bits(*runs[0], *runs[1])


@plain
@pytest.mark.parametrize("amp", [False, True], ids=["plain", "amp and clip"])
def test_a_step_allocates_nothing(case, amp):
    values, grads = draw([(1000,), (33,), (70_001,)], 4)
    more = {"amp_fused": True, "max_grad_norm": 1.0} if amp else {}
    params, opt = train_on(DEVICE, case.ours, values, grads[:2], **more)
    if amp:
        opt.grad_scale = torch.tensor(8.0, device=DEVICE)
        opt.found_inf = torch.tensor(0.0, device=DEVICE)
        opt.step()
    set_grads(params, grads[2])
    torch.cuda.synchronize()

    def counts():
        stats = torch.cuda.memory_stats()
        return torch.cuda.memory_allocated(), stats["allocation.all.allocated"]

    before = counts()
    opt.step()
    assert counts() == before
    if torch.cuda.memory_stats()["allocation.all.allocated"] == 0:
        pytest.skip("this allocator does not count")


# Streams --------------------------------------------------------------------------------------


@plain
@pytest.mark.parametrize(
    "more", [{}, {"max_grad_norm": 2.0, "amp_fused": True}, {"capturable": True}], ids=str
)
def test_the_current_stream_and_no_waiting(case, more):
    """Gradients are made after a long kernel on a side stream. A step on any other stream would
    read what was there before, and one that waits for the device would outlast the kernel."""
    values, grads = draw([(1000,), (33,), (70_001,)], 3)
    params, opt = train_on(DEVICE, case.ours, values, grads[:1], **more)
    sources = [[put(g) for g in now] for now in grads[1:]]
    set_grads(params, [torch.full_like(p, 1e4) for p in params])
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for cycles, now in zip((1000, LONG), sources, strict=True):  # the first loads all kernels
            torch.cuda.synchronize()
            done = torch.cuda.Event()
            torch.cuda._sleep(cycles)
            for p, g in zip(params, now, strict=True):
                p.grad.copy_(g)
            with no_synchronization():
                opt.step()
            done.record()
            waited = done.query()
    torch.cuda.synchronize()
    assert not waited
    exact = [leaf(put(v), torch.float64) for v in values]
    stock = case.exact(exact)
    if "max_grad_norm" in more:
        clip_and_step(stock, exact, grads, 2.0)
    else:
        step_through(stock, exact, grads)
    assert_all_near(params, exact)


@plain
def test_new_gradients_and_no_waiting(case):
    """As after zero_grad and backward: the gradients are other tensors at every step."""
    values, grads = draw([(1000,), (33,), (70_001,)], 4)
    for more in ({}, {"max_grad_norm": 2.0, "amp_fused": True}, {"capturable": True}):
        params, opt = train_on(DEVICE, case.ours, values, grads[:1], **more)
        for now in grads[1:]:
            set_grads(params, now)
            with no_synchronization():
                opt.step()
                norm = opt.grad_norm
        assert (norm is not None) == ("max_grad_norm" in more)


class LateGradient(torch.autograd.Function):
    """The identity, whose backward takes its time."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        torch.cuda._sleep(LONG // 10)
        return grad * 2


def test_attached_to_a_forward_on_two_streams():
    """A bucket is stepped on one of them, and its gradients are of both."""
    values = [torch.randn(70_001) for _ in range(2)]
    runs, side = [], torch.cuda.Stream()
    for build in (fusedopt.attach, lambda params, cls, **options: cls(params, **options)):
        params = [leaf(put(v)) for v in values]
        opt = build(params, fusedopt.AdamW, lr=0.1)
        for _ in range(3):
            opt.zero_grad()
            main = torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                late = LateGradient.apply(params[0]).square().sum()
            main.wait_stream(side)
            (late + params[1].square().sum()).backward()
            opt.step()
        runs.append(snapshot(opt))
    assert runs[0] == runs[1]


# Devices --------------------------------------------------------------------------------------


@richest
@pytest.mark.parametrize("places", [(HOST, DEVICE), (DEVICE, HOST)], ids=str)
def test_cpu_and_gpu_in_one_optimizer(case, places):
    values, grads = draw([(100,), (33,), (70_001,), (5,)], 3)
    params = [leaf(put(v, places[i % 2])) for i, v in enumerate(values)]
    opt = case.ours(params)
    step_through(opt, params, grads)
    assert_same_bits(opt, params, *reversed(train_on(HOST, case.ours, values, grads)))


@plain
@pytest.mark.parametrize("places", [(HOST, DEVICE), (DEVICE, HOST)], ids=str)
def test_one_norm_over_cpu_and_gpu(case, places):
    """Also where the GPU is still busy."""
    values, grads = draw([(100,), (70_001,)], 3)
    params = [leaf(put(v, place)) for v, place in zip(values, places, strict=True)]
    opt = case.ours(params, max_grad_norm=2.0, amp_fused=True)
    for now in grads:
        set_grads(params, now)
        sources = [p.grad.clone() for p in params]
        for p in params:
            p.grad.zero_()
        torch.cuda._sleep(LONG // 10)
        for p, g in zip(params, sources, strict=True):
            p.grad.copy_(g)
        opt.step()
        expected = norm_of(now)
        torch.testing.assert_close(opt.grad_norm.item(), expected, rtol=1e-5, atol=0)
    exact = [leaf(v, torch.float64) for v in values]
    clip_and_step(case.exact(exact), exact, grads, 2.0)
    assert_all_near(params, exact)
    set_grads(params, [grads[0][0], grads[0][1] * float("inf")])
    before = snapshot(opt)
    opt.step()
    assert snapshot(opt) == before


@two_gpus
@richest
def test_another_device_than_the_current_one(case):
    values, grads = draw([(100,), (33,), (70_001,)], 3)
    limit = limit_for(grads)
    reference = train_on(HOST, case.ours, values, grads)
    for places in (["cuda:1"] * 3, ["cuda:1", "cuda:0", "cuda:1"]):
        with torch.cuda.device(0):
            params = [leaf(put(v, place)) for v, place in zip(values, places, strict=True)]
            opt = case.ours(params)
            step_through(opt, params, grads)
            assert torch.cuda.current_device() == 0
        assert_same_bits(opt, params, *reversed(reference))
        clipped = [leaf(put(v, place)) for v, place in zip(values, places, strict=True)]
        step_through(case.ours(clipped, max_grad_norm=limit), clipped, grads)
        exact = [leaf(v, torch.float64) for v in values]
        clip_and_step(case.exact(exact), exact, grads, limit)
        assert_all_near(clipped, exact)


# Graphs ---------------------------------------------------------------------------------------


def captured(opt):
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    return graph


def graph_case(case):
    """With the options that may be tensors on the device as such."""
    options = {**case.options, "lr": torch.tensor(0.1, device=DEVICE)}
    if "betas" in case.table.numbers:
        options["betas"] = tuple(torch.tensor(b, device=DEVICE) for b in (0.9, 0.99))
    return Case(case.name, options)


@pytest.mark.parametrize("case", [*RICHEST, *PLAIN], ids=str)
@pytest.mark.parametrize("clip", [False, True], ids=["", "clip"])
def test_graph_replay(case, clip):
    """lr and, for Adam, betas change between replays."""
    lrs, betas = [0.1, 0.1, 0.02, 0.3, 0.05], [(0.9, 0.99)] * 3 + [(0.5, 0.9)] * 2
    values, grads = draw([(1000,), (33,), (0,), (16_390,)], 5)
    limit = limit_for(grads) if clip else float("inf")
    more = {"max_grad_norm": limit} if clip else {}
    params = [leaf(put(v)) for v in values]
    opt = graph_case(case).ours(params, capturable=True, **more)
    (group,) = opt.param_groups
    set_grads(params, grads[0])
    opt.step()  # creates state
    graph = captured(opt)
    for now, lr, beta in zip(grads[1:], lrs[1:], betas[1:], strict=True):
        for p, g in zip(params, now, strict=True):
            p.grad.copy_(g)
        group["lr"].fill_(lr)
        if "betas" in group:
            for tensor, value in zip(group["betas"], beta, strict=True):
                tensor.fill_(value)
        graph.replay()
        if clip:
            expected = norm_of(now)
            torch.testing.assert_close(opt.grad_norm.item(), expected, rtol=1e-5, atol=0)
    torch.cuda.synchronize()
    exact = [leaf(put(v), torch.float64) for v in values]
    stock = case.exact(exact)
    for now, lr, beta in zip(grads, lrs, betas, strict=True):
        stock.param_groups[0]["lr"] = lr
        if "betas" in group:
            stock.param_groups[0]["betas"] = beta
        clip_and_step(stock, exact, [now], limit)
    assert_all_near(params, exact)
    for p in params:
        if "step" in opt.state[p]:
            assert opt.state[p]["step"].item() == 5 and opt.state[p]["step"].device.type == DEVICE
    step_through(opt, params, grads[:1])  # the optimizer goes on without the graph
    stock.param_groups[0]["lr"] = group["lr"].item()
    clip_and_step(stock, exact, grads[:1], limit)
    assert_all_near(params, exact)


@plain
def test_graph_replay_skips_an_overflow(case):
    values, grads = draw([(1000,), (33,)], 4)
    params = [leaf(put(v)) for v in values]
    opt = case.ours(params, capturable=True, amp_fused=True)
    step_through(opt, params, grads[:1])
    opt.grad_scale = torch.tensor(4.0, device=DEVICE)
    opt.found_inf = torch.tensor(0.0, device=DEVICE)
    graph = captured(opt)
    for now in grads[1:]:
        for p, g in zip(params, now, strict=True):
            p.grad.copy_(g).mul_(4)
        before = snapshot(opt)
        opt.found_inf.fill_(2.0)
        graph.replay()
        assert snapshot(opt) == before
        opt.found_inf.fill_(0.0)
        graph.replay()
    exact, _ = train_on(DEVICE, case.exact, values, grads, torch.float64)
    assert_all_near(params, exact)


@plain
def test_capture_of_a_whole_iteration(case):
    """Backward and all, after eager iterations on another stream than that of the capture."""

    def iterate(params, opt):
        for p in params:
            p.grad = None
        sum((p * p).sum() for p in params).backward()
        opt.step()

    values, _ = draw([(100,), (33,)], 1)
    results = []
    for captures in (False, True):
        params = [leaf(put(v)) for v in values]
        opt = case.ours(params, capturable=True)
        for _ in range(2 if captures else 5):
            iterate(params, opt)
        if captures:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                iterate(params, opt)
            for _ in range(3):
                graph.replay()
        torch.cuda.synchronize()
        results.append([p.detach().clone() for p in params])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@plain
def test_capture_without_capturable(case):
    values, grads = draw([(100,), (33,)], 3)
    params, opt = train_on(DEVICE, case.ours, values, grads[:1])
    set_grads(params, grads[1])
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match="capturable"):
        captured(opt)
    torch.cuda.synchronize()
    assert snapshot(opt) == before
    opt.step()
    step_through(opt, params, grads[2:])
    assert_same_bits(opt, params, *reversed(train_on(HOST, case.ours, values, grads)))


@plain
@pytest.mark.parametrize("capturable", [False, True])
def test_the_first_step_cannot_be_captured(case, capturable):
    values, grads = draw([(100,), (33,)], 3)
    params = [leaf(put(v)) for v in values]
    opt = case.ours(params, capturable=capturable)
    set_grads(params, grads[0])
    with pytest.raises(RuntimeError, match="before the capture" if capturable else "capturable"):
        captured(opt)
    torch.cuda.synchronize()
    step_through(opt, params, grads)
    exact, _ = train_on(DEVICE, case.exact, values, grads, torch.float64)
    assert_all_near(params, exact)


@plain
def test_capture_right_after_loading(case):
    """State is there, but no memory for norm and counts: an error, and a step mends it."""
    more = {"capturable": True, "max_grad_norm": 1e9}
    values, grads = draw([(100,), (33,), (16_390,)], 4)
    past, saved = train_on(DEVICE, case.ours, values, grads[:1], **more)
    params = [leaf(put(p)) for p in past]
    opt = case.ours(params, **more)
    opt.load_state_dict(copy.deepcopy(saved.state_dict()))
    set_grads(params, grads[1])
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match="before the capture"):
        captured(opt)
    torch.cuda.synchronize()
    assert snapshot(opt) == before
    opt.step()
    graph = captured(opt)
    for now in grads[2:]:
        for p, g in zip(params, now, strict=True):
            p.grad.copy_(g)
        graph.replay()
    exact, _ = train_on(DEVICE, case.exact, values, grads, torch.float64)
    assert_all_near(params, exact)


@richest
@every_dtype
def test_capturable_without_a_graph(case, dtype):
    """Step counts and coefficients on the device."""
    values, grads = draw(SHAPES, 4, dtype)
    grads[1][1] = grads[2][0] = None
    params, opt = train_on(DEVICE, case.ours, values, grads, capturable=True)
    exact, stock = train_on(DEVICE, case.exact, values, grads, torch.float64)
    assert_all_near(params, exact)
    for p, q in zip(params, exact, strict=True):
        if "step" in opt.state[p]:
            assert opt.state[p]["step"].device.type == DEVICE
            assert opt.state[p]["step"].item() == stock.state[q]["step"].item()


# GradScaler -----------------------------------------------------------------------------------


@richest
@pytest.mark.parametrize("fused", [False, True], ids=["default", "amp_fused"])
def test_grad_scaler(case, fused):
    case = Case(case.name, {**case.options, "lr": 0.01})
    for flow in FLOWS:
        ours = Amp(case.ours, device=DEVICE, amp_fused=fused).run(flow)
        stock = Amp(case.stock, device=DEVICE).run(flow)
        assert ours.log == stock.log
        assert_all_near(ours.params, stock.params)


def test_an_overflow_before_the_first_momentum():
    case = Case("SGD", {"lr": 0.01, "momentum": 0.9, "dampening": 0.5})
    for flow in ("o . .", "o o . . .", ". o ."):
        ours = Amp(case.ours, device=DEVICE, amp_fused=True).run(flow)
        stock = Amp(case.stock, device=DEVICE).run(flow)
        assert ours.log == stock.log
        assert_all_near(ours.params, stock.params)


@richest
def test_grad_scaler_with_clipping_in_the_step(case):
    case = Case(case.name, {**case.options, "lr": 0.01})
    ours = Amp(case.ours, device=DEVICE, amp_fused=True, max_grad_norm=1.5).run(". . o u . uo .")
    stock = Amp(case.stock, device=DEVICE).run("c c co c c co c")
    assert [scale for _, scale, _ in ours.log] == [scale for _, scale, _ in stock.log]
    assert_all_near(ours.params, stock.params)


@richest
@pytest.mark.parametrize("more", [{}, {"capturable": True}], ids=["", "capturable"])
def test_found_inf_summed_over_devices(case, more):
    values, grads = draw([(100,), (33,), (16_390,)], 3)
    params = [leaf(put(v)) for v in values]
    opt = case.ours(params, amp_fused=True, **more)
    opt.grad_scale = torch.tensor(8.0, device=DEVICE)
    for now in grads:
        set_grads(params, [g * 8 for g in now])
        begun, before = any(states(opt, params)), snapshot(opt)
        opt.found_inf = torch.tensor(2.0, device=DEVICE)
        opt.step()
        assert snapshot(opt)[0] == before[0] and (not begun or snapshot(opt) == before)
        opt.found_inf = torch.tensor(0.0, device=DEVICE)
        opt.step()
    exact, stock = train_on(DEVICE, case.exact, values, grads, torch.float64)
    assert_all_near(params, exact)
    for p, q in zip(params, exact, strict=True):
        if "step" in opt.state[p]:
            assert opt.state[p]["step"].item() == stock.state[q]["step"].item() == 3


@plain
def test_amp_fused_does_not_wait(case):
    run = Amp(case.ours, device=DEVICE, amp_fused=True, max_grad_norm=1.0).run(". .")
    loss = run.model(torch.ones(2, 4, device=DEVICE)).square().sum()
    run.opt.zero_grad()
    run.scaler.scale(loss).backward()
    with no_synchronization():
        run.scaler.step(run.opt)
    run.scaler.update()


# Clipping -------------------------------------------------------------------------------------


@every_dtype
@richest
def test_clipping(case, dtype):
    values, grads = draw([*SHAPES, (70_001,)], 3, dtype)
    limit = limit_for(grads)
    params, opt = train_on(DEVICE, case.ours, values, grads, max_grad_norm=limit)
    assert opt.grad_norm.device.type == DEVICE and opt.grad_norm.dtype == torch.float64
    torch.testing.assert_close(opt.grad_norm.item(), norm_of(grads[-1]), rtol=1e-5, atol=0)
    exact = [leaf(put(v), torch.float64) for v in values]
    clip_and_step(case.exact(exact), exact, grads, limit)
    assert_all_near(params, exact)


def test_the_norm_has_the_same_bits_always_and_on_the_cpu():
    for kinds in ([torch.float32], [torch.float64], [torch.bfloat16, torch.float32, torch.float16]):
        sizes = [*SIZES, 65_535, 65_536, 65_537, 400_001]
        drawn = [
            gradient_like(torch.randn(n, dtype=torch.float64)).to(kinds[i % len(kinds)])
            for i, n in enumerate(sizes)
        ]
        norms = []
        for device, offset in [(DEVICE, 0)] * 8 + [(DEVICE, 1), (HOST, 0)]:
            params = [leaf(put(torch.zeros_like(g), device)) for g in drawn]
            for p, g in zip(params, drawn, strict=True):
                p.grad = off_by(offset, put(g, device))
            opt = fusedopt.SGD(params, max_grad_norm=1.0)
            step_on(device, opt)
            norms.append(opt.grad_norm.cpu())
        assert len({bits(norm) for norm in norms}) == 1, norms
        torch.testing.assert_close(norms[0].item(), norm_of(drawn), rtol=1e-5, atol=0)


def test_clip_grad_norm_():
    for dtype in DTYPES:
        _, (grads,) = draw([*SHAPES, (70_001,)], 1, dtype)
        runs = []
        for clip in (fusedopt.clip_grad_norm_, nn.utils.clip_grad_norm_):
            params = [torch.zeros_like(put(g)).requires_grad_() for g in grads]
            set_grads(params, grads)
            runs.append((clip(params, 2.0), [p.grad for p in params]))
        (ours, clipped), (norm, expected) = runs
        assert (ours.dtype, ours.device, ours.shape) == (norm.dtype, norm.device, norm.shape)
        assert_near(ours, norm, dtype=dtype)
        for g, h in zip(clipped, expected, strict=True):
            assert_near(g, h, dtype=dtype)


# Size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", [2**31 + 4099, 2**32 + 4099], ids=["2**31", "2**32"])
def test_large_tensors(numel):
    """p = 1 - g, every element of it, where g counts 0, 1, ..., 250, 0, ...: exact in bfloat16."""
    period, at_once = 251, 251 << 20
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * numel + 6 * at_once + 2**30:
        pytest.skip(f"needs {4 * numel / 2**30:.0f} GiB and some more, {free / 2**30:.0f} are free")
    pattern = torch.arange(period, device=DEVICE).to(torch.bfloat16).repeat(at_once // period)
    expected = 1 - pattern
    p = torch.ones(numel, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    p.grad = torch.empty_like(p)
    for begin in range(0, numel, at_once):
        part = p.grad[begin : begin + at_once]
        part.copy_(pattern[: part.numel()])
    opt = fusedopt.SGD([p], lr=1.0, max_grad_norm=float("inf"))
    opt.step()
    for begin in range(0, numel, at_once):
        part = p.detach()[begin : begin + at_once]
        if not torch.equal(part, expected[: part.numel()]):
            wrong = (part != expected[: part.numel()]).nonzero()
            pytest.fail(f"{len(wrong)} wrong, the first at {begin + wrong[0].item()}")
    full, rest = divmod(numel, period)
    squares = full * sum(i * i for i in range(period)) + sum(i * i for i in range(rest))
    torch.testing.assert_close(opt.grad_norm.item(), squares**0.5, rtol=1e-5, atol=0)
    del p, opt, part, pattern, expected
    torch.cuda.empty_cache()


# Processes ------------------------------------------------------------------------------------

FORK = """
import os, sys, traceback, torch, fusedopt

assert not torch.cuda.is_initialized()

def train(device):
    p = torch.linspace(-1, 1, 37, device=device).requires_grad_()
    opt = fusedopt.Adam([p], lr=0.1)
    for _ in range(3):
        p.grad = p.detach() * 2 + 0.3
        opt.step()
    return p.detach().cpu()

expected = train("cpu")
assert not torch.cuda.is_initialized()
child = os.fork()
if child == 0:
    try:
        torch.testing.assert_close(train("cuda"), expected)
        assert fusedopt.backend.native.num_launches() == 3
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert code == 0, code
torch.testing.assert_close(train("cuda"), expected)
"""


def test_a_fork_after_import_can_use_the_gpu():
    """Neither the import nor a step on the CPU initializes CUDA."""
    root = Path(fusedopt.__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-c", FORK],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr


# Checkpoints ----------------------------------------------------------------------------------


def moved(checkpoint, device):
    """As torch.save and torch.load have it."""
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, map_location=str(device))


@richest
@pytest.mark.parametrize("there", [HOST, DEVICE], ids=["to CPU", "to GPU"])
@pytest.mark.parametrize("mapped", [False, True], ids=["", "map_location"])
def test_checkpoints_between_devices(case, there, mapped):
    here = DEVICE if there is HOST else HOST
    values, grads = draw([(100,), (33,), (16_390,)], 4)
    past, saved = train_on(here, case.ours, values, grads[:2])
    params = [leaf(put(p, there)) for p in past]
    opt = case.ours(params)
    opt.load_state_dict(moved(saved.state_dict(), there if mapped else here))
    for now in grads[2:]:
        set_grads(params, now)
        step_on(there, opt)
    others, other = train_on(HOST, case.ours, values, grads)
    if mapped and there is DEVICE:  # the step counts too, so coefficients are computed there
        assert_all_near(params, others)
    else:
        assert_same_bits(opt, params, other, others)


MODES = [
    *((name, "capturable") for name in those_with("capturable")),
    *((name, "fused") for name in ("Adam", "AdamW", "SGD")),
]


@pytest.mark.parametrize(("name", "mode"), MODES)
@pytest.mark.parametrize("amp", [False, True], ids=["", "amp_fused"])
def test_checkpoints_of_stock_modes(name, mode, amp):
    """Both ways, with the step count on the device."""
    case = Case(name, {"lr": 0.1, **({"momentum": 0.9} if name == "SGD" else {})})
    values, grads = draw([(100,), (33,), (2049,)], 6)
    stock_cls = TABLES[name].stock
    params, checkpoint = [leaf(put(v)) for v in values], None
    for at, build in enumerate((stock_cls, getattr(fusedopt, name), stock_cls)):
        more = {"amp_fused": amp} if at == 1 else {}
        opt = build(params, **case.options, **{mode: True}, **more)
        if at:
            opt.load_state_dict(moved(checkpoint, DEVICE))
            assert opt.param_groups[0][mode] is True
        step_through(opt, params, grads[2 * at : 2 * at + 2])
        for p in params:
            if "step" in opt.state[p]:
                assert opt.state[p]["step"].device.type == DEVICE
                assert opt.state[p]["step"].item() == 2 * at + 2
        checkpoint = copy.deepcopy(opt.state_dict())
    exact, _ = train_on(DEVICE, case.exact, values, grads, torch.float64)
    assert_all_near(params, exact)


@plain
def test_a_checkpoint_of_amp_fused_in_stock(case):
    """The step counts on the device, though no group says so."""
    values, grads = draw([(100,), (33,)], 4)
    params, opt = train_on(DEVICE, case.ours, values, grads[:2], amp_fused=True)
    stock = case.stock(params)
    stock.load_state_dict(copy.deepcopy(opt.state_dict()))
    step_through(stock, params, grads[2:3])
    opt = case.ours(params)
    opt.load_state_dict(copy.deepcopy(stock.state_dict()))
    step_through(opt, params, grads[3:])
    exact, _ = train_on(DEVICE, case.exact, values, grads, torch.float64)
    assert_all_near(params, exact)


# For compute-sanitizer: small, and nothing but what was written is read -----------------------

# Sizes, and how many elements after an aligned address the tensor begins.
SMALL = [(0, 0), (1, 0), (9, 0), (2049, 0), (16_390, 0), (7, 1), (2049, 1)]


def small(case, dtype, **more):
    """Two steps, beside the same on the CPU."""
    at = [offset for _, offset in SMALL]
    values, grads = draw([(n,) for n, _ in SMALL], 2, dtype)
    params = [off_by(i, put(v)).requires_grad_() for v, i in zip(values, at, strict=True)]
    opt = case.ours(params, **more)
    for now in grads:
        for p, g, i in zip(params, now, at, strict=True):
            p.grad = off_by(i, put(g))
        opt.step()
    more.pop("capturable", None)
    return opt, params, *reversed(train_on(HOST, case.ours, values, grads, **more))


@every_dtype
def test_sanitize_rules(dtype):
    for case in RICHEST:
        assert_same_bits(*small(case, dtype))


@every_dtype
def test_sanitize_clipping(dtype):
    opt, params, other, others = small(PLAIN[0], dtype, max_grad_norm=2.0, amp_fused=True)
    assert_same_bits(opt, params, other, others)
    assert bits(opt.grad_norm) == bits(other.grad_norm)


@every_dtype
def test_sanitize_capturable(dtype):
    for case in RICHEST:
        _, params, _, others = small(case, dtype, capturable=True)
        assert_all_near(params, others)


def test_sanitize_overflow():
    params, opt = train_on(DEVICE, PLAIN[1].ours, *draw([(9,), (2049,)], 2), amp_fused=True)
    opt.grad_scale = torch.tensor(8.0, device=DEVICE)
    opt.found_inf = torch.tensor(2.0, device=DEVICE)
    before = snapshot(opt)
    opt.step()
    assert snapshot(opt) == before
