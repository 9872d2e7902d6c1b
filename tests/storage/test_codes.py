"""State in 8 bits."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from cases import (
    draw,
    leaf,
    step_through,
    train,
)
from seam import formats
from stored import (
    BF16,
    F32,
    INF,
    NAN,
    assert_bits,
    assert_codes,
    decoded,
    in_blocks,
    is_code,
    noise,
    numbers,
)

import fusedopt

ROOTS = [
    ("0x1.3156b4p+37", "0x1.d4c018p+37"),
    ("-0x1.aade48p-9", "0x1.8e0540p-6"),
    ("0x1.254fbcp+32", "0x1.7ff6cap+34"),
    ("-0x1.65cad0p+17", "0x1.e14b2ep+17"),
    ("-0x1.5ed260p+48", "0x1.2cb0ecp+51"),
]


def coded(values, dtype):
    """Codes and scales of float32 values: of SGD's momentum after one step, or of Adagrad's sum,
    the squares of the values. By hand, so that small tensors have them, too."""
    p = leaf(torch.zeros_like(values))
    opt, key = fusedopt.SGD([p], lr=0.0, momentum=0.5), "momentum_buffer"
    if dtype == torch.uint8:
        opt, key = fusedopt.Adagrad([p], lr=0.0), "sum"
    opt.state[p][key] = torch.zeros_like(values, dtype=dtype)
    opt.state[p][f"{key}_scale"] = torch.zeros(math.ceil(values.numel() / 64))
    step_through(opt, [p], [[values]])
    assert opt.state[p][key].dtype == dtype
    return opt.state[p][key], opt.state[p][f"{key}_scale"]


def hard_values(count):
    """Blocks of every size of numbers, of zeros, with something that is not finite, and between."""
    values = torch.randn(count)
    blocks = in_blocks(values)
    kind = torch.randint(12, (len(blocks), 1))
    blocks = blocks * 10.0 ** torch.randint(-18, 18, (len(blocks), 1))
    blocks = torch.where(kind == 0, 0.0, blocks)
    one = torch.randint(64, (len(blocks), 1)) == torch.arange(64)
    for at, what in enumerate((INF, NAN, -INF, 3e38, 1e-44, -0.0)):
        blocks = torch.where((kind == at + 1) & one, what, blocks)
    blocks = torch.where(kind == 7, blocks.sign() * 1e-42, blocks)  # denormal, all of it
    blocks = torch.where(kind == 8, torch.where(one, 1.0, 0.0), blocks)
    blocks = torch.where(kind == 9, 1.0, blocks)
    spread = 10.0 ** -torch.linspace(0, 12, 64)
    blocks = torch.where(kind == 10, blocks.sign() * spread, blocks)
    return blocks.view(-1)[:count].clone()


COUNTS = [1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 4095, 4096, 4097, 4160, 40_001]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_codes_are_the_same_everywhere(dtype, kernels):
    for count in COUNTS:
        values = hard_values(count)
        found = []
        for module in (fusedopt.backend.native, kernels, None):
            with mock.patch.object(fusedopt.backend, "native", module):
                found.append(coded(values, dtype))
        for codes, scale in found[1:]:
            assert_bits(codes, found[0][0], f"{count} codes")
            assert_bits(scale, found[0][1], f"{count} scales")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_codes_at_their_borders(dtype, kernels):
    """Values a few bits from those with another code, where a root that is not exact would show: of
    all codes, where rounding at random turns, and where what is near to a code no longer stays."""
    count, largest = 64 * 400, torch.iinfo(dtype).max
    codes = torch.randint(1, largest + 1, (count,)).double()
    border = codes - 0.5
    if dtype == torch.uint8:
        turns = codes - noise(0x66757365646F7074, 1, count) / 65536
        keeps = codes + torch.where(torch.rand(count) < 0.5, -1, 1) * 2.0**-12
        border = torch.where(torch.rand(count) < 0.5, turns, keeps)
    power = 2 if dtype == torch.int8 else 4
    scale = 2.0 ** torch.empty(count // 64, 1, dtype=torch.float64).uniform_(-40, 100)
    values = (border / largest).view(-1, 64) ** power * scale
    values[:, :1] = scale
    # The sum of squares is what has codes if they have no sign.
    root = values if dtype == torch.int8 else values.sqrt()
    away = torch.randint(-3, 4, root.shape, dtype=torch.int32)
    away[:, 0] = 0
    near = (root.float().view(torch.int32) + away).view(F32)
    values = near.view(-1) * torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    found = []
    for module in (fusedopt.backend.native, kernels, None):
        with mock.patch.object(fusedopt.backend, "native", module):
            found.append(coded(values, dtype)[0])
    assert_bits(found[1], found[0], "the GPU's kernels")
    assert_bits(found[2], found[0], "the Python rules")


def test_roots_between_two_codes(native):
    """A root that is off by one bit gives another code for these numbers, as MKL's did."""
    for value, scale in ROOTS:
        values = torch.zeros(64)
        values[0], values[1] = float.fromhex(scale), float.fromhex(value)
        found = []
        for module in (fusedopt.backend.native, None):
            with mock.patch.object(fusedopt.backend, "native", module):
                found.append(coded(values.repeat(64), torch.int8)[0])
        assert_bits(found[1], found[0], value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_codes_are_near(dtype, backend):
    for count in COUNTS:
        values = hard_values(count)
        codes, scale = coded(values, dtype)
        stored = values if dtype == torch.int8 else values * values
        random = None if dtype == torch.int8 else noise(0x66757365646F7074, 1, count)
        assert_codes(codes, scale, stored, random)
        found, exact = decoded(codes, scale), stored.double()
        fine = (scale > 1e-30) & scale.isfinite()
        fine = fine.repeat_interleave(64)[:count]
        largest = scale.double().repeat_interleave(64)[:count]
        power = 0.5 if dtype == torch.int8 else 0.25
        step = 0.5 / 127 if dtype == torch.int8 else 1 / 255
        error = (found / largest).abs() ** power - (exact / largest).abs() ** power
        assert (error[fine].abs() <= step * 1.001).all()
        assert (found * exact >= 0)[fine].all()
        # The module's own decoding, which may differ in the last bits.
        again = formats.decode(codes, scale).double()
        assert ((again - found).abs()[fine] <= 1e-6 * found.abs()[fine] + 1e-45).all()
        assert (again[~fine & ~largest.isfinite()].isfinite() == 0).all()


def test_a_second_moment_never_becomes_zero(backend):
    values = 10.0 ** torch.empty(5000).uniform_(-9, 0)
    codes, scale = coded(values, torch.uint8)
    assert (formats.decode(codes, scale) > 0).all()
    for name in ("Adam", "RMSprop"):  # and the steps are no larger for it
        p = leaf(torch.zeros(4096))
        opt = getattr(fusedopt, name)([p], lr=0.1, state_dtype="8bit")
        for _ in range(3):
            before = p.detach().clone()
            p.grad = 10.0 ** torch.empty(4096).uniform_(-9, 0)
            opt.step()
        assert ((p - before).abs() <= 1.5).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_codes_of_a_value_that_does_not_change_stay(dtype, backend):
    """All codes at all sizes of scales. A step with the momentum 1 and a gradient of 0 changes no
    buffer, and one with a gradient of 0 no sum."""
    p = leaf(torch.zeros(80 * 64))
    opt, key = fusedopt.SGD([p], lr=0.0, momentum=1.0), "momentum_buffer"
    codes = torch.arange(-127, 129).repeat(20).view(80, 64)
    if dtype == torch.uint8:
        opt, key = fusedopt.Adagrad([p], lr=0.0), "sum"
        codes = codes + 127
    codes[:, 5] = torch.iinfo(dtype).max
    codes = codes.clamp(max=torch.iinfo(dtype).max).to(dtype).view(-1)
    scales = 2.0 ** torch.empty(80).uniform_(-80, 100)
    opt.state[p] |= {key: codes.clone(), f"{key}_scale": scales.clone()}
    p.grad = torch.zeros_like(p)
    for _ in range(150):
        opt.step()
    assert_bits(opt.state[p][key], codes)
    assert_bits(opt.state[p][f"{key}_scale"], scales)


@pytest.mark.parametrize("size", [0.0, 1.5])
def test_small_changes_of_second_moments_arrive_on_average(size, backend):
    """With the decay of 0.999 a step changes less than half a code: to nearest, nothing would move.
    The mean of many is that without codes, up to 1.5 of a change for each code that there is below
    it, as codes are evenly spaced in the fourth root and not in the value."""
    first = torch.empty(64 * 200).uniform_(0.5, 1.0)
    ends = []
    for more in ({"state_dtype": "8bit"}, {}):
        p = leaf(torch.zeros_like(first))
        opt = fusedopt.RMSprop([p], lr=0.0, alpha=0.0, **more)
        step_through(opt, [p], [[first]])
        start = numbers(opt.state[p])["square_avg"].mean()
        opt.param_groups[0]["alpha"] = 0.999
        step_through(opt, [p], [[first * size]] * 100)
        ends.append(numbers(opt.state[p])["square_avg"].mean() / start - 1)
    assert abs(ends[1]) > 0.09
    assert abs(ends[0] - ends[1]) < 0.005


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_bytes_of_a_parameter(name, backend):
    (p,), opt = train(
        getattr(fusedopt, name),
        *draw([(512, 129)], 2, BF16),
        master_weights="split",
        state_dtype="8bit",
    )
    tensors = [p, p.grad, *(v for v in opt.state[p].values() if v.ndim)]
    assert {v.dtype for v in tensors} == {BF16, torch.int16, torch.int8, torch.uint8, F32}
    assert sum(t.untyped_storage().nbytes() for t in tensors) / p.numel() <= 8.3


def test_centered_variances_are_not_negative(backend):
    """The mean of gradients is almost all of their mean square."""
    p = leaf(torch.zeros(4096))
    opt = fusedopt.RMSprop([p], lr=1e-3, centered=True, momentum=0.5, state_dtype="8bit")
    opt.state[p] = {
        "step": torch.tensor(1000.0),
        "square_avg": torch.full((4096,), 1.0001),
        "grad_avg": torch.ones(4096),
        "momentum_buffer": torch.zeros(4096),
    }
    for _ in range(5):
        p.grad = 1 + 0.01 * torch.randn(4096)
        opt.step()
    assert p.isfinite().all()
    assert is_code(opt.state[p]["momentum_buffer"]) and not is_code(opt.state[p]["grad_avg"])
