"""The machine for PTX against arithmetic in exact numbers and in Python's integers; and that it
notices what a kernel must not do."""

from __future__ import annotations

import math
import random
import struct
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SEED
from ptx.launch import Grid, Launcher
from ptx.machine import Module
from ptx.memory import Fault, Region
from ptx.parse import Unsupported

INF, NAN = math.inf, math.nan

HEAD = """
.version 8.0
.target sm_90
.visible .entry kernel(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 out)
{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<19>;
    .reg .f32 %f<9>;
    .reg .f64 %d<9>;
    .reg .b64 %rd<19>;
    .shared .align 16 .b8 room[1024];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mad.lo.u32 %r2, %r1, 64, %r0;
"""
THREADS = 64


def launch(body: str, *arrays: np.ndarray, blocks: int = 1, **options: Any) -> None:
    """Of a kernel with up to three inputs, the last array is the output."""
    given = [*arrays[:-1], *[arrays[-1]] * (5 - len(arrays))]
    params = struct.pack("<4Q", *(array.ctypes.data for array in given[:4]))
    regions = [
        Region(f"array {k}", array.ctypes.data, array.nbytes, writable=array is arrays[-1])
        for k, array in enumerate(arrays)
    ]
    fine = options.pop("fine", False)
    grid = Grid("kernel", blocks, THREADS, params, regions, [-1] * blocks)
    Launcher(**options).run(Module(HEAD + body + "\nret;\n}", fine), grid)


def apply(line: str, registers: str, kinds: str, *inputs: Any, result: str = "") -> np.ndarray:
    """What one instruction makes of arrays: it reads {0}, {1}, {2} and writes {out}. ``registers``
    are the prefixes of inputs and output, ``kinds`` the types they are loaded and stored as."""
    types = {
        "f32": "f4",
        "f64": "f8",
        "u16": "u2",
        "u32": "u4",
        "s32": "i4",
        "u64": "u8",
        "s64": "i8",
    }
    kinds = kinds.split()
    arrays = [np.array(x, types[kind]) for x, kind in zip(inputs, kinds, strict=False)]
    count = len(arrays[0])
    assert count <= THREADS
    out = np.zeros(count, types[kinds[-1]])
    prefixes = registers.split()
    lines = [f"setp.ge.u32 %p0, %r2, {count}; @%p0 ret;"]
    for k, (kind, prefix) in enumerate(zip(kinds[:-1], prefixes, strict=False)):
        lines += address("abc"[k], arrays[k].itemsize)
        lines.append(f"ld.global.{kind} {prefix}{4 + k}, [%rd2];")
    names = [f"{prefix}{4 + k}" for k, prefix in enumerate(prefixes[:-1])]
    lines.append(line.format(*names, out=f"{prefixes[-1]}8"))
    lines += address("out", out.itemsize)
    lines.append(f"st.global.{kinds[-1]} [%rd2], {prefixes[-1]}8;")
    given = [*arrays, *[arrays[-1]] * (3 - len(arrays))]
    launch("\n".join(lines), *given, out)
    return out


def address(param: str, size: int) -> list[str]:
    return [f"ld.param.u64 %rd1, [{param}];", f"mad.wide.u32 %rd2, %r2, {size}, %rd1;"]


def floats(dtype: Any, count: int = 60) -> np.ndarray:
    """Of any exponent, and those that are special."""
    special = [0.0, -0.0, INF, -INF, NAN, 1e-45, 1e-310, 3e-39, -2.5, 1.5, 0.5, 1.0]
    size = np.dtype(dtype).itemsize
    bits = np.random.default_rng(random.randrange(2**31)).integers(0, 256, (count, size), np.uint8)
    found = bits.view(dtype)[:, 0].copy()
    with np.errstate(all="ignore"):
        found[: len(special)] = np.array(special).astype(dtype)
    np.random.default_rng(SEED).shuffle(found)
    return found


def assert_same(found: np.ndarray, expected: Any) -> None:
    expected = np.array(expected, found.dtype)
    nan = np.isnan(found)
    assert (nan == np.isnan(expected)).all()
    raw = f"u{found.itemsize}"
    assert (found.view(raw)[~nan] == expected.view(raw)[~nan]).all(), (found, expected)


