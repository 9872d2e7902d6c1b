"""Runs the threads of some blocks: all that are at the same basic block at once, one basic block
after the other, with barriers and shuffles where threads meet."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arithmetic import INSTRUCTIONS
from .blocks import Block, Code, passed_name
from .memory import WARP, Accesses, Fault, Region, Regions, Shared, check_alignment, place
from .parse import parse
from .translate import PARAM, SHARED, SHARED_BEGIN, Writer
from .values import UNSIGNED, Array

# No kernel takes so many turns for a chunk: it does not end.
MOST_TURNS = 1_000_000


class Module:
    """PTX. ``fine``: threads may be interrupted before and after each access to memory."""

    def __init__(self, text: str, fine: bool = False) -> None:
        self.functions = parse(text)
        self.fine = fine
        self._codes: dict[str, Code] = {}

    @property
    def kernels(self) -> list[str]:
        return [name for name, function in self.functions.items() if function.is_kernel]

    def code(self, name: str) -> Code:
        if name not in self._codes:
            self._codes[name] = Code(self.functions[name], self.fine)
        return self._codes[name]


class Threads:
    """Threads on their way through a function, in groups that are at the same block."""

    def __init__(self, code: Code, count: int) -> None:
        self.code = code
        self.count = count
        self.everyone = np.arange(count)
        self.registers: list[Any] = [None] * len(code.dtypes)
        self.ready: dict[int, list[Array]] = {0: [self.everyone]}
        self.turns = 0

    def run_block(self, machine: Any, block: Block, threads: Array) -> None:
        if block.run is None:
            Writer(block.code).write(block, INSTRUCTIONS)
        registers = self.registers
        registers += [None] * (len(self.code.dtypes) - len(registers))
        for number in block.touched:
            if registers[number] is None:
                # Nobody has written it: something that is noticed where it is used.
                dtype = self.code.dtypes[number]
                registers[number] = np.full(self.count, True if dtype is np.bool_ else 0xA5, dtype)
        which = slice(None) if len(threads) == self.count else threads
        taken = block.run(machine, registers, which)
        if not block.conditional:
            self.go(block.next if block.target is None else block.target, threads)
        elif taken is True or taken is False or np.ndim(taken) == 0:
            self.go(block.target if taken else block.next, threads)
        else:
            self.go(block.target, threads[taken])
            self.go(block.next, threads[~taken])

    def go(self, to: int, threads: Array) -> None:
        if len(threads) and to < len(self.code.blocks):
            self.ready.setdefault(to, []).append(threads)

    def take(self, at: int) -> Array:
        groups = self.ready.pop(at)
        return groups[0] if len(groups) == 1 else np.sort(np.concatenate(groups))

    def count_turn(self) -> None:
        self.turns += 1
        if self.turns > MOST_TURNS:
            raise Fault(f"{self.code.function.name} does not end")


class Machine(Threads):
    """Some blocks of a launch. The order in which threads go on is that of the text, or random."""

    def __init__(
        self,
        module: Module,
        kernel: str,
        blocks: Array,
        grid: int,
        num_threads: int,
        params: bytes,
        regions: Regions,
        owner: Array,
        order: np.random.Generator | None = None,
        accesses: Accesses | None = None,
    ) -> None:
        code = module.code(kernel)
        super().__init__(code, len(blocks) * num_threads)
        self.module, self.order, self.num_threads = module, order, num_threads
        self.block_of = np.repeat(np.arange(len(blocks)), num_threads)
        self.tid_x = np.tile(np.arange(num_threads, dtype=np.uint32), len(blocks))
        self.ctaid_x = np.repeat(blocks.astype(np.uint32), num_threads)
        zero, one = np.zeros(self.count, np.uint32), np.ones(self.count, np.uint32)
        self.tid_y = self.tid_z = self.ctaid_y = self.ctaid_z = zero
        self.ntid_y = self.ntid_z = self.nctaid_y = self.nctaid_z = one
        self.ntid_x, self.nctaid_x = one * np.uint32(num_threads), one * np.uint32(grid)
        needed = max((v.offset + v.size for v in code.function.params.values()), default=0)
        if len(params) < needed:
            raise Fault(f"{kernel} takes {needed} bytes of arguments, there are {len(params)}")
        self.params = np.frombuffer(params[:needed] + bytes(-needed % 16), np.uint8)
        self.param_bytes = needed
        self.shared = Shared(len(blocks), code.function.shared_bytes)
        self.regions, self.owner, self.accesses = regions, owner, accesses
        self._give_local_memory(code.function.local_bytes)
        self.phase = np.zeros(self.count, np.int32)  # barriers passed
        self.shuffles = np.zeros(self.count, np.int32)
        self.thread = self.ctaid_x.astype(np.int64) << 16 | self.tid_x
        self.waits_at = np.full(self.count, -1)

    def _give_local_memory(self, size: int) -> None:
        """A piece for each thread, at addresses of this process."""
        size = (size + 15) // 16 * 16
        self.local = np.full(self.count * size + 16, 0xA5, np.uint8)
        begin = (self.local.ctypes.data + 15) // 16 * 16
        self.local_begin = (begin + self.everyone * size).astype(np.uint64)
        if size:
            local = Region("local memory", begin, self.count * size)
            self.regions = Regions([*self.regions.regions, local])

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while self.ready:
                at, threads = self._next()
                self.count_turn()
                block = self.code.blocks[at]
                if block.meeting:
                    threads = self._meet(at, threads, block.meeting)
                if len(threads):
                    self.run_block(self, block, threads)
        if (self.waits_at >= 0).any():
            first = int(np.argmax(self.waits_at >= 0))
            instruction = self.code.blocks[self.waits_at[first]].instructions[0]
            raise Fault(f"threads wait for others that never come, at: {instruction.text}")

    def _next(self) -> tuple[int, Array]:
        if self.order is None:
            at = min(self.ready)
            return at, self.take(at)
        # Often those that are ahead already, so that they overtake others by more than a step.
        ahead = self.order.random() < 0.5
        at = max(self.ready) if ahead else int(self.order.choice(list(self.ready)))
        threads = self.take(at)
        style = self.order.integers(4)
        if style < 3:
            unit = WARP if style < 2 else 1  # some warps; some threads of them
            some = self.order.random(self.count // unit + 1) < self.order.choice([0.1, 0.5])
            mask = some[threads // unit]
            if mask.any():
                self.go(at, threads[~mask])
                threads = threads[mask]
        return at, threads

    def _meet(self, at: int, threads: Array, who: str) -> Array:
        """Those that need not wait longer."""
        size = self.num_threads if who == "block" else WARP
        self.waits_at[threads] = at
        units = np.unique(threads // size)
        waiting = self.waits_at.reshape(-1, size)[units]
        if who == "block" and ((waiting != at) & (waiting >= 0)).any():
            instruction = self.code.blocks[at].instructions[0]
            raise Fault(f"threads of a block wait at two places, one of them: {instruction.text}")
        complete = units[(waiting == at).all(1)]
        released = self.everyone.reshape(-1, size)[complete].ravel()
        self.waits_at[released] = -1
        (self.phase if who == "block" else self.shuffles)[released] += 1
        return released

    # What instructions call. ``which``: the threads, as indices or all.

    def load(
        self, space: str, address: Array, bits: int, count: int, which: Any, ordered: bool
    ) -> list[Array]:
        memory, at = self._find(space, address, bits, count, which, ordered, writes=False)
        return [memory[at + k] for k in range(count)]

    def store(
        self, space: str, address: Array, bits: int, values: list[Array], which: Any, ordered: bool
    ) -> None:
        memory, at = self._find(space, address, bits, len(values), which, ordered, writes=True)
        for k, value in enumerate(values):
            memory[at + k] = value

    def atomic(
        self, space: str, kind: str, address: Array, bits: int, given: list[Array], which: Any
    ) -> Array:
        memory, at = self._find(space, address, bits, 1, which, True, writes=True)
        given = [np.broadcast_to(value, at.shape) for value in given]
        found = np.empty(len(at), UNSIGNED[bits])
        turns = np.arange(len(at)) if self.order is None else self.order.permutation(len(at))
        for k in turns:
            old, operand = int(memory[at[k]]), int(given[0][k])
            new = {
                "inc": lambda old, operand: 0 if old >= operand else old + 1,
                "add": lambda old, operand: (old + operand) & (1 << bits) - 1,
                "exch": lambda old, operand: operand,
                "min": min,
                "max": max,
                "cas": lambda old, operand, k=k: int(given[1][k]) if old == operand else old,
            }[kind](old, operand)
            memory[at[k]], found[k] = new, old
        return found

    def _find(
        self,
        space: str,
        address: Array,
        bits: int,
        count: int,
        which: Any,
        ordered: bool,
        writes: bool,
    ) -> tuple[Array, Array]:
        """Array and indices, when all is checked."""
        blocks = self.block_of[which]
        address = np.broadcast_to(address, blocks.shape)
        size = bits // 8 * count
        what = f"a {'write to' if writes else 'read of'} {space} memory"
        check_alignment(address, size, what)
        tag = int(address[0]) >> 60 << 60
        if space == "generic" or tag == PARAM:
            space = {0: "global", SHARED: "shared", PARAM: "param"}.get(tag, space)
            address = address - np.uint64(tag)
        if space == "shared":
            offsets = address.astype(np.int64) - SHARED_BEGIN
            self.shared.check(offsets, size, writes, blocks, self.tid_x[which], self.phase[which])
            return self.shared.place(offsets, bits, blocks)
        if space == "param":
            if int(address.max()) + size > self.param_bytes or writes:
                raise Fault(f"{what} of {size} bytes behind byte {int(address.max())}")
            return self.params.view(UNSIGNED[bits]), (address // np.uint64(bits // 8)).astype(
                np.int64
            )
        self.regions.check(address, size, writes, blocks, self.owner)
        if self.accesses is not None and not ordered:
            phase = self.phase[which].astype(np.int64) << 32 | self.shuffles[which]
            self.accesses.add(address, size, writes, self.thread[which], phase)
        return place(address, bits)

    def shuffle(
        self, value: Array, distance: Array, clamp: Array, mask: Array, which: Any
    ) -> Array:
        """Between the threads of each warp, all of which are here."""
        if not (np.all(clamp == 31) and np.all(mask == 0xFFFFFFFF)):
            raise Fault("a shuffle that is not of a whole warp")
        threads = self.everyone[which]
        by_thread = np.zeros(self.count, np.uint32)
        by_thread[threads] = value
        return by_thread[threads ^ np.broadcast_to(distance, threads.shape).astype(np.int64)]

    def call(self, name: str, given: list[Array], num_results: int, which: Any) -> list[Array]:
        """A function of numbers: no memory, no barriers."""
        code = self.module.code(name)
        count = len(self.everyone[which])
        threads = Threads(code, count)
        for variable, value in zip(code.function.params, given, strict=True):
            number = code.register(passed_name(variable, 0, 64))
            threads.registers += [None] * (number + 1 - len(threads.registers))
            threads.registers[number] = np.broadcast_to(value, count).copy()
        while threads.ready:
            at = min(threads.ready)
            threads.count_turn()
            if code.blocks[at].meeting:
                raise Fault(f"{name} has a barrier")
            threads.run_block(_NoMemory(self.module), code.blocks[at], threads.take(at))
        results = [code.register(passed_name(result, 0, 64)) for result in code.function.results]
        return [threads.registers[number] for number in results[:num_results]]


class _NoMemory:
    """For functions that are called."""

    def __init__(self, module: Module) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        raise Fault(f"a function that is called uses {name}")
