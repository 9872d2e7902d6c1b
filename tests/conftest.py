"""Fixtures: the backend that a test runs on, and fresh random numbers whose seed is shown."""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

# Before the import: tests of several threads are to have them on a busy machine, too.
os.environ.setdefault("FUSEDOPT_CPU_THREADS", "always")
# Tests leave nothing in the cache of this user, nor take anything from there.
if "FUSEDOPT_CACHE_DIR" not in os.environ:
    os.environ["FUSEDOPT_CACHE_DIR"] = tempfile.mkdtemp(prefix="fusedopt-cache-")
    atexit.register(shutil.rmtree, os.environ["FUSEDOPT_CACHE_DIR"], ignore_errors=True)

import seam

import fusedopt
from fusedopt import torch_layout

TIMM = Path(__file__).parents[1] / "build" / "timm"


def offer_timm() -> None:
    """timm and torchvision from the folder where make puts them, if they are not installed.

    Beside a torch without CUDA the operators that torchvision has compiled cannot be loaded, and
    it fails unless it finds those that it wants to register more about.
    """
    if not TIMM.is_dir() or importlib.util.find_spec("torchvision"):
        return
    sys.path.append(str(TIMM))
    for name in ("nms", "qnms") if torch.version.cuda is None else ():
        torch.library.define(
            f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )


offer_timm()
SEED = int(os.environ.get("FUSEDOPT_TEST_SEED", random.SystemRandom().randrange(2**31)))
os.environ["FUSEDOPT_TEST_SEED"] = str(SEED)  # one for all processes of pytest-xdist


def pytest_report_header() -> str:
    return f"fusedopt: {fusedopt.backend.status()}; random inputs: FUSEDOPT_TEST_SEED={SEED}"


def pytest_collection_finish() -> None:
    """What 40,000 tests consist of is never garbage: looking through it takes half a second, which
    each test that collects garbage would wait for."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(SEED)
    random.seed(SEED)


@pytest.fixture(autouse=True)
def step_threads() -> Iterator[Callable[[int], None]]:
    """Native steps run on several threads, or as many as a test asks for, and all else on one:
    on a busy machine, torch's operators would spend the time waiting for each other."""
    count, before = 3, torch.get_num_threads()

    def choose(threads: int) -> None:
        nonlocal count
        count = threads

    def pre(opt: torch.optim.Optimizer, *_: object) -> None:
        native = fusedopt.backend.native and type(opt).__module__.startswith("fusedopt")
        torch.set_num_threads(count if native else 1)

    torch.set_num_threads(1)
    hooks = [
        register_optimizer_step_pre_hook(pre),
        register_optimizer_step_post_hook(lambda *_: torch.set_num_threads(1)),
    ]
    yield choose
    for hook in hooks:
        hook.remove()
    torch.set_num_threads(before)


def skip_or_fail(why: str) -> None:
    if os.environ.get("FUSEDOPT_REQUIRE_NATIVE", "0") not in ("", "0"):
        pytest.fail(f"FUSEDOPT_REQUIRE_NATIVE is set, but: {why}")
    pytest.skip(why)


def require_native() -> None:
    if fusedopt.backend.native is None:
        skip_or_fail(fusedopt.backend.error or "no native module")


class StandIn:
    """tests/native/stand_in_driver.cpp, which takes the place of CUDA's driver and NVRTC."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.library = compiled(folder, "stand_in_driver", "-O1", *flags)
        self.library.stand_in_calls.restype = ctypes.c_long
        self.library.stand_in_run_with.argtypes = [ctypes.c_void_p]
        self.path = str(folder / "stand_in_driver.so")
        self.reset()

    def reset(self) -> None:
        """A GPU that is new to nobody, where nothing fails."""
        self.library.stand_in_reset()

    def set(self, **settings: int) -> None:
        for name, value in settings.items():
            self.library.stand_in_set(name.encode(), ctypes.c_long(value))

    def name(self, model: str) -> None:
        """What the GPUs are."""
        self.library.stand_in_name(model.encode())

    def fail(self, function: str, result: int, after: int = 0) -> None:
        """The calls after so many fail with this; 0: no longer."""
        self.library.stand_in_fail(function.encode(), result, after)

    def calls(self, function: str) -> int:
        return self.library.stand_in_calls(function.encode())

    def compile_with(self, library: str) -> None:
        """A real NVRTC; none: by nothing, as at first."""
        assert self.library.stand_in_compile_with(library.encode())

    def run_with(self, launch: int) -> None:
        """The address of what a launch calls: with the kernel's name and its argument."""
        self.library.stand_in_run_with(launch)


