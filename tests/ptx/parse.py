"""PTX text as functions of instructions and labels."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

BITS = {"pred": 1, "f16x2": 32, "bf16": 16, "bf16x2": 32}
BITS |= {f"{kind}{bits}": bits for kind in "busf" for bits in (8, 16, 32, 64)}


class Unsupported(Exception):
    """PTX that this machine does not know."""


@dataclass
class Instruction:
    text: str
    words: list[str]  # of the opcode, which dots separate
    operands: list[str]
    guard: str | None = None  # the predicate under which it is executed
    negated: bool = False

    @property
    def name(self) -> str:
        return self.words[0]

    @property
    def type(self) -> str:
        return self.words[-1]


@dataclass
class Variable:
    offset: int
    size: int


@dataclass
class Function:
    name: str
    is_kernel: bool
    params: dict[str, Variable]
    results: dict[str, Variable]
    registers: dict[str, int] = field(
        default_factory=dict
    )  # bits of a name, or of a prefix of names
    shared: dict[str, Variable] = field(default_factory=dict)
    local: dict[str, Variable] = field(default_factory=dict)
    passed: set[str] = field(default_factory=set)  # parameters and results of the calls in it
    body: list[Instruction | str] = field(default_factory=list)  # a string is a label

    @property
    def shared_bytes(self) -> int:
        return _size(self.shared)

    @property
    def local_bytes(self) -> int:
        return _size(self.local)

    def bits(self, register: str) -> int | None:
        """Of a register; None if there is no such register."""
        if register in self.registers:
            return self.registers[register]
        return self.registers.get(register.rstrip("0123456789")) if register[:1] == "%" else None


def _size(variables: dict[str, Variable]) -> int:
    return max((v.offset + v.size for v in variables.values()), default=0)


def parse(text: str) -> dict[str, Function]:
    """The functions of a module that have a body. An instruction that names one of its variables is
    unsupported: constants of C++ become variables, but kernels use their values."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)
    functions = {}
    at = 0
    while match := re.compile(r"\.(entry|func)\b([^{;]*)([{;])").search(text, at):
        at = match.end()
        if match[3] == ";":
            continue
        end = _end_of_scope(text, at)
        function = _header(match[1] == "entry", match[2])
        _Body(function).read(text[at : end - 1])
        functions[function.name] = function
        at = end
    return functions


def _end_of_scope(text: str, at: int) -> int:
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.end()
    raise Unsupported("a function without an end")


def _header(is_kernel: bool, text: str) -> Function:
    match = re.match(r"\s*(\([^)]*\))?\s*([\w$]+)\s*(\([^)]*\))?", text)
    return Function(match[2], is_kernel, _parameters(match[3] or ""), _parameters(match[1] or ""))


_VARIABLE = re.compile(
    r"\.(?:param|shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[(\d+)\])?"
)


def _place(text: str, into: dict[str, Variable]) -> str:
    """Adds a declared variable behind the others; its name."""
    match = _VARIABLE.match(text.strip())
    if match is None:
        raise Unsupported(text)
    size = BITS[match[2]] // 8
    align = int(match[1] or size)
    end = _size(into)
    into[match[3]] = Variable((end + align - 1) // align * align, size * int(match[4] or 1))
    return match[3]


def _parameters(text: str) -> dict[str, Variable]:
    found: dict[str, Variable] = {}
    for part in text.strip("() \t\r\n").split(","):
        if part.strip():
            _place(part, found)
    return found


def operands(text: str) -> list[str]:
    """Separated by commas, but for those in brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\([^)]*\)|\[[^]]*\]|[^,])+", text)]


class _Body:
    def __init__(self, function: Function) -> None:
        self.function = function
        self.scopes: list[
            dict[str, str]
        ] = []  # names declared in inner scopes, and what they become
        self.renamed = 0

    def read(self, text: str) -> None:
        token = re.compile(r"\s*(?:([{}])|([\w$]+)\s*:(?!:)|([^;{}][^;]*);)")
        at = 0
        while match := token.match(text, at):
            at = match.end()
            if match[1] == "{":
                self.scopes.append({})
            elif match[1] == "}":
                self.scopes.pop()
            elif match[2]:
                self.function.body.append(match[2])
            elif match[3].startswith("."):
                self.declare(match[3])
            else:
                self.function.body.append(self.instruction(match[3]))
        if text[at:].strip():
            raise Unsupported(text[at : at + 80].strip())

    def declare(self, text: str) -> None:
        directive = text.split(None, 1)[0]
        if directive == ".reg":
            kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, flags=re.S).groups()
            for name in names.split(","):
                self.function.registers[self.unique(name.strip().split("<")[0])] = BITS[kind]
        elif directive == ".shared":
            _place(text, self.function.shared)
        elif directive == ".local":
            _place(text, self.function.local)
        elif directive == ".param":
            self.function.passed.add(self.unique(_place(text, {})))
        elif directive != ".pragma":
            raise Unsupported(text)

    def unique(self, name: str) -> str:
        """Names of inner scopes may come several times."""
        if not self.scopes:
            return name
        self.renamed += 1
        self.scopes[-1][name] = f"{name}.{self.renamed}"
        return self.scopes[-1][name]

    def instruction(self, text: str) -> Instruction:
        match = re.match(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)", text, flags=re.S)
        if match is None:
            raise Unsupported(text)
        given = operands(self.in_scope(match[4]))
        guard = self.in_scope(match[2]) if match[2] else None
        plain = " ".join(text.split())
        return Instruction(plain, match[3].split("."), given, guard, match[1] == "!")

    def in_scope(self, text: str) -> str:
        if not any(self.scopes):
            return text
        names = {old: new for scope in self.scopes for old, new in scope.items()}
        return re.sub(r"[%\w$]+", lambda name: names.get(name[0], name[0]), text)
