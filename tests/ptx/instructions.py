"""What each instruction of PTX does: the Python that is written for it.

Here is what moves data and what threads do together; ``arithmetic`` enters the rest. A modifier
that is not named is an error, not a guess.
"""

from __future__ import annotations

from collections.abc import Callable

from .parse import BITS, Instruction, Unsupported, operands
from .translate import SHARED, Writer

INSTRUCTIONS: dict[str, Callable[[Writer, Instruction], None]] = {}

Instruct = Callable[[Writer, Instruction], None]


def instruction(*names: str) -> Callable[[Instruct], Instruct]:
    def enter(function: Instruct) -> Instruct:
        INSTRUCTIONS.update(dict.fromkeys(names, function))
        return function

    return enter


def modifiers(item: Instruction, *known: str, types: int = 1) -> set[str]:
    """Those between name and type."""
    found = set(item.words[1 : len(item.words) - types])
    if unknown := found.difference(known):
        raise Unsupported(f"modifier .{min(unknown)} of: {item.text}")
    if item.type not in BITS:
        raise Unsupported(f"type .{item.type} of: {item.text}")
    return found


def simple(
    writer: Writer, item: Instruction, template: str, kind: str = "", first: int = 1
) -> None:
    """A result of the type of all operands."""
    bits = BITS[item.type]
    kind = kind or item.type[0]
    values = [writer.read(operand, bits, kind) for operand in item.operands[first:]]
    writer.define(item.operands[0], template.format(*values, bits=bits), bits, kind)


# Moving ---------------------------------------------------------------------------------------


@instruction("mov")
def mov(writer: Writer, item: Instruction) -> None:
    modifiers(item)
    bits = BITS[item.type]
    to, source = item.operands
    if to.startswith("{"):
        parts = operands(to[1:-1])
        part = bits // len(parts)
        whole = writer.read(source, bits)
        for k, register in enumerate(parts):
            writer.define(register, f"({whole} >> U{bits}({k * part})).astype(U{part})", part)
    elif source.startswith("{"):
        parts = operands(source[1:-1])
        part = bits // len(parts)
        words = [writer.read(operand, part) for operand in parts]
        shifted = [f"({w}.astype(U{bits}) << U{bits}({k * part}))" for k, w in enumerate(words)]
        writer.define(to, " | ".join(shifted), bits)
    else:
        writer.move(to, source, bits)


@instruction("cvta")
def cvta(writer: Writer, item: Instruction) -> None:
    found = modifiers(item, "to", "global", "shared", "param", "local")
    if "shared" in found:
        sign = "-" if "to" in found else "+"
        simple(writer, item, f"{{0}} {sign} U64({SHARED})", "u")
    else:
        writer.move(*item.operands, 64)


SPACES = ("global", "shared", "param", "local")
ORDERED = ("volatile", "relaxed", "acquire", "release")
HINTS = ("cs", "cg", "ca", "nc", "lu", "wb", "wt", "gpu", "cta", "sys", "v2", "v4")
HINTS += ("L1::no_allocate", "L1::evict_first", "L2::128B", "L2::64B", "L2::256B", "weak")


def _access(item: Instruction, at: int) -> tuple[str, bool, list[str]]:
    """The space, whether other threads may use the same memory, the registers."""
    found = modifiers(item, *SPACES, *ORDERED, *HINTS)
    space = next((space for space in SPACES if space in found), "generic")
    registers = item.operands[at]
    names = operands(registers[1:-1]) if registers.startswith("{") else [registers]
    return space, not found.isdisjoint(ORDERED), names


@instruction("ld")
def ld(writer: Writer, item: Instruction) -> None:
    space, ordered, registers = _access(item, 0)
    bits = BITS[item.type]
    if space == "param" and (passed := writer.passed(item.operands[1], bits)):
        return writer.move(registers[0], passed, bits)
    address = writer.address(item.operands[1])
    found = writer.let(f"E.load({space!r}, {address}, {bits}, {len(registers)}, i, {ordered})")
    for k, register in enumerate(registers):
        kind = "s" if item.type[0] == "s" else "u"
        view = f".view(I{bits})" if kind == "s" else ""
        writer.define(register, f"{found}[{k}]{view}", bits, kind)
    return None


@instruction("st")
def st(writer: Writer, item: Instruction) -> None:
    space, ordered, registers = _access(item, 1)
    bits = BITS[item.type]
    if space == "param" and (passed := writer.passed(item.operands[0], bits)):
        return writer.move(passed, registers[0], bits)
    address = writer.address(item.operands[0])
    given = ", ".join(writer.read(register, bits) for register in registers)
    writer.line(f"E.store({space!r}, {address}, {bits}, [{given}], i, {ordered})")
    return None


@instruction("atom")
def atom(writer: Writer, item: Instruction) -> None:
    kinds = ("inc", "add", "exch", "min", "max", "cas")
    found = modifiers(item, *kinds, *SPACES, "gpu", "relaxed", "acq_rel", "acquire", "release")
    kind = next(kind for kind in kinds if kind in found)
    if item.type[0] not in "ub":
        raise Unsupported(f"atom of .{item.type}: {item.text}")
    bits = BITS[item.type]
    space = next((space for space in SPACES if space in found), "generic")
    address = writer.address(item.operands[1])
    given = ", ".join(writer.read(operand, bits) for operand in item.operands[2:])
    call = f"E.atomic({space!r}, {kind!r}, {address}, {bits}, [{given}], i)"
    writer.define(item.operands[0], call, bits)


@instruction("membar", "fence")
def fence(writer: Writer, item: Instruction) -> None:
    """Every thread sees at once what another wrote."""


@instruction("bar", "barrier")
def bar(writer: Writer, item: Instruction) -> None:
    if item.words[1:] not in (["sync"], ["sync", "aligned"], ["warp", "sync"]):
        raise Unsupported(f"a barrier of this kind: {item.text}")
    if "warp" not in item.words and item.operands != ["0"]:
        raise Unsupported(f"a barrier that is not for the whole block: {item.text}")


@instruction("shfl")
def shfl(writer: Writer, item: Instruction) -> None:
    if item.words[1:] != ["sync", "bfly", "b32"]:
        raise Unsupported(f"a shuffle of this kind: {item.text}")
    register, _, valid = item.operands[0].partition("|")
    given = ", ".join(writer.read(operand, 32) for operand in item.operands[1:])
    writer.define(register, f"E.shuffle({given}, i)", 32)
    if valid:
        writer.define(valid, "np.bool_(True)", 1)


@instruction("call")
def call(writer: Writer, item: Instruction) -> None:
    modifiers(Instruction(item.text, [*item.words, "b32"], []), "uni")
    given = item.operands
    results = operands(given[0][1:-1]) if given[0].startswith("(") else []
    name, *rest = given[1:] if given[0].startswith("(") else given
    arguments = operands(rest[0][1:-1]) if rest else []
    function = writer.code.function
    if not {*results, *arguments} <= function.passed:
        raise Unsupported(f"a call of this kind: {item.text}")
    passed = ", ".join(writer.read(f"{argument}+0:64", 64) for argument in arguments)
    found = writer.let(f"E.call({name!r}, [{passed}], {len(results)}, i)")
    for k, result in enumerate(results):
        writer.define(f"{result}+0:64", f"{found}[{k}]", 64)
