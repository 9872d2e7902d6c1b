"""Numbers as a GPU computes them, over numpy arrays of one entry per thread.

numpy's own add, subtract, multiply, divide and square root of float32 and float64 are those of IEEE
754, rounded to nearest, with subnormal numbers; a GPU's are the same. Here is the rest.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
TYPES = {"u": UNSIGNED, "b": UNSIGNED, "s": SIGNED, "f": FLOAT}

# What arithmetic makes of a NaN, whichever it was.
_NAN = {16: 0x7FFF, 32: 0x7FFFFFFF, 64: 0x7FF8000000000000}


def bits_of(x: Array) -> Array:
    """The bits of results of arithmetic."""
    bits = 8 * x.dtype.itemsize
    raw = x.view(UNSIGNED[bits])
    nan = np.isnan(x)
    return np.where(nan, UNSIGNED[bits](_NAN[bits]), raw) if nan.any() else raw


# Arithmetic -----------------------------------------------------------------------------------

_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_FMA = {64: _libm.fma, 32: _libm.fmaf}
for _bits, _kind in ((64, ctypes.c_double), (32, ctypes.c_float)):
    _FMA[_bits].restype, _FMA[_bits].argtypes = _kind, [_kind] * 3


def fma(a: Array, b: Array, c: Array) -> Array:
    """Rounded once. Of C, number by number: kernels need it for the few that compute a power."""
    a, b, c = np.broadcast_arrays(a, b, c)
    call = _FMA[8 * a.dtype.itemsize]
    found = [call(*map(float, numbers)) for numbers in zip(a.flat, b.flat, c.flat, strict=True)]
    return np.array(found, a.dtype).reshape(a.shape)


def reciprocal_approximation(a: Array) -> Array:
    """Of the upper half of a double: rcp.approx.ftz.f64. A GPU may differ in its last bit."""
    upper = np.uint64(0xFFFFFFFF00000000)
    a = (np.asarray(a).view(np.uint64) & upper).view(np.float64)
    found = _without_subnormal(1.0 / _without_subnormal(a))
    return (found.view(np.uint64) & upper).view(np.float64)


def approximation(function: Callable[[Array], Array], a: Array) -> Array:
    """sqrt.approx.ftz.f32 or rcp.approx.ftz.f32: as far off as they may be, 2^-23 of the result, up
    or down as the bits of a have it. A kernel must not depend on what a GPU makes of them."""
    a = np.asarray(a)
    raw = a.view(np.uint32)
    up = (raw ^ raw >> np.uint32(3) ^ raw >> np.uint32(11)) & np.uint32(1)
    exact = function(_without_subnormal(a).astype(np.float64))
    most = np.abs(exact) * 2.0**-23
    found = (exact + np.where(up, most, -most)).astype(np.float32)
    nearer = np.nextafter(found, exact.astype(np.float32))
    found = np.where(np.abs(found.astype(np.float64) - exact) > most, nearer, found)
    return _without_subnormal(np.where(np.isinf(exact), exact.astype(np.float32), found))


def _without_subnormal(a: Array) -> Array:
    return np.where(np.abs(a) < np.finfo(a.dtype).tiny, np.copysign(a.dtype.type(0), a), a)


def minimum(a: Array, b: Array) -> Array:
    """Of one NaN and a number, the number; -0 is less than +0."""
    zeros = (a == 0) & (b == 0)
    return np.where(zeros, np.where(np.signbit(a), a, b), np.fmin(a, b))


def maximum(a: Array, b: Array) -> Array:
    zeros = (a == 0) & (b == 0)
    return np.where(zeros, np.where(np.signbit(a), b, a), np.fmax(a, b))


def maximum_or_nan(a: Array, b: Array) -> Array:
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), maximum(a, b))


def saturated(a: Array) -> Array:
    """Within 0 and 1; a NaN becomes 0."""
    return np.where(
        np.isnan(a), a.dtype.type(0), maximum(minimum(a, a.dtype.type(1)), a.dtype.type(0))
    )


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the product."""
    a, b = np.broadcast_arrays(a, b)
    bits = 8 * a.dtype.itemsize
    product = a.astype(object) * b.astype(object) >> bits
    return product.astype(a.dtype)


