"""The kernels' compiled code in the place of their bodies: what the module for tests launches is
run by the machine in ptx/, on the PTX that NVRTC makes of the sources in the module, with barriers,
shared memory, shuffles, tickets, bounds and alignment. It gives the bits of the CPU path. What is
left for a GPU: from PTX to machine code, the order of memory, the driver.

``make kernels`` also runs all tests of the kernels in this way."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import nvrtc
import pytest
from conftest import StandIn
from ptx.launch import Launcher
from ptx.machine import Module
from ptx.tables import Table, rule_of

# Whether all of it is run, and not a choice.
ALL = os.environ.get("FUSEDOPT_COMPILED_KERNELS", "0") not in ("", "0")


def require_compiler() -> nvrtc.Nvrtc:
    """The newest."""
    if not nvrtc.compilers():
        pytest.skip("no NVRTC in build/nvrtc or at FUSEDOPT_NVRTC")
    return nvrtc.compilers()[-1]


def ptx_of(
    compiler: nvrtc.Nvrtc,
    module: Any,
    kernel: str,
    architecture: int = 90,
    argument_bytes: int = nvrtc.ARGUMENT_BYTES,
) -> str:
    """Compiled once for as long as its source is the same."""
    source = module.kernel_source(kernel)
    options = module.kernel_options(str(architecture), argument_bytes)
    key = f"{compiler}\n{options}\n{source}"
    place = nvrtc.ROOT / "build" / "ptx" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.ptx"
    if not place.exists():
        text = compiler.ptx(module, kernel, architecture, argument_bytes)
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(f".{os.getpid()}")  # several processes may be at it
        part.write_text(text)
        part.replace(place)
    return place.read_text()


class CompiledKernels:
    """``edit`` changes the PTX before it is read; ``fine`` and ``launcher`` as ptx/ has them."""

    def __init__(
        self,
        module: Any,
        driver: StandIn,
        compiler: nvrtc.Nvrtc,
        launcher: Launcher | None = None,
        architecture: int = 90,
        argument_bytes: int = nvrtc.ARGUMENT_BYTES,
        fine: bool = False,
        edit: Callable[[str], str] | None = None,
    ) -> None:
        self.module, self.driver, self.compiler = module, driver, compiler
        self.compiled_for = architecture, argument_bytes
        self.launcher = launcher or Launcher()
        self.fine, self.edit = fine, edit
        self.scalars = {name: len(rule["scalars"]) for name, rule in module.rules().items()}
        self.code = functools.cache(self._code)
        self.error: BaseException | None = None
        types = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p]
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int, *types)(self._launch)

    def _code(self, kernel: str) -> Module:
        if self.edit is None:
            return _parsed(self.compiler, self.module, kernel, *self.compiled_for, self.fine)
        text = ptx_of(self.compiler, self.module, kernel, *self.compiled_for)
        return Module(self.edit(text), self.fine)

    def _launch(self, name: bytes, table: int, blocks: int, threads: int, stream: int) -> int:
        """In the place of cuLaunchKernel; 0 is an error."""
        try:
            kernel = name.decode()
            code = self.code(kernel)
            (param,) = code.functions[kernel].params.values()
            raw = ctypes.string_at(table, param.size)
            grid = Table(kernel, raw, self.scalars.get(rule_of(kernel), 0)).grid()
            assert (grid.blocks, grid.threads) == (blocks, threads)
            self.launcher.run(code, grid)
        except BaseException as error:  # none must pass through the driver
            traceback.print_exc()
            self.error = error
            return 0
        return 1

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What was wrong is raised in the end: the step only knows that its launch failed."""
        self.start()
        failure = None
        try:
            yield
        except RuntimeError as error:
            failure = error
        finally:
            _rest(self.module, self.driver)
        error, self.error = self.error, None
        if error is not None:
            raise error from failure
        if failure is not None:
            raise failure

    def start(self) -> None:
        address = ctypes.cast(self._callback, ctypes.c_void_p).value
        assert address is not None
        self.driver.run_with(address)


_always: list[CompiledKernels] = []


def use_always(module: Any, driver: StandIn) -> None:
    """All launches of this process that nobody else wants."""
    _always.append(CompiledKernels(module, driver, require_compiler()))
    _always[0].start()
    atexit.register(driver.run_with, module.RUN_ON_HOST)  # while what is called is there


def _rest(module: Any, driver: StandIn) -> None:
    if _always:
        _always[0].start()
    else:
        driver.run_with(module.RUN_ON_HOST)


@functools.cache
def _parsed(
    compiler: nvrtc.Nvrtc,
    module: Any,
    kernel: str,
    architecture: int,
    argument_bytes: int,
    fine: bool,
) -> Module:
    return Module(ptx_of(compiler, module, kernel, architecture, argument_bytes), fine)
