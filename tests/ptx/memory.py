"""What the threads of a launch read and write: global memory as it lies in this process, the shared
memory of each block, the kernel's parameters; and what may be wrong with an access."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .values import UNSIGNED, Array

WARP = 32


class Fault(Exception):
    """What a kernel must not do."""


# All of the address space ---------------------------------------------------------------------

_FIRST = 4096  # no memory is below


def _window(bits: int) -> Array:
    class Window:
        __array_interface__ = {
            "version": 3,
            "shape": (((1 << 47) - _FIRST) * 8 // bits,),
            "typestr": np.dtype(UNSIGNED[bits]).str,
            "data": (_FIRST, False),
        }

    return np.asarray(Window())


_MEMORY = {bits: _window(bits) for bits in (8, 16, 32, 64)}


def place(addresses: Array, bits: int) -> tuple[Array, Array]:
    """Array and indices of what is at these addresses."""
    shift = np.uint64((bits // 8).bit_length() - 1)
    return _MEMORY[bits], (addresses - np.uint64(_FIRST) >> shift).astype(np.int64)


def check_alignment(addresses: Array, size: int, what: str) -> None:
    if int(np.bitwise_or.reduce(addresses)) & (size - 1):
        wrong = addresses[addresses & np.uint64(size - 1) != 0]
        raise Fault(f"{what} of {size} bytes at the misaligned address {hex(int(wrong[0]))}")


# Global memory --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Region:
    """Memory that a launch may use: of one tensor, or of all."""

    name: str
    begin: int
    size: int
    tensor: int | None = None
    writable: bool = True


class Regions:
    """What may be used by the blocks of each tensor."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions: list[Region] = []
        for region in sorted((r for r in regions if r.size), key=lambda r: (r.begin, r.size)):
            last = self.regions[-1] if self.regions else None
            if last is not None and region.begin < last.begin + last.size:
                self.regions[-1] = _joined(last, region)
            else:
                self.regions.append(region)
        begins = [region.begin for region in self.regions]
        self.begins = np.array(begins, np.uint64)

    def check(self, addresses: Array, size: int, writes: bool, blocks: Array, owner: Array) -> None:
        """``blocks``: of each thread, sorted; ``owner``: the tensor of each block."""
        if self._fits(addresses, size, writes, owner[blocks[0]], owner[blocks[-1]]):
            return
        starts = np.flatnonzero(np.diff(blocks, prepend=-1))
        for part, block in zip(np.split(addresses, starts[1:]), blocks[starts], strict=True):
            if not self._fits(part, size, writes, owner[block], owner[block]):
                for address in part:
                    self._check_one(int(address), size, writes, int(owner[block]))

    def _fits(self, addresses: Array, size: int, writes: bool, first: int, last: int) -> bool:
        """Whether all are in one region that these owners may use."""
        low, high = addresses.min(), int(addresses.max()) + size
        at = int(np.searchsorted(self.begins, low, "right")) - 1
        if at < 0:
            return False
        region = self.regions[at]
        return (
            high <= region.begin + region.size
            and (region.writable or not writes)
            and (region.tensor is None or region.tensor == first == last)
        )

    def _check_one(self, address: int, size: int, writes: bool, tensor: int) -> None:
        what = f"{'write' if writes else 'read'} of {size} bytes at {hex(address)}"
        at = int(np.searchsorted(self.begins, np.uint64(address), "right")) - 1
        region = self.regions[at] if at >= 0 else None
        if region is None or address + size > region.begin + region.size:
            near = (
                f": {address - region.begin} bytes behind the begin of {region}" if region else ""
            )
            raise Fault(f"{what}, where the launch has no memory{near}")
        if writes and not region.writable:
            raise Fault(f"{what}, in {region.name}, which is only to be read")
        if region.tensor is not None and region.tensor != tensor:
            raise Fault(f"{what}, in {region.name}, by a block of tensor {tensor}")


def _joined(a: Region, b: Region) -> Region:
    """The same memory under two names: a gradient that is its parameter, say."""
    end = max(a.begin + a.size, b.begin + b.size)
    tensor = a.tensor if a.tensor == b.tensor else None
    name = a.name if a.name == b.name else f"{a.name}, {b.name}"
    return Region(name, a.begin, end - a.begin, tensor, a.writable or b.writable)


