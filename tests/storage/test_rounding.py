"""Stochastic rounding of parameters."""

from __future__ import annotations

import copy
import ctypes
import math

import pytest
import torch
from cases import (
    bits,
    draw,
    leaf,
    richest,
    snapshot,
    step_through,
    train,
)
from seam import formats
from stored import (
    BF16,
    F32,
    F64,
    INF,
    NAN,
    assert_bits,
    from_bits,
    int_bits,
    noise,
    philox,
    rounded_at_random,
)

import fusedopt

# Bit for bit the same as without options, which torch would compute.
pytestmark = pytest.mark.usefixtures("only_by_the_rule")

# Random123's known answers for philox4x32 with 10 rounds: four words of the counter, two of the
# key, four of the result.
KNOWN = [
    f"{4 * '00000000 '}{2 * '00000000 '}6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    f"{4 * 'ffffffff '}{2 * 'ffffffff '}408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
]


@pytest.mark.parametrize("known", KNOWN)
def test_philox(known, library):
    """The lower half of the counter is the block, the upper the step, the lowest word first."""
    c0, c1, c2, c3, k0, k1, *expected = (int(word, 16) for word in known.split())
    key, step, block = k0 + (k1 << 32), c2 + (c3 << 32), c0 + (c1 << 32)
    words = (ctypes.c_uint32 * 4)()
    library.philox_words(key, step, block, words)
    assert list(words) == expected
    assert philox(key, step, [block])[0].tolist() == expected


def test_the_python_philox_is_that_of_the_module(library):
    for count in (0, 1, 7, 8, 9, 1001):
        key, step = (int(torch.randint(2**62, ())) for _ in range(2))
        words = (ctypes.c_uint32 * 4)()
        expected = []
        for block in range((count + 7) // 8):
            library.philox_words(key, step, block, words)
            expected += [half for word in words for half in (word & 0xFFFF, word >> 16)]
        assert formats.random_bits(key, step, count).tolist() == expected[:count]
        assert noise(key, step, count).tolist() == expected[:count]


def test_rounding_of_special_values(backend):
    """What is infinite or NaN stays; what is beyond the largest may become infinite; denormals are
    rounded like all others. Over chunks and blocks."""
    usual, small = [0.0, -0.0, 1.0, -2.0], [1e-40, -1e-42, 1.1754943e-38]
    special = torch.tensor([*usual, *small, INF, -INF, NAN, 3.3895e38, -3.3895e38])
    values = special.repeat_interleave(9000)[torch.randperm(9000 * len(special))].bfloat16()
    grads = torch.randn(len(values)).bfloat16()
    p = leaf(values)
    opt = fusedopt.SGD([p], lr=0.37, rounding="stochastic")
    p.grad = grads
    for at, lr in enumerate((0.37, 0.0, 0.37)):
        before = p.detach().clone()
        opt.param_groups[0]["lr"] = lr
        opt.step()
        seed, count = opt.state[p]["rounding_state"].tolist()
        assert count == at + 1 and 0 <= seed < 2**62
        exact = before.float() - torch.tensor(lr) * grads.float()
        assert_bits(p, rounded_at_random(exact, torch.tensor([seed, at])))
        assert torch.equal(p.isnan(), values.isnan())
        if lr == 0.0:  # what needs no rounding is not rounded
            assert ((p == before) | p.isnan()).all()


def test_rounding_is_unbiased(backend):
    """Up as often as the share of the gap that the value is above the lower neighbour."""
    lower = torch.tensor([1.0, -1.0, 1.5, -37.0, 2.0**-130, 255.0])
    shares = torch.tensor([0x0400, 0x4000, 0x7FFF, 0x8000, 0xC001, 0xFC00])
    grid, times, rounds = torch.cartesian_prod(torch.arange(6), torch.arange(6)), 2500, 4
    low, share = (column.repeat_interleave(times) for column in grid.unbind(1))
    low, share = lower[low], shares[share]
    exact, high = (from_bits(int_bits(low) + more, F32) for more in (share, 0x10000))
    ups = torch.zeros(len(grid), dtype=F64)
    for _ in range(rounds):
        p = leaf(low.bfloat16())
        # A float32 momentum moves the parameter to any value.
        opt = fusedopt.SGD([p], lr=1.0, momentum=1.0, rounding="stochastic", state_dtype=F32)
        opt.state[p]["momentum_buffer"] = low - exact
        step_through(opt, [p], [[torch.zeros_like(p)]])
        assert ((p == low) | (p == high)).all()
        ups += (p == high).view(-1, times).sum(1)
    chance, count = shares[grid[:, 1]].double() / 2**16, rounds * times
    assert ((ups - count * chance).abs() <= 6 * (count * chance * (1 - chance)).sqrt()).all()


def test_small_steps_are_not_lost(backend):
    """To nearest, a thousandth of 1 never leaves it."""
    runs = {}
    for rounding in (None, "stochastic"):
        p = leaf(torch.ones(20_000, dtype=BF16))
        opt = fusedopt.SGD([p], lr=1e-3, rounding=rounding)
        p.grad = torch.ones_like(p)
        for _ in range(40):
            opt.step()
        runs[rounding] = p.detach().double().mean().item()
    assert runs[None] == 1.0
    # Steps are up or down by 2^-8 at most: the mean of so many is within 6 of its deviations.
    assert abs(runs["stochastic"] - 0.96) < 6 * 2**-8 * math.sqrt(40 * 0.25 / 20_000)


@richest
def test_rounding_is_reproducible(case, backend):
    """By the seed of torch; every tensor has random bits of its own."""
    values, grads = draw([(300,), (300,), (17, 9)], 3, BF16)
    values[1], grads = values[0].clone(), [[now[0], now[0], now[2]] for now in grads]

    def run(number):
        torch.manual_seed(number)
        return train(case.ours, values, grads, rounding="stochastic")

    params, opt = run(3)
    assert snapshot(opt) == snapshot(run(3)[1])
    assert bits(params[0]) != bits(run(4)[0][0]) and bits(params[0]) != bits(params[1])
    seeds = {opt.state[p]["rounding_state"][0].item() for p in params}
    assert len(seeds) == 3


@richest
def test_rounding_does_not_depend_on_the_order_of_parameters(case, backend):
    values, grads = draw([(300,), (33,), (17, 9), (5000,)], 4, BF16)
    params, opt = train(case.ours, values, grads[:2], rounding="stochastic", state_dtype="8bit")
    other = copy.deepcopy(opt)
    moved = other.param_groups[0]["params"]
    step_through(opt, params, grads[2:])
    order = [2, 0, 3, 1]
    there = list(moved)
    moved[:] = [there[i] for i in order]
    step_through(other, [there[i] for i in order], [[now[i] for i in order] for now in grads[2:]])
    for p, q in zip(params, there, strict=True):
        assert_bits(p, q)
        for key, value in opt.state[p].items():
            assert_bits(other.state[q][key], value, key)
