"""Instructions that compute: numbers, bits, choices and conversions."""

from __future__ import annotations

from .instructions import INSTRUCTIONS, instruction, modifiers, simple
from .parse import BITS, Instruction, Unsupported
from .translate import Writer

__all__ = ["INSTRUCTIONS"]

# Arithmetic -----------------------------------------------------------------------------------

FLOATS = {"add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}"}
FLOATS |= {"fma": "values.fma({0}, {1}, {2})", "sqrt": "np.sqrt({0})"}
FLOATS |= {"rcp": "F{bits}(1) / {0}", "mad": "values.fma({0}, {1}, {2})"}
ROUGH = {"rcp": "np.reciprocal", "sqrt": "np.sqrt"}


@instruction(*FLOATS)
def arithmetic(writer: Writer, item: Instruction) -> None:
    if item.type[0] != "f":
        return _INTEGERS[item.name](writer, item)
    if item.words == ["rcp", "approx", "ftz", "f64"]:
        return simple(writer, item, "values.reciprocal_approximation({0})")
    if item.words[1:] == ["approx", "ftz", "f32"] and item.name in ROUGH:
        return simple(writer, item, f"values.approximation({ROUGH[item.name]}, {{0}})")
    found = modifiers(item, "rn")
    if not found or item.type == "f16":  # without .rn two of them may become one
        raise Unsupported(f"arithmetic that is not rounded to nearest: {item.text}")
    return simple(writer, item, FLOATS[item.name])


def _lower(writer: Writer, item: Instruction) -> None:
    modifiers(item)
    simple(writer, item, FLOATS[item.name], "u")


def _product(writer: Writer, item: Instruction) -> None:
    found = modifiers(item, "lo", "hi", "wide")
    bits, kind = BITS[item.type], "s" if item.type[0] == "s" else "u"
    a, b = (writer.read(operand, bits, kind) for operand in item.operands[1:3])
    width = bits
    if "wide" in found:
        width = 2 * bits
        wide = f"{'I' if kind == 's' else 'U'}{width}"
        product = f"{a}.astype({wide}) * {b}.astype({wide})"
    elif "hi" in found:
        product = f"values.multiply_high({a}, {b})"
    else:
        product = f"{a} * {b}"
    if item.name == "mad":
        product = f"({product}) + {writer.read(item.operands[3], width, kind)}"
    writer.define(item.operands[0], product, width, kind)


def _quotient(writer: Writer, item: Instruction) -> None:
    modifiers(item)
    simple(writer, item, "values.divide({0}, {1})")


_INTEGERS = {"add": _lower, "sub": _lower, "mul": _product, "mad": _product, "div": _quotient}


@instruction("rem")
def rem(writer: Writer, item: Instruction) -> None:
    modifiers(item)
    simple(writer, item, "values.remainder({0}, {1})")


@instruction("min", "max")
def extreme(writer: Writer, item: Instruction) -> None:
    name = {"min": "minimum", "max": "maximum"}[item.name]
    if modifiers(item, "NaN"):
        assert item.words == ["max", "NaN", "f32"]
        name = "maximum_or_nan"
    simple(writer, item, f"{'values' if item.type[0] == 'f' else 'np'}.{name}({{0}}, {{1}})")


@instruction("neg", "abs")
def sign(writer: Writer, item: Instruction) -> None:
    modifiers(item)
    bits = BITS[item.type]
    if item.type[0] == "f":
        top = 1 << bits - 1
        simple(
            writer,
            item,
            f"{{0}} ^ U{bits}({top})" if item.name == "neg" else f"{{0}} & U{bits}({top - 1})",
            "u",
        )
    else:
        simple(writer, item, "-{0}" if item.name == "neg" else "np.abs({0})")


@instruction("copysign")
def copysign(writer: Writer, item: Instruction) -> None:
    """The sign of the first on the second."""
    modifiers(item)
    top = 1 << BITS[item.type] - 1
    kind = f"U{BITS[item.type]}"
    simple(writer, item, f"{{0}} & {kind}({top}) | {{1}} & {kind}({top - 1})", "u")


# Bits -----------------------------------------------------------------------------------------