# Arithmetic -----------------------------------------------------------------------------------

WIDE = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}


@pytest.mark.parametrize("name", WIDE)
def test_float32_is_rounded_once(name):
    """float64 has more than twice its digits: rounding its result again changes nothing."""
    a, b = floats("f4"), floats("f4")
    with np.errstate(all="ignore"):
        expected = WIDE[name](a.astype("f8"), b.astype("f8")).astype("f4")
    found = apply(f"{name}.rn.f32 {{out}}, {{0}}, {{1}};", "%f %f %f", "f32 f32 f32", a, b)
    assert_same(found, expected)
    assert (found.view("u4")[np.isnan(found)] == 0x7FFFFFFF).all()


def test_square_root():
    a = floats("f4")
    with np.errstate(all="ignore"):
        expected = np.sqrt(a.astype("f8")).astype("f4")
    assert_same(apply("sqrt.rn.f32 {out}, {0};", "%f %f", "f32 f32", a), expected)


@pytest.mark.parametrize(("name", "exact"), [("sqrt", np.sqrt), ("rcp", np.reciprocal)])
def test_approximations(name, exact):
    """Within 2^-23 of the result, on both sides of it, and seldom it."""
    a = np.random.default_rng(random.randrange(2**31)).uniform(0.1, 10, 64).astype("f4")
    found = apply(f"{name}.approx.ftz.f32 {{out}}, {{0}};", "%f %f", "f32 f32", a)
    error = found.astype("f8") / exact(a.astype("f8")) - 1
    assert (np.abs(error) <= 2.0**-23).all()
    assert (error > 2.0**-25).mean() > 0.1 and (error < -(2.0**-25)).mean() > 0.1
    special = [0.0, 1e-40, INF, NAN, -1.0]
    found = apply(f"{name}.approx.ftz.f32 {{out}}, {{0}};", "%f %f", "f32 f32", special)
    expected = [0.0, 0.0, INF, NAN, NAN] if name == "sqrt" else [INF, INF, 0.0, NAN, found[-1]]
    assert_same(found, expected)


