"""The average of the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import (
    assert_near,
    bits,
    draw,
    every_loop,
    leaf,
    richest,
    snapshot,
    step_through,
    train,
)
from stored import (
    BF16,
    F16,
    F32,
    F64,
    WAYS,
    assert_bits,
    every_kind,
)

import fusedopt


@every_loop
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16, torch.complex64], ids=str)
def test_ema_against_an_oracle(case, dtype, backend):
    """In float64, of the parameters that were there after each step."""
    values, grads = draw([(33,), (2, 3), (), (0,), (4,)], 5, dtype)
    grads[2][1] = grads[0][2] = None
    for now in grads:
        now[4] = None
    half = dtype.itemsize == 2
    more = {"master_weights": "fp32"} if half else {}
    params = [leaf(v) for v in values]
    opt = case.ours([{"params": params[:2]}, {"params": params[2:], "ema": 0.5}], ema=0.9, **more)
    wide = torch.complex128 if dtype.is_complex else F64
    averages = [v.to(wide) for v in values]
    for now in grads:
        step_through(opt, params, [now])
        for i, (p, g) in enumerate(zip(params, now, strict=True)):
            if g is not None:
                seen = opt.state[p]["master"] if half else p.detach()
                averages[i] += (0.1 if i < 2 else 0.5) * (seen.to(wide) - averages[i])
    for i, (ours, p) in enumerate(zip(opt.ema_parameters(), params, strict=True)):
        assert ours.dtype == (F32 if half else dtype) if i != 4 else ours is p
        if i == 4:
            assert p not in opt.state or "ema" not in opt.state[p]
            continue
        assert_near(ours, averages[i], dtype=torch.float32 if half else dtype)


@richest
@every_kind
def test_swapping_in_and_out(case, way, dtype, backend):
    """Parameters hold their averages, and then every bit is what it was; training goes on as if
    nothing had been."""
    options = {**WAYS[way][0], "ema": 0.7}
    values, grads = draw([(33,), (67, 65), ()], 4, dtype)
    for now in grads:
        now[2] = None
    params, opt = train(case.ours, values, grads[:2], **options)
    twin = copy.deepcopy(opt)
    before = snapshot(opt)
    with opt.swap_ema():
        for p, average in zip(params, opt.ema_parameters(), strict=True):
            assert_bits(p, average.to(dtype))
        assert bits(params[0]) != before[0][0]
        with pytest.raises(RuntimeError, match="swap_ema"):
            step_through(opt, params, grads[2:3])
    assert snapshot(opt) == before
    with pytest.raises(ZeroDivisionError), opt.swap_ema():
        raise ZeroDivisionError
    assert snapshot(opt) == before
    step_through(opt, params, grads[2:])
    step_through(twin, twin.param_groups[0]["params"], grads[2:])
    assert snapshot(opt)[:2] == snapshot(twin)[:2]


def test_nested_swaps(backend):
    (p,), opt = train(fusedopt.SGD, *draw([(33,)], 2), lr=1.0, ema=0.5)
    before = snapshot(opt)
    with opt.swap_ema():
        inside = snapshot(opt)
        with pytest.raises(ZeroDivisionError), opt.swap_ema():
            assert snapshot(opt) == inside
            raise ZeroDivisionError
        assert snapshot(opt) == inside
        with pytest.raises(RuntimeError, match="swap_ema"):
            opt.step()
    assert snapshot(opt) == before
    opt.step()
    assert snapshot(opt) != before


def test_averages_of_some_groups(backend):
    values, grads = draw([(3,), (4,), (5,)], 2)
    params = [leaf(v) for v in values]
    opt = fusedopt.Adam([{"params": params[:1]}, {"params": params[1:], "ema": 0.5}])
    step_through(opt, params, grads)
    opt.state[params[0]]["ema"] = torch.arange(3)  # a program's own
    first, *others = opt.ema_parameters()
    assert first is params[0]
    assert all(o is opt.state[p]["ema"] for o, p in zip(others, params[1:], strict=True))
    before = snapshot(opt)
    with opt.swap_ema():
        assert snapshot(opt)[0][0] == before[0][0] and snapshot(opt)[0][1:] != before[0][1:]
    assert snapshot(opt) == before
    plain = fusedopt.Adam(params)
    with pytest.raises(ValueError, match="ema="):
        next(plain.ema_parameters())
    with pytest.raises(ValueError, match="ema="), plain.swap_ema():
        pass


@richest
def test_a_decay_that_changes(case, backend):
    values, grads = draw([(33,)], 4)
    (p,), opt = [leaf(v) for v in values], None
    opt = case.ours([p], ema=0.0)
    average = values[0].double()
    for decay, now in zip((0.0, 0.5, 0.9, 0.1), grads, strict=True):
        opt.param_groups[0]["ema"] = decay
        step_through(opt, [p], [now])
        average += (1 - decay) * (p.detach().double() - average)
    assert_near(next(iter(opt.ema_parameters())), average)