@instruction("and", "or", "xor", "not")
def bitwise(writer: Writer, item: Instruction) -> None:
    modifiers(item)
    symbol = {"and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "~{0}"}
    simple(writer, item, symbol[item.name], "u")


@instruction("shl", "shr")
def shift(writer: Writer, item: Instruction) -> None:
    modifiers(item)
    bits, kind = BITS[item.type], "s" if item.type[0] == "s" else "u"
    a, by = writer.read(item.operands[1], bits, kind), writer.read(item.operands[2], 32)
    constant = writer.constants.get(by)
    if constant is not None and constant < bits:
        symbol = "<<" if item.name == "shl" else ">>"
        amount = f"{'I' if kind == 's' else 'U'}{bits}({constant})"
        return writer.define(item.operands[0], f"{a} {symbol} {amount}", bits, kind)
    name = "shift_left" if item.name == "shl" else "shift_right"
    return writer.define(item.operands[0], f"values.{name}({a}, {by})", bits, kind)


@instruction("shf")
def shf(writer: Writer, item: Instruction) -> None:
    found = modifiers(item, "l", "r", "wrap", "clamp")
    simple(
        writer,
        item,
        f"values.funnel_shift({{0}}, {{1}}, {{2}}, {'l' in found}, {'wrap' in found})",
        "u",
    )


@instruction("prmt")
def prmt(writer: Writer, item: Instruction) -> None:
    modifiers(item)
    simple(writer, item, "values.permute_bytes({0}, {1}, {2})", "u")


@instruction("lop3")
def lop3(writer: Writer, item: Instruction) -> None:
    modifiers(item)
    to, *given, table = item.operands
    words = ", ".join(writer.read(operand, 32) for operand in given)
    writer.define(to, f"values.three_inputs({words}, {int(table, 0)})", 32)


@instruction("bfe", "bfi")
def bit_field(writer: Writer, item: Instruction) -> None:
    modifiers(item)
    bits = BITS[item.type]
    to, *given, at, length = item.operands
    words = [writer.read(operand, bits) for operand in given]
    words += [writer.read(operand, 32) for operand in (at, length)]
    name = "bit_field" if item.name == "bfe" else "insert_bits"
    name = f"signed_{name}" if item.type[0] == "s" else name
    writer.define(to, f"values.{name}({', '.join(words)})", bits)


# Choosing -------------------------------------------------------------------------------------

COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARE |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


@instruction("setp")
def setp(writer: Writer, item: Instruction) -> None:
    _, how, *rest, kind = item.words
    if kind not in BITS or rest not in ([], ["and"], ["or"], ["xor"]):
        raise Unsupported(f"a comparison of this kind: {item.text}")
    a, b = (writer.read(operand, BITS[kind], kind[0]) for operand in item.operands[1:3])
    if how in ("num", "nan"):
        text = f"np.isnan({a}) | np.isnan({b})" if how == "nan" else f"({a} == {a}) & ({b} == {b})"
    elif how == "neu":
        text = f"{a} != {b}"
    elif how == "equ":
        text = f"({a} == {b}) | ({a} != {a}) | ({b} != {b})"
    elif how in ("ltu", "leu", "gtu", "geu"):
        opposite = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
        text = f"~({a} {opposite[how]} {b})"
    elif how == "ne" and kind[0] == "f":
        text = f"({a} < {b}) | ({a} > {b})"
    elif how in COMPARE:
        text = f"{a} {COMPARE[how]} {b}"
    else:
        raise Unsupported(f"comparison .{how} in: {item.text}")
    first, _, second = item.operands[0].partition("|")
    result = writer.let(text)
    results = [result, f"~{result}"]
    if rest:
        negated = item.operands[3].startswith("!")
        other = ("~" if negated else "") + writer.read(item.operands[3].lstrip("!"), 1)
        symbol = {"and": "&", "or": "|", "xor": "^"}[rest[0]]
        results = [f"{text} {symbol} {other}" for text in results]
    writer.define(first, results[0] if rest else f"{result}", 1)
    if second:
        writer.define(second, results[1], 1)


@instruction("selp")
def selp(writer: Writer, item: Instruction) -> None:
    modifiers(item)
    bits = BITS[item.type]
    to, yes, no, which = item.operands
    chosen = f"np.where({writer.read(which, 1)}, {writer.read(yes, bits)}, {writer.read(no, bits)})"
    writer.define(to, chosen, bits)


# Converting -----------------------------------------------------------------------------------


@instruction("cvt")
def cvt(writer: Writer, item: Instruction) -> None:
    to, source = item.words[-2:]
    found = modifiers(item, "rn", "rzi", "rni", "rmi", "rpi", "sat", types=2)
    register, *given = item.operands
    if to in ("bf16x2", "f16x2") and source == "f32" and found == {"rn"}:
        convert = {"bf16x2": "bfloat16_bits", "f16x2": "float16_bits"}[to]
        high, low = (f"values.{convert}({writer.read(operand, 32, 'f')})" for operand in given)
        return writer.define(register, f"values.pair({high}, {low})", 32)
    if to == "bf16" and source == "f32" and found == {"rn"}:
        return writer.define(
            register, f"values.bfloat16_bits({writer.read(given[0], 32, 'f')})", 16
        )
    if to == "f32" and source == "bf16" and not found:
        word = f"{writer.read(given[0], 16)}.astype(U32) << U32(16)"
        return writer.define(register, f"bits_of(({word}).view(F32))", 32)
    if to not in BITS or {to, source} & {"bf16", "bf16x2", "f16x2", "pred"}:
        raise Unsupported(f"a conversion of this kind: {item.text}")
    return _cvt_number(writer, item, found - {"sat"}, "sat" in found)


def _cvt_number(writer: Writer, item: Instruction, mode: set[str], saturates: bool) -> None:
    to, source = item.words[-2:]
    bits, kind = BITS[to], to[0].replace("b", "u")
    width, was = BITS[source], source[0].replace("b", "u")
    value = writer.read(item.operands[1], width, was)
    dtype = f"{ {'u': 'U', 's': 'I', 'f': 'F'}[kind] }{bits}"
    integral = mode & {"rzi", "rni", "rmi", "rpi"}
    if kind == "f" and was == "f":
        if integral and bits == width:
            text = f"values.integral({value}, {min(mode)!r})"
        elif mode == ({"rn"} if bits < width else set()):
            text = f"{value}.astype({dtype})"
        else:
            raise Unsupported(f"a conversion of this kind: {item.text}")
        text = f"values.saturated({text})" if saturates else text
    elif kind == "f" and mode == {"rn"}:
        text = f"{value}.astype({dtype})"
    elif was == "f" and integral:
        text = f"values.to_integer({value}, {dtype}, {min(mode)!r})"
    elif kind != "f" and was != "f" and not mode:
        text = f"values.clamped({value}, {dtype})" if saturates else f"{value}.astype({dtype})"
    else:
        raise Unsupported(f"a conversion of this kind: {item.text}")
    writer.define(item.operands[0], text, bits, kind)