def test_fused_multiply_and_add_is_exact():
    exponents = np.random.default_rng(SEED).integers(-300, 300, (3, 50))
    a, b, c = (
        np.ldexp(np.random.default_rng(k).standard_normal(50), e) for k, e in enumerate(exponents)
    )
    c[::2] = -a[::2] * b[::2]
    expected = []
    for x, y, z in zip(a, b, c, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        try:
            expected.append(float(exact))
        except OverflowError:
            expected.append(INF if exact > 0 else -INF)
    keep = np.isfinite(a * b)
    found = apply("fma.rn.f64 {out}, {0}, {1}, {2};", "%d %d %d %d", "f64 f64 f64 f64", a, b, c)
    assert (found[keep] == np.array(expected)[keep]).all()


@pytest.mark.parametrize(("name", "pick"), [("min", min), ("max", max)])
def test_extremes(name, pick):
    a, b = [1, NAN, NAN, 0.0, -0.0, INF], [2, 1, NAN, -0.0, 0.0, -INF]
    found = apply(f"{name}.f32 {{out}}, {{0}}, {{1}};", "%f %f %f", "f32 f32 f32", a, b)
    zero = -0.0 if pick is min else 0.0
    assert_same(found, [pick(1, 2), 1, NAN, zero, zero, pick(INF, -INF)])


def test_what_keeps_a_nan_and_a_sign():
    a, b = [1, NAN, 3, -0.0, -INF, -NAN], [2, 1, NAN, 0.0, 5, 4]
    found = apply("max.NaN.f32 {out}, {0}, {1};", "%f %f %f", "f32 f32 f32", a, b)
    assert_same(found, [2, NAN, NAN, 0.0, 5, NAN])
    found = apply("copysign.f32 {out}, {0}, {1};", "%f %f %f", "f32 f32 f32", a, b)
    assert (np.signbit(found) == np.signbit(a)).all()
    assert_same(np.abs(found), np.abs(b).astype("f4"))


# Bits -----------------------------------------------------------------------------------------


def words(bits: int = 32, count: int = 60) -> list[int]:
    return [random.getrandbits(bits) for _ in range(count)]


def signed(x: int, bits: int = 32) -> int:
    return x - (x >> bits - 1 << bits)


MASK = 2**32 - 1
INTEGERS = {
    "add.s32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "min.s32": lambda a, b: min(signed(a), signed(b)),
    "max.u32": max,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "rem.u32": lambda a, b: a % b,
    "div.s32": lambda a, b: int(Fraction(signed(a), signed(b))),
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> b,
    "shr.s32": lambda a, b: signed(a) >> b,
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name):
    a, b = words(), [word or 1 for word in words()]
    if name.startswith("sh"):
        b = [random.choice([0, 1, 7, 31, 32, 33, 200, MASK]) for _ in a]
    expected = [
        INTEGERS[name](x, min(y, 300)) & MASK if name[:2] == "sh" else INTEGERS[name](x, y) & MASK
        for x, y in zip(a, b, strict=True)
    ]
    found = apply(f"{name} {{out}}, {{0}}, {{1}};", "%r %r %r", "u32 u32 u32", a, b)
    assert found.tolist() == expected


def test_wide_products_and_sums():
    a, b, c = words(), words(), words(64)
    given = ("%r %r %rd %rd", "u32 u32 u64 u64", a, b, c)
    found = apply("mad.wide.u32 {out}, {0}, {1}, {2};", *given)
    assert found.tolist() == [x * y + z & 2**64 - 1 for x, y, z in zip(a, b, c, strict=True)]
    found = apply("mul.wide.s32 {out}, {0}, {1};", *given)
    products = [signed(x) * signed(y) & 2**64 - 1 for x, y in zip(a, b, strict=True)]
    assert found.tolist() == products


def test_bytes_and_fields():
    a, b, c = words(), words(), words()
    given = ("%r %r %r %r", "u32 u32 u32 u32", a, b, c)
    found = apply("prmt.b32 {out}, {0}, {1}, {2};", *given)
    for x, y, z, word in zip(a, b, c, found, strict=True):
        source = (y << 32 | x).to_bytes(8, "little")
        for place, byte in enumerate(int(word).to_bytes(4, "little")):
            chosen = z >> 4 * place & 15
            picked = source[chosen & 7]
            assert byte == ((255 if picked & 128 else 0) if chosen & 8 else picked)
    found = apply("shf.l.wrap.b32 {out}, {0}, {1}, {2};", *given)
    both = [y << 32 | x for x, y in zip(a, b, strict=True)]
    assert found.tolist() == [(w << (z & 31)) >> 32 & MASK for w, z in zip(both, c, strict=True)]
    found = apply("shf.r.clamp.b32 {out}, {0}, {1}, {2};", *given)
    assert found.tolist() == [w >> min(z, 32) & MASK for w, z in zip(both, c, strict=True)]
    found = apply("lop3.b32 {out}, {0}, {1}, {2}, 0xCA;", *given)  # a ? b : c
    assert found.tolist() == [x & y | ~x & z & MASK for x, y, z in zip(a, b, c, strict=True)]
    found = apply("bfe.u32 {out}, {0}, 5, 11;", *given)
    assert found.tolist() == [x >> 5 & 0x7FF for x in a]
    found = apply("bfe.s32 {out}, {0}, 5, 11;", *given)
    assert found.tolist() == [((x >> 5 & 0x7FF ^ 0x400) - 0x400) & MASK for x in a]
    found = apply("bfe.s32 {out}, {0}, 24, 11;", *given)  # beyond the last bit
    assert found.tolist() == [((x >> 24 ^ 0x80) - 0x80) & MASK for x in a]
    found = apply("bfi.b32 {out}, {0}, {1}, 8, 5;", *given)
    assert found.tolist() == [y & ~0x1F00 | (x & 31) << 8 for x, y in zip(a, b, strict=True)]


# Comparing and converting -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"),
    {
        "lt": (1, 0, 0, 0), "ge": (0, 1, 1, 0), "eq": (0, 0, 1, 0), "ne": (1, 1, 0, 0),
        "ltu": (1, 0, 0, 1), "geu": (0, 1, 1, 1), "equ": (0, 0, 1, 1), "neu": (1, 1, 0, 1),
        "num": (1, 1, 1, 0), "nan": (0, 0, 0, 1),
    }.items(),
)  # fmt: skip
def test_comparisons_with_what_is_no_number(how, expected):
    a, b = [1, 2, 0.0, NAN], [2, 1, -0.0, 1]
    line = f"setp.{how}.f32 %p1, {{0}}, {{1}}; selp.u32 {{out}}, 1, 0, %p1;"
    assert tuple(apply(line, "%f %f %r", "f32 f32 u32", a, b)) == expected


