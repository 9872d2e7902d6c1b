"""What a launch of fusedopt may read and write: the LaunchTable of csrc/multi_tensor/launch_table.h
as regions of memory."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Iterator

import numpy as np

from .launch import Grid
from .memory import Fault, Region

THREADS = 256  # of a block
SCALE_ELEMENTS = 64  # of an 8-bit state
ITEM_BYTES = (4, 8, 2, 2, 1, 1, 2, 8)  # by Dtype
NONE, INT8, UINT8 = 1, 4, 5
MASTER, ROUNDING, EMA, SCALES, POINTERS = 5, 6, 7, 8, 11  # the pointers of a stored tensor


class _Table(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("tensors", "blocks", "pointers", "update_bytes")),
        *((name, ctypes.c_uint64) for name in ("found_inf", "loss_scale", "clip")),
        ("on_device", ctypes.c_bool),
        ("tickets", ctypes.c_uint64),
        *((f"{name}_at", ctypes.c_uint32) for name in ("pointers", "numel", "first", "info")),
    ]


class _GradNorm(ctypes.Structure):
    _fields_ = [
        ("max_norm", ctypes.c_double),
        ("skip_nonfinite", ctypes.c_bool),
        *((name, ctypes.c_uint64) for name in ("loss_scale", "clip", "partials")),
        *((name, ctypes.c_uint32) for name in ("num_partials", "first_partial")),
        ("ticket", ctypes.c_uint64),
    ]


class _StoredAs(ctypes.Structure):
    _fields_ = [
        ("slots", ctypes.c_uint8 * 5),
        ("num_slots", ctypes.c_int),
        *((name, ctypes.c_uint8) for name in ("master", "ema", "stochastic")),
        ("ema_weight", ctypes.c_float),
        ("step", ctypes.c_double),
    ]


class Table:
    """A table's tensors, and what they use."""

    def __init__(self, kernel: str, raw: bytes, num_scalars: int) -> None:
        """``num_scalars``: that a tensor of this rule has on the device."""
        self.kernel, self.raw = kernel, raw
        self.head = _Table.from_buffer_copy(raw)
        self.data = raw[(ctypes.sizeof(_Table) + 15) // 16 * 16 :]
        head, count = self.head, self.head.tensors
        pointers = np.frombuffer(self.data, np.uint64, count * head.pointers, head.pointers_at)
        self.pointers = pointers.reshape(count, head.pointers).astype(object)
        self.numel = np.frombuffer(self.data, np.int64, count, head.numel_at).astype(object)
        self.first = np.frombuffer(self.data, np.uint32, count + 1, head.first_at)
        self.info = np.frombuffer(self.data, np.uint32, count, head.info_at).astype(object)
        self.num_scalars = num_scalars if head.on_device else 0

    def grid(self) -> Grid:
        blocks = np.arange(self.head.blocks)
        if self.kernel.endswith("grad_norm"):  # which begins with the last chunk
            blocks = blocks[::-1]
        owner = np.searchsorted(self.first, blocks, "right") - 1
        regions = [region for region in self.regions() if region.begin]
        return Grid(self.kernel, int(self.head.blocks), THREADS, self.raw, regions, owner)

    def regions(self) -> Iterator[Region]:
        if self.kernel.endswith("grad_norm"):
            yield from self._norm()
            return
        yield Region("found_inf", self.head.found_inf, 4, writable=False)
        yield Region("loss scale", self.head.loss_scale, 4, writable=False)
        yield Region("clip", self.head.clip, 24, writable=False)
        if self.head.on_device:
            yield from self._numbers()
        for t in range(self.head.tensors):
            yield from (self._stored(t) if "_stored_" in self.kernel else self._plain(t))
            for k in range(self.num_scalars):
                at = self.pointers[t, self.head.pointers - self.num_scalars + k]
                yield Region(f"scalar {k} of tensor {t}", at, 4, t)
            if self.head.tickets:
                yield Region(f"ticket of tensor {t}", self.head.tickets + 4 * t, 4, t)

    def _norm(self) -> Iterator[Region]:
        norm = _GradNorm.from_buffer_copy(self.data)
        yield Region("loss scale", norm.loss_scale, 4, writable=False)
        yield Region("clip", norm.clip, 24)
        yield Region("partial sums", norm.partials, 8 * norm.num_partials)
        yield Region("ticket", norm.ticket, 4)
        for t in range(self.head.tensors):
            yield self._slot(t, 0, int(self.info[t]) >> 20 & 3, writable=False)

    def _slot(self, t: int, slot: int, dtype: int, writable: bool) -> Region:
        size = self.numel[t] * ITEM_BYTES[dtype]
        return Region(f"slot {slot} of tensor {t}", self.pointers[t, slot], size, t, writable)

    def _numbers(self) -> Iterator[Region]:
        """The addresses of numbers that rules read: among their doubles, none of which has such
        bits, unless it is a subnormal number. Some Pythons have their heap in the first 4 GB."""
        for at in range(0, self.head.pointers_at - 8, 8):
            (address,) = struct.unpack_from("<Q", self.data, at)
            if 1 << 20 < address < 1 << 47:
                (is_double,) = struct.unpack_from("<?", self.data, at + 8)
                yield Region("number of a group", address, 8 if is_double else 4, writable=False)

    def _plain(self, t: int) -> Iterator[Region]:
        for slot in range(self.head.pointers - self.num_scalars):
            yield self._slot(t, slot, int(self.info[t]) >> (20 + 2 * slot) & 3, slot != 1)

    def _stored_as(self, t: int) -> _StoredAs:
        """Behind the update, whose size is that of whole 16 bytes."""
        end = ((int(self.info[t]) & 0xFFFF) + 1) * self.head.update_bytes
        for behind in (0, 8):
            at = end - behind - ctypes.sizeof(_StoredAs)
            found = _StoredAs.from_buffer_copy(self.data, at)
            if 2 <= found.num_slots <= 5 and max(found.slots) < len(ITEM_BYTES):
                return found
        raise Fault(f"no StoredAs in the update of tensor {t}")

    def _stored(self, t: int) -> Iterator[Region]:
        how, n = self._stored_as(t), self.numel[t]

        def extra(name: str, pointer: int, size: int) -> Region:
            return Region(f"{name} of tensor {t}", self.pointers[t, pointer], size, t)

        for slot in range(how.num_slots):
            yield self._slot(t, slot, how.slots[slot], slot != 1)
        if how.master != NONE:
            yield extra("master", MASTER, n * ITEM_BYTES[how.master])
        if how.stochastic:
            yield extra("rounding", ROUNDING, 16)
        if how.ema != NONE:
            yield extra("average", EMA, n * ITEM_BYTES[how.ema])
        for state, dtype in enumerate(how.slots[2 : how.num_slots]):
            if dtype in (INT8, UINT8):
                scales = (n + SCALE_ELEMENTS - 1) // SCALE_ELEMENTS
                yield extra(f"scales {state}", SCALES + state, 4 * scales)


def rule_of(kernel: str) -> str:
    """The name of the rule, of a kernel as fusedopt_AdamUpdate_float_true."""
    match = re.match(r"fusedopt_(\w+?)Update_", kernel)
    return match[1].lower() if match else ""
