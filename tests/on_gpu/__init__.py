"""Parameters on a GPU, stepped beside the same with stock and on the CPU."""

from __future__ import annotations

import contextlib

import pytest
import torch
from cases import TABLES, TOLERANCE, Case, leaf, snapshot
from torch import nn

import fusedopt

DEVICE = "cuda"
HOST = "cpu"
# Cycles of a GPU clock below 2.5 GHz: a quarter of a second or more, many times what a step takes.
LONG = 600_000_000
PLAIN = [
    Case(name, {"lr": 0.1} if table.slots_of({}) else {"lr": 0.1, "momentum": 0.9})
    for name, table in TABLES.items()
]
plain = pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


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


SHAPES = [(33,), (2, 3), (), (0,), (4099,)]
SIZES = [0, 1, 7, 8, 9, 2047, 2048, 2049, 16383, 16384, 16385, 100_003]


def off_by(offset, values):
    """The values in memory that begins so many elements after an aligned address."""
    base = torch.empty(values.numel() + offset, dtype=values.dtype, device=values.device)
    return base[offset:].copy_(values)


def captured(opt):
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    return graph


def refuses_capture(opt, params, grads, why):
    """The step raises an error and changes nothing; outside of a capture it goes on."""
    set_grads(params, grads)
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match=why):
        captured(opt)
    torch.cuda.synchronize()
    assert snapshot(opt) == before
    opt.step()