def test_a_comparison_with_another_predicate():
    line = (
        "setp.ne.u32 %p2, {1}, 0; setp.lt.and.s32 %p1|%p3, {0}, 0, !%p2;"
        "selp.u32 %r9, 1, 0, %p1; selp.u32 %r10, 2, 0, %p3; add.u32 {out}, %r9, %r10;"
    )
    found = apply(line, "%r %r %r", "s32 u32 u32", [-1, -1, 1, 1], [0, 1, 0, 1])
    assert found.tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize(
    ("mode", "of_ties"),
    [("rzi", (2, -2, 0)), ("rni", (2, -2, 0)), ("rmi", (2, -3, 0)), ("rpi", (3, -2, 1))],
)
def test_to_integers(mode, of_ties):
    a = [2.5, -2.5, 0.25, 3e9, -3e9, INF, -INF, NAN, 2147483520.0]
    found = apply(f"cvt.{mode}.s32.f32 {{out}}, {{0}};", "%f %r", "f32 s32", a)
    low, high = -(2**31), 2**31 - 1
    assert found.tolist() == [*of_ties, high, low, high, low, 0, 2147483520]


@pytest.mark.parametrize(("name", "dtype"), [("bf16x2", torch.bfloat16), ("f16x2", torch.float16)])
def test_halves(name, dtype):
    a, b = floats("f4"), floats("f4")
    found = apply(f"cvt.rn.{name}.f32 {{out}}, {{0}}, {{1}};", "%f %f %r", "f32 f32 u32", a, b)
    for part, numbers in ((found >> 16, a), (found & 0xFFFF, b)):
        expected = torch.tensor(numbers).to(dtype)
        bits = expected.view(torch.int16).numpy().view("u2")
        nan = expected.isnan().numpy()
        assert (part[~nan] == bits[~nan]).all()
        assert (part[nan] == 0x7FFF).all()


def test_half_to_float_and_back():
    line = "cvt.f32.f16 %f1, {0}; cvt.rn.f16.f32 {out}, %f1;"
    halves = [*range(0, 0x7C00, 0x300), 1, 0x3FF, 0x8001, 0xFC00]
    assert apply(line, "%h %h", "u16 u16", halves).tolist() == halves


def test_numbers_between_types():
    a = floats("f8")
    with np.errstate(all="ignore"):
        expected = a.astype("f4")
    assert_same(apply("cvt.rn.f32.f64 {out}, {0};", "%d %f", "f64 f32", a), expected)
    whole = [2**24 + 1, -(2**24) - 3, 2**31 - 1, -5]
    found = apply("cvt.rn.f32.s32 {out}, {0};", "%r %f", "s32 f32", whole)
    assert found.tolist() == [2**24, -(2**24) - 4, 2**31, -5]
    found = apply("cvt.s64.s32 {out}, {0};", "%r %rd", "s32 s64", whole)
    assert found.tolist() == whole
    assert apply("cvt.u32.u8 {out}, {0};", "%h %r", "u16 u32", [0x1FF, 7]).tolist() == [255, 7]
    line = "cvt.s16.s8 %h1, {0}; cvt.s32.s16 {out}, %h1;"
    assert apply(line, "%h %r", "u16 s32", [0x1FF, 0x7F]).tolist() == [-1, 127]


# Ways -----------------------------------------------------------------------------------------


def test_threads_go_round_as_often_as_each_wants():
    line = "mov.u32 {out}, 0; again: add.u32 {out}, {out}, 3; sub.u32 {0}, {0}, 1;"
    line += "setp.ne.u32 %p1, {0}, 0; @%p1 bra again;"
    counts = [random.randrange(1, 50) for _ in range(THREADS)]
    assert apply(line, "%r %r", "u32 u32", counts).tolist() == [3 * n for n in counts]