def divide(a: Array, b: Array) -> Array:
    """Integers, rounded toward zero."""
    if np.any(b == 0):
        raise ZeroDivisionError("an integer is divided by zero")
    if a.dtype.kind == "u":
        return a // b
    return (np.sign(a) * np.sign(b)) * (np.abs(a) // np.abs(b))


def remainder(a: Array, b: Array) -> Array:
    return a - divide(a, b) * b


# Bits -----------------------------------------------------------------------------------------


def shift_left(a: Array, by: Array) -> Array:
    """By more than there are bits: zero."""
    kind = a.dtype.type
    bits = 8 * kind().itemsize
    low = np.minimum(by, np.uint32(bits - 1)).astype(kind)
    return np.where(by < np.uint32(bits), a << low, kind(0))


def shift_right(a: Array, by: Array) -> Array:
    """By more than there are bits: the sign, or zero."""
    kind = a.dtype.type
    bits = 8 * kind().itemsize
    low = np.minimum(by, np.uint32(bits - 1)).astype(kind)
    if a.dtype.kind == "i":
        return a >> low
    return np.where(by < np.uint32(bits), a >> low, kind(0))


def funnel_shift(low: Array, high: Array, by: Array, to_left: bool, wraps: bool) -> Array:
    """32 of 64 bits: the upper ones shifted to the left, or the lower ones to the right."""
    by = by & np.uint32(31) if wraps else np.minimum(by, np.uint32(32))
    by = by.astype(np.uint64)
    both = np.asarray(high).astype(np.uint64) << np.uint64(32) | np.asarray(low).astype(np.uint64)
    shifted = both << by >> np.uint64(32) if to_left else both >> by
    return shifted.astype(np.uint32)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """Four of the eight bytes of a and b, each chosen by four bits: its number, and whether only
    its sign is wanted."""
    selector = np.asarray(selector).astype(np.uint64)
    both = np.asarray(b).astype(np.uint64) << np.uint64(32) | np.asarray(a).astype(np.uint64)
    found = np.uint64(0)
    for place in range(4):
        chosen = selector >> np.uint64(4 * place) & np.uint64(15)
        byte = both >> ((chosen & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        sign = (byte >> np.uint64(7)) * np.uint64(255)
        byte = np.where(chosen & np.uint64(8), sign, byte)
        found = found | byte << np.uint64(8 * place)
    return found.astype(np.uint32)


def three_inputs(a: Array, b: Array, c: Array, table: int) -> Array:
    """Any function of three bits, from the table of its eight values."""
    found = a & ~a
    for k in range(8):
        if table >> k & 1:
            found = found | ((a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c))
    return found


def bit_field(a: Array, at: Array, length: Array) -> Array:
    kind = a.dtype.type
    at, length = np.asarray(at) & np.uint32(255), np.asarray(length) & np.uint32(255)
    mask = ~shift_left(np.full(np.shape(length), ~kind(0)), length)
    return shift_right(a, at) & mask


def signed_bit_field(a: Array, at: Array, length: Array) -> Array:
    """Above it, what is its sign: that of its highest bit, if it has one."""
    kind, last = a.dtype.type, 8 * a.dtype.itemsize - 1
    at, length = np.asarray(at) & np.uint32(255), np.asarray(length) & np.uint32(255)
    sign = shift_right(a, np.clip(at.astype(np.int64) + length - 1, 0, last)) & kind(1)
    above = ~bit_field(np.full(np.shape(a), ~kind(0)), at, length)
    return bit_field(a, at, length) | np.where((sign != 0) & (length != 0), above, kind(0))


def insert_bits(a: Array, b: Array, at: Array, length: Array) -> Array:
    """The lowest bits of a in the place of those of b."""
    kind = b.dtype.type
    at, length = np.asarray(at) & np.uint32(255), np.asarray(length) & np.uint32(255)
    mask = shift_left(~shift_left(np.full(np.shape(length), ~kind(0)), length), at)
    return b & ~mask | shift_left(a, at) & mask


# Conversions ----------------------------------------------------------------------------------

_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def integral(a: Array, mode: str) -> Array:
    return _TO_INTEGER[mode](a)


def to_integer(a: Array, kind: Any, mode: str) -> Array:
    """To the nearest there is; a NaN becomes 0."""
    limits = np.iinfo(kind)
    x = _TO_INTEGER[mode](np.asarray(a, np.float64))
    # float(limits.max) may be one more than it
    inside = np.where((x > float(limits.min)) & (x < float(limits.max)), x, 0).astype(kind)
    found = np.where(x >= float(limits.max), kind(limits.max), inside)
    return np.where(x <= float(limits.min), kind(limits.min), found)


def clamped(a: Array, kind: Any) -> Array:
    """An integer as one of another type, to the nearest there is."""
    limits, own = np.iinfo(kind), np.iinfo(a.dtype)
    low = a.dtype.type(max(limits.min, own.min))
    return np.clip(a, low, a.dtype.type(min(limits.max, own.max))).astype(kind)


def bfloat16_bits(a: Array) -> Array:
    """Of a float32, rounded to nearest, ties to even."""
    a = np.asarray(a, np.float32)
    raw = a.view(np.uint32).astype(np.uint64)
    rounded = raw + np.uint64(0x7FFF) + (raw >> np.uint64(16) & np.uint64(1)) >> np.uint64(16)
    return np.where(np.isnan(a), np.uint64(0x7FFF), rounded).astype(np.uint16)


def float16_bits(a: Array) -> Array:
    return bits_of(np.asarray(a).astype(np.float16))


def pair(high: Array, low: Array) -> Array:
    """Of two halves, one word."""
    return high.astype(np.uint32) << np.uint32(16) | low.astype(np.uint32)