@functools.cache
def stand_in() -> StandIn:
    return StandIn(Path(tempfile.mkdtemp(prefix="fusedopt-driver-")))


@functools.cache
def _load_kernels() -> Any:
    place = Path(os.environ.get("FUSEDOPT_ON_HOST") or Path(__file__).parents[1] / "build/on_host")
    found = [*place.glob("_native_on_host*.so")] if place.is_dir() else [place]
    if not found or not found[0].exists():
        return None
    spec = importlib.util.spec_from_file_location("_native_on_host", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    seam.bind(module)
    stand_in().run_with(module.RUN_ON_HOST)
    seam.use_driver(module, stand_in().path)
    if os.environ.get("FUSEDOPT_COMPILED_KERNELS", "0") not in ("", "0"):
        import compiled_kernels  # which needs this module

        compiled_kernels.use_always(module, stand_in())
    return module


def require_kernels() -> Any:
    """The module that runs the body of the GPU's kernels on the CPU, where all memory is that of
    one GPU."""
    module = _load_kernels()
    if module is None:
        skip_or_fail("no module in build/on_host or at FUSEDOPT_ON_HOST")
    return module


@pytest.fixture
def only_by_the_rule() -> Iterator[None]:
    """For tests that compare bits of what torch computes too with bits of what it does not."""
    with seam.only_by_the_rule():
        yield


@pytest.fixture(params=["python", "native", "kernels"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test on every backend, within one process."""
    if request.param == "native":
        require_native()
    elif request.param == "kernels":
        monkeypatch.setattr(fusedopt.backend, "native", require_kernels())
    else:
        monkeypatch.setattr(fusedopt.backend, "native", None)
    return request.param


@pytest.fixture(params=["native", "kernels"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module that steps, once with its own loops and once with the kernels on the host.
    Whatever a test makes it forget, it knows again afterwards."""
    require_native()
    if request.param == "kernels":
        monkeypatch.setattr(fusedopt.backend, "native", require_kernels())
    yield fusedopt.backend.native
    assert torch_layout.prove(fusedopt.backend.native) is None


@pytest.fixture
def native() -> None:
    """For tests of what only the native module promises."""
    require_native()


@pytest.fixture
def kernels() -> Any:
    """For tests that compare the native module with this one."""
    require_native()
    return require_kernels()


def compiled(folder: Path, name: str, *flags: str) -> ctypes.CDLL:
    """tests/native/NAME.cpp, as functions. ``flags``: of the compiler, and further sources."""
    compiler = shutil.which("g++")
    if compiler is None:
        skip_or_fail("no g++")
    source, target = Path(__file__).parent / "native" / f"{name}.cpp", folder / f"{name}.so"
    command = [compiler, "-std=c++17", *flags, "-shared", "-fPIC", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """tests/native/storage.cpp over csrc/storage/, as functions."""
    fast = ["-O3", "-march=native", "-fno-trapping-math", "-Wno-unknown-pragmas"]
    module = compiled(tmp_path_factory.mktemp("native"), "storage", *fast)
    word = ctypes.c_uint64
    module.wrong_masters.argtypes, module.wrong_masters.restype = [word, word], word
    module.philox_words.argtypes = [word, word, word, ctypes.c_void_p]
    pointer = ctypes.c_void_p
    module.split_masters.argtypes = [pointer, ctypes.c_int64, pointer, pointer]
    module.join_masters.argtypes = [pointer, pointer, ctypes.c_int64, pointer]
    return module
