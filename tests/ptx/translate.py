"""Basic blocks of a kernel as Python functions over all threads that are there at once.

A function takes the machine ``E``, its registers ``R`` and the threads ``i``; it computes in local
names, and writes back only what another block reads. It returns the predicate of a branch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import values
from .blocks import Block, Code, passed_name
from .parse import Instruction, Unsupported

# Addresses say of which memory they are.
PARAM, SHARED = 1 << 61, 1 << 60
# Shared memory begins here, so that an address of zero is none.
SHARED_BEGIN = 1024

SPECIAL = {
    **{f"%tid.{d}": f"E.tid_{d}" for d in "xyz"},
    **{f"%ctaid.{d}": f"E.ctaid_{d}" for d in "xyz"},
    **{f"%ntid.{d}": f"E.ntid_{d}" for d in "xyz"},
    **{f"%nctaid.{d}": f"E.nctaid_{d}" for d in "xyz"},
}


@dataclass
class _Local:
    """Where a value is, as bits or as a number."""

    bits: int
    names: dict[str, str]  # by kind: u, s, f
    loaded: bool = False


class Writer:
    """Writes the function of one block. Instructions read operands and define registers."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self.lines: list[str] = []
        self.locals: dict[str, _Local] = {}
        self.written: list[str] = []
        self.constants: dict[str, Any] = {}
        self.count = 0
        self.now: Instruction | None = None

    def line(self, text: str) -> None:
        self.lines.append(text)

    def let(self, expression: str) -> str:
        self.count += 1
        self.line(f"v{self.count} = {expression}")
        return f"v{self.count}"

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    # Operands

    def read(self, operand: str, bits: int, kind: str = "u") -> str:
        """An operand of so many bits; as unsigned, signed or floating point number."""
        if self.code.function.bits(operand) or operand.endswith(f":{bits}"):
            return self._narrow(self._local(operand), bits, kind)
        if operand in SPECIAL:
            return self._narrow(_Local(32, {"u": self.let(f"{SPECIAL[operand]}[i]")}), bits, kind)
        if operand in self.code.function.local:
            return self._narrow(
                _Local(64, {"u": self.let(self._local_address(operand))}), bits, kind
            )
        raw = self._immediate(operand, bits)
        value = values.UNSIGNED[bits](raw)
        return self.constant(
            value if kind == "u" or bits == 1 else value.view(values.TYPES[kind][bits])
        )

    def _local(self, register: str) -> _Local:
        if register not in self.locals:
            number = self.code.register(register)
            bits = 8 * self.code.dtypes[number]().itemsize
            name = self.let(f"R[{number}][i]")
            self.locals[register] = _Local(
                1 if self.code.dtypes[number] is np.bool_ else bits, {"u": name}, True
            )
        return self.locals[register]

    def _narrow(self, local: _Local, bits: int, kind: str) -> str:
        if local.bits < bits:
            raise Unsupported(f"a register of {local.bits} bits in: {self.now.text}")
        if local.bits > bits:
            local = _Local(bits, {"u": self.let(f"{self._as(local, 'u')}.astype(U{bits})")})
        return self._as(local, kind)

    def _as(self, local: _Local, kind: str) -> str:
        if kind == "b" or local.bits == 1:
            kind = "u"
        if kind not in local.names:
            if "u" not in local.names:
                ((source, name),) = local.names.items()
                how = f"bits_of({name})" if source == "f" else f"{name}.view(U{local.bits})"
                local.names["u"] = self.let(how)
            if kind != "u":
                letter = {"s": "I", "f": "F"}[kind]
                local.names[kind] = self.let(f"{local.names['u']}.view({letter}{local.bits})")
        return local.names[kind]

    def _local_address(self, variable: str) -> str:
        """In each thread's own memory."""
        offset = np.uint64(self.code.function.local[variable].offset)
        return f"E.local_begin[i] + {self.constant(offset)}"

    def _immediate(self, operand: str, bits: int) -> int:
        if match := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", operand):
            if len(match[2]) * 4 == bits:
                return int(match[2], 16)
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            return int(operand.rstrip("U"), 0) & (1 << bits) - 1
        elif (address := self.symbol(operand)) is not None:
            return address
        raise Unsupported(f"operand {operand} in: {self.now.text}")

    def symbol(self, name: str) -> int | None:
        """The address of a variable."""
        name, _, offset = name.partition("+")
        function = self.code.function
        if name in function.shared:
            return SHARED_BEGIN + function.shared[name].offset + int(offset or 0)
        if name in function.params and function.is_kernel:
            return PARAM + function.params[name].offset + int(offset or 0)
        return None

    def passed(self, operand: str, bits: int) -> str | None:
        """The register of ``[variable+offset]``, if that is a parameter or result of a call."""
        variable, _, offset = operand[1:-1].partition("+")
        function = self.code.function
        here = (
            function.passed
            if function.is_kernel
            else {*function.passed, *function.params, *function.results}
        )
        return passed_name(variable, int(offset or 0), bits) if variable in here else None

    def address(self, operand: str) -> str:
        base, _, offset = operand[1:-1].replace(" ", "").partition("+")
        bits = self.code.function.bits(base)
        if bits is None and base in self.code.function.local:
            self.locals[base] = _Local(64, {"u": self.let(self._local_address(base))})
        elif bits is None:
            return self.constant(np.uint64(self._immediate(operand[1:-1], 64)))
        text = self._as(self._local(base), "u") + (".astype(U64)" if bits == 32 else "")
        if int(offset or "0", 0) == 0:
            return text
        return self.let(f"{text} + {self.constant(np.uint64(int(offset, 0) & (1 << 64) - 1))}")

    # Results

    def define(self, register: str, expression: str, bits: int, kind: str = "u") -> None:
        """A register becomes a number of so many bits; one that is wider takes its sign along."""
        if register == "_":
            return
        kind = "u" if kind == "b" or bits == 1 else kind
        width = self.code.function.bits(register) or bits
        if width > bits > 1:
            if kind == "f":
                raise Unsupported(f"a register of {width} bits in: {self.now.text}")
            expression = f"({expression}).astype({'I' if kind == 's' else 'U'}{width})"
        elif width < bits:
            raise Unsupported(f"a register of {width} bits in: {self.now.text}")
        self.locals[register] = _Local(width, {kind: self.let(expression)})
        self._mark(register)

    def move(self, register: str, operand: str, bits: int) -> None:
        if self.code.function.bits(operand) == bits == self.code.function.bits(register):
            local = self._local(operand)
            self.locals[register] = _Local(local.bits, dict(local.names), True)
            self._mark(register)
        else:
            self.define(register, self.read(operand, bits), bits)

    def _mark(self, register: str) -> None:
        if register not in self.written:
            self.written.append(register)

    # The function

    def _own(self, local: _Local) -> str:
        """Of a register's own memory, a copy."""
        name = self._as(local, "u")
        return self.let(f"{name}.copy()") if local.loaded else name

    def write(self, block: Block, instructions: dict[str, Callable[..., None]]) -> None:
        """Compiles the block, for ``Block.run``."""
        result = None
        for item in block.instructions:
            self.now = item
            if item.name in ("bra", "ret", "exit"):
                if item.guard:
                    result = self.read(item.guard, 1)
                    result = f"~{result}" if item.negated else result
            elif item.name in instructions:
                instructions[item.name](self, item)
            else:
                raise Unsupported(f"instruction {item.name}: {item.text}")
        kept = [name for name in self.written if name in self.code.shared or ":" in name]
        names = [self._own(self.locals[register]) for register in kept]  # before any is overwritten
        for register, name in zip(kept, names, strict=True):
            self.line(f"R[{self.code.register(register)}][i] = {name}")
        body = "\n    ".join([*self.lines, f"return {result}"])
        text = f"def run(E, R, i):\n    {body}\n"
        space = {f"U{bits}": kind for bits, kind in values.UNSIGNED.items()}
        space |= {f"I{bits}": kind for bits, kind in values.SIGNED.items()}
        space |= {f"F{bits}": kind for bits, kind in values.FLOAT.items()}
        space |= {"np": np, "values": values, "bits_of": values.bits_of, **self.constants}
        exec(compile(text, f"<{self.code.function.name}>", "exec"), space)
        block.run = space["run"]
        block.touched = sorted({int(n) for n in re.findall(r"R\[(\d+)\]", text)})
