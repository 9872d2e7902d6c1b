"""Parameters, gradients and state in any layout, of any size, at any alignment."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
import torch
from cases import (
    EXTRAS,
    GRAD_LAYOUTS,
    LAYOUTS,
    LOOPS,
    SCALARS,
    assert_near,
    assert_trained_alike,
    bits,
    draw,
    every_dtype,
    every_loop,
    gradient_like,
    leaf,
    richest,
    same_bits,
    step_through,
    train,
)


def placed(layout, values):
    """A leaf in a layout, and the memory around it."""
    tensor, around = layout(values)
    return tensor.detach(), around


# A few steps must not distinguish a layout from the float64 oracle on contiguous tensors.
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *product(LOOPS, [torch.float32, torch.bfloat16]),
        *product([c for c in LOOPS if not {*c.options} & {*EXTRAS}], [torch.complex64]),
    ],
    ids=str,
)
def test_every_layout_with_every_gradient_layout(case, dtype, backend):
    """All pairs are parameters of one optimizer. Each has two shapes of five, others for each case:
    all of them take long."""
    shapes = [(3, 4, 5, 2), (4, 1, 3, 5), (1, 1, 1, 1), (2, 0, 3, 1), (2, 17, 3, 3)]
    params, around, truth, what = [], [], [], []
    for (p_name, p_layout), (g_name, g_layout), shape in (
        (*pair, shape)
        for pair in product(LAYOUTS.items(), GRAD_LAYOUTS.items())
        for shape in random.sample(shapes, 2)
    ):
        values, ((first,), (second,)) = draw([shape], 2, torch.float32)
        values, first, second = (
            (1 + 1j) * t if dtype.is_complex else t for t in (values[0], first, second)
        )
        param, beside = placed(p_layout, values.to(dtype))
        grads = [g_layout(g.to(dtype))[0] for g in (first, second)]
        params.append(param.requires_grad_())
        around += beside
        truth.append(grads)
        what.append(f"{p_name} {shape} with {g_name} gradient")
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = [leaf(p.detach().contiguous(), wide) for p in params]
    strides = [p.stride() for p in params]
    pointers = [p.data_ptr() for p in params]
    opt, oracle = case.ours(params), case.exact(exact)
    before = [bits(t) for t in around]
    for now in zip(*truth, strict=True):
        grad_bits = [bits(g) for g in now]
        for p, q, g in zip(params, exact, now, strict=True):
            p.grad, q.grad = g, g.to(wide)
        opt.step()
        oracle.step()
        assert [bits(p.grad) for p in params] == grad_bits
    assert [bits(t) for t in around] == before
    assert [p.stride() for p in params] == strides
    assert [p.data_ptr() for p in params] == pointers
    for p, q, name in zip(params, exact, what, strict=True):
        assert_near(p, q, name, torch.complex64 if dtype.is_complex else dtype)
        for key, value in opt.state[p].items():
            if key not in SCALARS and dtype != torch.bfloat16:
                assert_near(value, oracle.state[q][key], f"{key}, {name}", dtype)


COUNTS = [*range(34), 63, 64, 65, 255, 256, 257, 4095, 4096, 4097]


def _segments(buffer, shift, counts, per_16):
    """Views of a buffer, each ``shift`` elements after a multiple of 16, with gaps between."""
    views, at = [], 16 + shift
    for count in counts:
        views.append(buffer[at : at + count])
        at += math.ceil((count + 5) / per_16) * per_16
    return views


def _room(counts):
    return sum(math.ceil((count + 5) / 16) * 16 for count in counts) + 64


@every_loop
@every_dtype
def test_every_count_at_every_misalignment(case, dtype, backend):
    """Against one long parameter, with sentinels around each short one, and around its state,
    whose alignment differs from the parameter's."""
    shifts = [1] if backend == "python" else range(16)
    keys = [key for key in _state_keys(case) if key not in SCALARS]
    params, grads, flat, truth, gaps = [], [], [], [], []
    for shift in shifts:
        values, ((first,), (second,)) = draw([(sum(COUNTS),)], 2, dtype)
        buffer = torch.full((_room(COUNTS),), 7.0, dtype=dtype)
        views = _segments(buffer, shift, COUNTS, 16)
        for view, chunk in zip(views, values[0].split(COUNTS), strict=True):
            view.copy_(chunk)
        gaps.append((buffer, views))
        params += [v.detach().requires_grad_() for v in views]
        grads.append([*zip(first.split(COUNTS), second.split(COUNTS), strict=True)])
        flat.append(values[0])
        truth.append([first, second])
    opt = case.ours(params)
    short = [pair for chunk in grads for pair in chunk]

    def step(which):
        for at, (p, pair) in enumerate(zip(params, short, strict=True)):
            grad = torch.empty(len(p) + 15, dtype=dtype)[(at * 7) % 16 :][: len(p)]
            p.grad = grad.copy_(pair[which])
        opt.step()

    step(0)
    for offset, key in enumerate(keys):
        for number, shift in enumerate(shifts):
            buffer = torch.full((_room(COUNTS),), 7.0, dtype=dtype)
            views = _segments(buffer, (shift + 3 * offset + 5) % 16, COUNTS, 16)
            for p, view in zip(params[number * len(COUNTS) :], views, strict=False):
                opt.state[p][key] = view.copy_(opt.state[p][key])
            gaps.append((buffer, views))
    outside = [_outside(buffer, views) for buffer, views in gaps]
    step(1)
    assert [_outside(buffer, views) for buffer, views in gaps] == outside

    long = [leaf(v) for v in flat]
    reference = case.ours(long)
    step_through(reference, long, [*zip(*truth, strict=True)])
    parts = [(torch.cat([p.detach() for p in params]), torch.cat([p.detach() for p in long]))]
    for key in keys:
        parts.append(
            tuple(
                torch.cat([o.state[p][key] for p in ps])
                for o, ps in ((opt, params), (reference, long))
            )
        )
    for ours, expected in parts:
        if backend != "python":
            assert same_bits(ours, expected)
        else:
            assert_near(ours, expected)


def _state_keys(case):
    (param,), opt = train(case.ours, [torch.ones(1)], [[torch.ones(1)]])
    return opt.state[param].keys()


def _outside(buffer, views):
    """The bits of a buffer without those of the views."""
    mask = torch.ones(len(buffer), dtype=torch.bool)
    for view in views:
        mask[view.storage_offset() : view.storage_offset() + len(view)] = False
    return bits(buffer[mask])


@richest
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_late_first_gradient_in_every_layout(case, layout, dtype, backend):
    """Next to a parameter that has been stepping all the time."""
    values = [torch.randn(2, 3, 4, 2).to(dtype) for _ in range(2)]
    grads = [[gradient_like(v) for v in values] for _ in range(5)]
    for now in grads[:2]:
        now[1] = None
    params = [leaf(values[0]), placed(layout, values[1])[0].requires_grad_()]
    opt = case.ours(params)
    step_through(opt, params, grads)
    exact, oracle = train(case.stock, values, grads)
    assert_trained_alike(opt, params, oracle, exact)