class Accesses:
    """Finds memory that one thread writes while another uses it, of all accesses of a launch.

    Barriers order the threads of a block. Shuffles order those of a warp: what a thread hands out
    depends on what it has read. ``phase`` counts barriers, and in its lower 32 bits shuffles.
    """

    def __init__(self) -> None:
        self.seen: list[Array] = []

    def add(self, addresses: Array, size: int, writes: bool, thread: Array, phase: Array) -> None:
        """``thread``: block and thread in one number, the thread in the lower 16 bits."""
        rows = np.empty((5, len(addresses)), np.int64)
        rows[0], rows[1], rows[2], rows[3], rows[4] = addresses, size, thread, phase, writes
        self.seen.append(rows)

    def check(self, what: str) -> None:
        if not self.seen:
            return
        rows = np.concatenate(self.seen, axis=1)
        self.seen.clear()
        # One row for all that a thread does with the same piece.
        order = np.lexsort((rows[4], rows[3], rows[2], rows[1], rows[0]))
        rows = rows[:, order]
        ends = np.ones(rows.shape[1], bool)
        ends[:-1] = (rows[:4, 1:] != rows[:4, :-1]).any(0)
        rows = rows[:, ends]  # the last of equal ones writes if one of them does
        reach = np.maximum.accumulate(rows[0] + rows[1])
        starts_new = np.ones(rows.shape[1], bool)
        starts_new[1:] = rows[0, 1:] >= reach[:-1]
        cluster = np.cumsum(starts_new)
        counts = np.bincount(cluster)
        written = np.bincount(cluster, rows[4]) > 0
        for number in np.flatnonzero((counts > 1) & written):
            self._check_cluster(rows[:, cluster == number], what)

    @staticmethod
    def _check_cluster(rows: Array, what: str) -> None:
        """Pieces that overlap, one of them written."""
        begin, size, thread, phase, writes = rows
        block = thread >> 16
        for k in np.flatnonzero(writes):
            meets = (begin < begin[k] + size[k]) & (begin + size > begin[k]) & (thread != thread[k])
            same_warp = thread // WARP == thread[k] // WARP
            unordered = np.where(same_warp, phase == phase[k], phase >> 32 == phase[k] >> 32)
            meets &= (block != block[k]) | unordered
            if meets.any():
                other = np.flatnonzero(meets)[0]
                raise Fault(
                    f"a race in {what}: block {block[k]} thread {thread[k] & 0xFFFF} writes, block "
                    f"{block[other]} thread {thread[other] & 0xFFFF} uses the same {size[k]} bytes"
                )


# Shared memory --------------------------------------------------------------------------------


class Shared:
    """Of some blocks. A race is an access to a word that another thread of the block writes, or has
    read before a write, with no barrier between."""

    NOBODY, MANY = -1, -2

    def __init__(self, num_blocks: int, size: int) -> None:
        self.words = (size + 7) // 8 * 2
        self.memory = np.full((num_blocks, self.words), 0xABABABAB, np.uint32)
        shape = num_blocks * self.words
        self.writer = np.full(shape, self.NOBODY, np.int32)
        self.written = np.full(shape, -1, np.int32)  # in which phase
        self.reader = np.full(shape, self.NOBODY, np.int32)
        self.read = np.full(shape, -1, np.int32)

    def place(self, offsets: Array, bits: int, blocks: Array) -> tuple[Array, Array]:
        row = self.words * 32 // bits
        return self.memory.reshape(-1).view(UNSIGNED[bits]), offsets * 8 // bits + blocks * row

    def check(
        self, offsets: Array, size: int, writes: bool, blocks: Array, thread: Array, phase: Array
    ) -> None:
        if offsets.min() < 0 or int(offsets.max()) + size > 4 * self.words:
            raise Fault(f"shared memory ends before byte {int(offsets.max()) + size}")
        first = blocks * self.words + offsets // 4
        for word in range((size + 3) // 4):
            self._access(first + word, writes, thread, phase)

    def _access(self, words: Array, writes: bool, thread: Array, phase: Array) -> None:
        if not writes and (self.written[words] < 0).any():
            raise Fault(
                f"shared word {int(words[0]) % self.words} is read, and nobody has written it"
            )
        self._refuse((self.written[words] == phase) & (self.writer[words] != thread), words, thread)
        if writes:
            self._refuse(
                (self.read[words] == phase) & (self.reader[words] != thread), words, thread
            )
            self.writer[words], self.written[words] = thread, phase
            # Of two that write the same word at once, one does not find itself.
            self._refuse(self.writer[words] != thread, words, thread)
            return
        known = (self.read[words] == phase) & (self.reader[words] != thread)
        self.reader[words], self.read[words] = thread, phase
        self.reader[words[known | (self.reader[words] != thread)]] = self.MANY

    def _refuse(self, wrong: Array, words: Array, thread: Array) -> None:
        if wrong.any():
            k = int(np.argmax(wrong))
            raise Fault(
                f"a race in shared memory: thread {int(thread[k])} and another use word "
                f"{int(words[k]) % self.words}, one writes it, and no barrier is between"
            )