def test_guards_and_calls():
    function = """
    .func (.param .b64 back) twice(.param .b64 given)
    { .reg .f64 %d<4>; ld.param.f64 %d1, [given+0]; add.rn.f64 %d2, %d1, %d1;
      st.param.f64 [back+0], %d2; ret; }
    """
    body = """
    setp.lt.u32 %p1, %r0, 32;
    cvt.rn.f64.u32 %d1, %r0;
    @!%p1 bra after;
    { .param .b64 p0; .param .b64 r0; st.param.f64 [p0+0], %d1;
      call.uni (r0), twice, (p0); ld.param.f64 %d1, [r0+0]; }
    after: ld.param.u64 %rd1, [out]; mad.wide.u32 %rd2, %r0, 8, %rd1;
    @%p1 st.global.f64 [%rd2], %d1;
    """
    out = np.full(THREADS, -1.0)
    params = struct.pack("<4Q", *[out.ctypes.data] * 4)
    grid = Grid("kernel", 1, THREADS, params, [Region("out", out.ctypes.data, out.nbytes)], [-1])
    Launcher().run(Module(function + HEAD + body + "ret; }"), grid)
    assert out.tolist() == [2.0 * n if n < 32 else -1 for n in range(THREADS)]


EXCHANGE = """
    mov.u32 %r5, room; shl.b32 %r6, %r0, 2; add.u32 %r7, %r5, %r6;
    st.shared.u32 [%r7], %r0;
    {barrier}
    xor.b32 %r8, %r6, 252; add.u32 %r7, %r5, %r8; ld.shared.u32 %r9, [%r7];
    ld.param.u64 %rd1, [out]; mad.wide.u32 %rd2, %r2, 4, %rd1; st.global.u32 [%rd2], %r9;
"""


@pytest.mark.parametrize("order", [None, SEED])
def test_shared_memory_behind_a_barrier(order):
    out = np.zeros(3 * THREADS, np.uint32)
    rng = None if order is None else np.random.default_rng(order)
    launch(EXCHANGE.replace("{barrier}", "bar.sync 0;"), out, blocks=3, order=rng, fine=True)
    assert out.tolist() == [*reversed(range(THREADS))] * 3


def test_a_shuffle_waits_for_its_warp():
    body = """
    setp.lt.u32 %p1, %r0, 7; @%p1 bra late; add.u32 %r3, %r0, 0; bra.uni both;
    late: add.u32 %r3, %r0, 100;
    both: mov.u32 %r4, 1; mov.u32 %r5, 31; mov.u32 %r6, -1;
    shfl.sync.bfly.b32 %r7|%p2, %r3, %r4, %r5, %r6;
    ld.param.u64 %rd1, [out]; mad.wide.u32 %rd2, %r0, 4, %rd1; st.global.u32 [%rd2], %r7;
    """
    out = np.zeros(THREADS, np.uint32)
    launch(body, out, order=np.random.default_rng(SEED))
    given = [n + 100 if n < 7 else n for n in range(THREADS)]
    assert out.tolist() == [given[n ^ 1] for n in range(THREADS)]


def test_each_thread_has_local_memory_of_its_own():
    body = """
    .local .align 8 .b8 depot[12];
    mov.u64 %rd3, depot; cvta.local.u64 %rd4, %rd3;
    st.u32 [%rd4+4], %r0; st.local.u32 [depot+8], %r2; bar.sync 0;
    ld.local.u32 %r3, [%rd3+4]; ld.u32 %r4, [%rd4+8]; sub.u32 %r5, %r4, %r3;
    ld.param.u64 %rd1, [out]; mad.wide.u32 %rd2, %r2, 4, %rd1; st.global.u32 [%rd2], %r5;
    """
    out = np.ones(2 * THREADS, np.uint32)
    launch(body, out, blocks=2, order=np.random.default_rng(SEED))
    assert out.tolist() == [0] * THREADS + [THREADS] * THREADS


