"""NVRTC, which needs no GPU: from PyPI, as make puts it into build/nvrtc, and where FUSEDOPT_NVRTC
says. What it compiles here is what fusedopt compiles on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# What a kernel is compiled for, as far as an NVRTC knows it.
ARCHITECTURES = (75, 80, 86, 90, 100, 120)
# How large a table may be, where the driver knows CUDA 12.1.
ARGUMENT_BYTES = 32764


@contextlib.contextmanager
def _kept_locale() -> Iterator[None]:
    """NVRTC leaves the thread with the locale "C"."""
    libc = ctypes.CDLL(None)
    libc.uselocale.restype, libc.uselocale.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    before = libc.uselocale(None)
    try:
        yield
    finally:
        libc.uselocale(before)


class NotCompiled(Exception):
    """With the compiler's words."""


class Nvrtc:
    """The library in a folder. Its builtins are loaded first: it does not look for them there."""

    def __init__(self, folder: Path) -> None:
        (builtins,) = _libraries(folder, "libnvrtc-builtins.so.*")
        (library,) = _libraries(folder, "libnvrtc.so.*")
        self._builtins = ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(str(library))
        self.path = str(library)
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", known)
        self.architectures = [number for number in ARCHITECTURES if number in known]

    def __repr__(self) -> str:
        return "NVRTC {}.{}".format(*self.version)

    def _call(self, name: str, *arguments: Any) -> None:
        if error := getattr(self._library, name)(*arguments):
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise NotCompiled(f"{name}: {self._library.nvrtcGetErrorString(error).decode()}")

    def _text(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, text)
        return text.raw

    def _compile(self, source: str, options: list[str], what: str) -> bytes:
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            source.encode(),
            b"kernel.cu",
            0,
            None,
            None,
        )
        try:
            given = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
            try:
                with _kept_locale():
                    self._call("nvrtcCompileProgram", program, len(options), given)
            except NotCompiled as error:
                log = self._text("ProgramLog", program).rstrip(b"\0").decode()
                raise NotCompiled(log) from error
            return self._text(what, program)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def ptx(
        self,
        module: Any,
        kernel: str,
        architecture: int = 90,
        argument_bytes: int = ARGUMENT_BYTES,
    ) -> str:
        """Of a kernel of fusedopt's native module."""
        options = module.kernel_options(f"compute_{architecture}", argument_bytes)
        text = self._compile(module.kernel_source(kernel), options, "PTX")
        return text.rstrip(b"\0").decode()

    def cubin(self, module: Any, kernel: str, architecture: int) -> Cubin:
        options = module.kernel_options(f"sm_{architecture}", ARGUMENT_BYTES)
        return self.assemble(module.kernel_source(kernel), options)

    def assemble(self, source: str, options: list[str]) -> Cubin:
        return Cubin(self._compile(source, options, "CUBIN"))


def _libraries(folder: Path, pattern: str) -> Iterator[Path]:
    return (path for path in sorted(folder.glob(pattern)) if ".alt." not in path.name)


@functools.cache
def compilers() -> tuple[Nvrtc, ...]:
    """All that there are, the oldest first."""
    places = os.environ.get("FUSEDOPT_NVRTC", str(ROOT / "build" / "nvrtc")).split(os.pathsep)
    folders = {path.parent for place in places for path in Path(place).rglob("libnvrtc.so.*")}
    return tuple(sorted((Nvrtc(folder) for folder in sorted(folders)), key=lambda it: it.version))


# Machine code ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    name: str
    info: int
    data: bytes


class Cubin:
    """What an ELF file of machine code for a GPU says of its only kernel."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.sections = list(_sections(data))
        (self.code,) = (s for s in self.sections if s.name.startswith(".text."))

    @property
    def registers(self) -> int:
        """Of a thread."""
        return self._most(0x2F)  # EIATTR_REGCOUNT

    @property
    def local_bytes(self) -> int:
        """What a thread has in local memory: spilled registers, arrays with a computed index."""
        return self._most(0x11)  # EIATTR_FRAME_SIZE

    def _most(self, kind: int) -> int:
        """Of a number that each function has: its symbol, and the number."""
        (*found,) = (struct.unpack("<2I", value)[1] for k, value in self._info() if k == kind)
        assert found, f"no entry {kind:#x} in .nv.info"
        return max(found)

    def _info(self) -> Iterator[tuple[int, bytes]]:
        """The entries of .nv.info that have a length: format, kind, length, value."""
        for section in self.sections:
            at = 0
            while section.name == ".nv.info" and at < len(section.data):
                form, kind, size = struct.unpack_from("<BBH", section.data, at)
                at += 4
                if form == 4:
                    yield kind, section.data[at : at + size]
                    at += size


def _sections(data: bytes) -> Iterator[Section]:
    """Of a little-endian ELF file of 64 bits."""
    assert data[:6] == b"\x7fELF\x02\x01", data[:6]
    (begin,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<3H", data, 58)
    headers = [struct.unpack_from("<2I4Q2I", data, begin + k * size) for k in range(count)]
    text = headers[names][4]
    for name, kind, _, _, offset, length, _, info in headers:
        end = data.index(b"\0", text + name)
        has_data = kind not in (0, 8)  # none, and memory that is only reserved
        yield Section(
            data[text + name : end].decode(),
            info,
            data[offset : offset + length] if has_data else b"",
        )
