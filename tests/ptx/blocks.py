"""Functions cut into basic blocks: what is executed without a branch and without meeting others."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import values
from .parse import Function, Instruction

MEETING = {"bar": "block", "barrier": "block", "shfl": "warp"}


@dataclass
class Block:
    """Instructions that are executed one after the other, by all who enter."""

    code: Code
    instructions: list[Instruction]
    next: int  # the block behind it
    target: int | None = None  # to which a branch goes; beyond all blocks: out
    meeting: str | None = None  # who must have arrived before it is executed: block or warp
    run: Callable[..., Any] | None = None  # made when it is first needed
    touched: list[int] = field(default_factory=list)  # numbers of its registers

    @property
    def conditional(self) -> bool:
        return self.target is not None and self.instructions[-1].guard is not None


class Code:
    """A function ready to run. ``fine``: every access to memory is a block of its own."""

    def __init__(self, function: Function, fine: bool) -> None:
        self.function = function
        self.number: dict[str, int] = {}  # of a register
        self.dtypes: list[Any] = []
        self.blocks = self._cut(function.body, fine)
        self.shared = self._read_elsewhere()

    def register(self, name: str) -> int:
        if name not in self.number:
            bits = self.function.bits(name)
            if bits is None:
                bits = int(name.rpartition(":")[2])  # of a parameter or result: see passed_name
            self.number[name] = len(self.dtypes)
            self.dtypes.append(values.UNSIGNED[bits])
        return self.number[name]

    def _cut(self, body: list[Instruction | str], fine: bool) -> list[Block]:
        flat: list[Instruction] = []
        labels: dict[str, int] = {}
        begins = {0}
        for item in _without_guards(body):
            if isinstance(item, str):
                labels[item] = len(flat)
                begins.add(len(flat))
                continue
            alone = item.name in MEETING or item.name == "call" or (fine and _touches_memory(item))
            if alone:
                begins.add(len(flat))
            flat.append(item)
            if alone or item.name in ("bra", "ret", "exit"):
                begins.add(len(flat))
        cuts = sorted(begin for begin in begins if begin < len(flat))
        at = {begin: n for n, begin in enumerate(cuts)} | {len(flat): len(cuts)}
        blocks = []
        for n, (begin, end) in enumerate(zip(cuts, [*cuts[1:], len(flat)], strict=True)):
            block = Block(self, flat[begin:end], n + 1)
            last = block.instructions[-1]
            if last.name == "bra":
                block.target = at[labels[last.operands[0]]]
            elif last.name in ("ret", "exit"):
                block.target = len(cuts)
            if "warp" not in last.words:
                block.meeting = MEETING.get(last.name)
            blocks.append(block)
        return blocks

    def _read_elsewhere(self) -> set[str]:
        """Registers that a block reads without having written them."""
        found = set()
        for block in self.blocks:
            written: set[str] = set()
            for item in block.instructions:
                words = [re.findall(r"[%\w$.]+", operand) for operand in item.operands]
                first = 0 if item.name in ("st", "bra", "call", "red") else 1
                found |= {w for part in words[first:] for w in part} - written
                found |= {item.guard} - written
                if item.operands and item.operands[0].startswith("["):
                    found |= set(words[0]) - written
                written |= set(words[0]) if first and words else set()
        return {name for name in found if name and self.function.bits(name)}


def _touches_memory(item: Instruction) -> bool:
    return item.name in ("ld", "st", "atom", "red") and "param" not in item.words


def _without_guards(body: list[Instruction | str]) -> list[Instruction | str]:
    """A guarded instruction is one that is jumped over."""
    found: list[Instruction | str] = []
    for n, item in enumerate(body):
        if isinstance(item, str) or item.guard is None or item.name in ("bra", "ret", "exit"):
            found.append(item)
            continue
        jump = Instruction(item.text, ["bra"], [f"over:{n}"], item.guard, not item.negated)
        found += [jump, Instruction(item.text, item.words, item.operands), f"over:{n}"]
    return found


def passed_name(variable: str, offset: int, bits: int) -> str:
    """The register for a parameter or a result of a call."""
    return f"{variable}+{offset}:{bits}"