def test_a_count_that_wraps():
    body = "ld.param.u64 %rd1, [out]; atom.global.inc.u32 %r3, [%rd1], 99;"
    out = np.zeros(1, np.uint32)
    launch(body, out, blocks=3, order=np.random.default_rng(SEED))
    assert out[0] == 3 * THREADS % 100


# Faults ---------------------------------------------------------------------------------------

OUT = "ld.param.u64 %rd1, [out]; mad.wide.u32 %rd2, %r2, 4, %rd1;"
BAD = {
    "race in shared memory": EXCHANGE.replace("{barrier}", ""),
    "nobody has written": "ld.shared.u32 %r3, [room+4];",
    "shared memory ends": "mov.u32 %r3, 0; st.shared.u32 [room+1024], %r3;",
    "where the launch has no memory": f"{OUT} ld.global.u32 %r3, [%rd2+4];",
    "misaligned": f"{OUT} ld.global.u16 %h1, [%rd2+1];",
    "only to be read": "ld.param.u64 %rd1, [a]; st.global.u32 [%rd1], %r0;",
    "race in global memory": f"{OUT} st.global.u32 [%rd1], %r0;",
    "never come": "setp.eq.u32 %p1, %r0, 5; @%p1 ret; bar.sync 0;",
    "wait at two places": (
        "setp.eq.u32 %p1, %r0, 5; @%p1 bra x; bar.sync 0; bra y; x: bar.sync 0; y: mov.u32 %r3, 0;"
    ),
    "not of a whole warp": (
        "mov.u32 %r4, 1; mov.u32 %r5, 15; shfl.sync.bfly.b32 %r7, %r0, %r4, %r5, %r4;"
    ),
    "does not end": "again: add.u32 %r0, %r0, 1; bra again;",
}


@pytest.mark.parametrize("says", BAD)
def test_what_a_kernel_must_not_do(says, monkeypatch):
    monkeypatch.setattr("ptx.machine.MOST_TURNS", 1000)
    out = np.zeros(THREADS, np.uint32)
    with pytest.raises(Fault, match=says):
        launch(BAD[says], np.zeros(4, np.uint32), out, races=True)


def test_a_block_of_another_tensor():
    out = np.zeros(THREADS, np.uint32)
    params = struct.pack("<4Q", *[out.ctypes.data] * 4)
    regions = [Region("of tensor 1", out.ctypes.data, out.nbytes, tensor=1)]
    module = Module(HEAD + OUT + "st.global.u32 [%rd2], %r0; ret; }")
    Launcher().run(module, Grid("kernel", 1, THREADS, params, regions, [1]))
    with pytest.raises(Fault, match="by a block of tensor 0"):
        Launcher().run(module, Grid("kernel", 1, THREADS, params, regions, [0]))


def test_an_order_in_which_an_addition_is_lost():
    """Read, added to and written back, with others in between."""
    body = "ld.param.u64 %rd1, [out]; ld.volatile.global.u32 %r3, [%rd1]; add.u32 %r3, %r3, 1;"
    body += "st.volatile.global.u32 [%rd1], %r3;"
    found = set()
    for seed in range(40):
        out = np.zeros(1, np.uint32)
        launch(body, out, order=np.random.default_rng([SEED, seed]), fine=True)
        found.add(int(out[0]))
    assert len(found) > 1
    assert max(found) < THREADS


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("ex2.approx.f32 %f1, %f2;", "instruction ex2"),
        ("add.ftz.f32 %f1, %f2, %f3;", ".ftz"),
        ("add.f32 %f1, %f2, %f3;", "not rounded to nearest"),
        ("cvt.rz.f32.f64 %f1, %d2;", ".rz"),
        ("ld.const.u32 %r3, [%rd1];", ".const"),
        ("red.global.add.u32 [%rd1], %r3;", "instruction red"),
        ("bar.arrive 0, 64;", "barrier"),
        ("mov.u32 %r3, %clock;", "%clock"),
        (".const .b8 table[8];", ".const"),
        ("shfl.sync.down.b32 %r3, %r4, 1, 31, -1;", "shuffle"),
    ],
)
def test_what_is_unknown_is_named(line, names):
    with pytest.raises(Unsupported, match=names):
        launch(line, np.zeros(THREADS, np.uint32))
