"""For compute-sanitizer: small, and nothing but what was written is read."""

from __future__ import annotations

import torch
from cases import RICHEST, bits, draw, every_dtype, snapshot

from on_gpu import DEVICE, HOST, PLAIN, assert_all_near, assert_same_bits, off_by, put, train_on

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
