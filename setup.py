"""Builds ``fusedopt._native`` with CMake; everything else about the package is in pyproject.toml.

A failed build does not fail the installation: fusedopt works without its native module, and
``python -m fusedopt.info`` shows the complete error, which travels in ``_build_error.txt``.
FUSEDOPT_REQUIRE_NATIVE=1 makes a failure an error, FUSEDOPT_NATIVE=0 skips the build.
"""

import os
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VARIABLES = ("CXX", "CXXFLAGS", "LDFLAGS")  # what CMake and the compilers read


def find_tool(name: str, bin_dir: str) -> str:
    """Path of cmake or ninja: the one installed by pip, else the one on PATH, else ''."""
    try:
        path = os.path.join(getattr(import_module(name), bin_dir), name)
    except (ImportError, AttributeError, OSError):
        path = name
    return shutil.which(path) or ""


class BuildNative(build_ext):
    def run(self) -> None:
        self.packages = {Path(self.build_lib).resolve() / "fusedopt"}
        if self.inplace:
            self.packages.add(ROOT / "fusedopt")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        for package in self.packages:  # nothing of an earlier build may stay behind
            for stale in (Path(self.get_ext_filename(ext.name)).name, "_build_error.txt"):
                (package / stale).unlink(missing_ok=True)
        if os.environ.get("FUSEDOPT_NATIVE") == "0":
            self.leave_reason("FUSEDOPT_NATIVE=0 was set when fusedopt was installed.\n")
            return
        try:
            self.compile()
        except Exception as error:
            if os.environ.get("FUSEDOPT_REQUIRE_NATIVE") == "1":
                raise SystemExit(f"fusedopt's native module could not be built: {error}") from None
            self.leave_reason(f"{error}\n")
            self.warn(
                "fusedopt's native module could not be built; fusedopt works without it, more "
                "slowly. `python -m fusedopt.info` shows the complete error, which begins:\n"
                + "\n".join(str(error).splitlines()[:20])
            )

    def leave_reason(self, reason: str) -> None:
        for package in self.packages:
            package.mkdir(parents=True, exist_ok=True)
            (package / "_build_error.txt").write_text(reason)

    def compile(self) -> None:
        cmake = find_tool("cmake", "CMAKE_BIN_DIR") or "cmake"
        ninja = find_tool("ninja", "BIN_DIR")
        build_dir = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        configure = [cmake, "-S", str(ROOT / "csrc"), "-B", str(build_dir)]
        configure += [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={import_module('pybind11').get_cmake_dir()}",
        ]
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]

        # Objects are kept for the next build as long as it is configured in the same way.
        flags = [f"{name}={os.environ.get(name, '')}" for name in VARIABLES]
        configured = "\n".join([*configure, *flags])
        stamp = build_dir / "configured.txt"
        if not stamp.exists() or stamp.read_text() != configured:
            shutil.rmtree(build_dir, ignore_errors=True)
        call(configure)
        stamp.write_text(configured)
        call([cmake, "--build", str(build_dir), "--parallel"])
        call([cmake, "--install", str(build_dir), "--prefix", self.build_lib])


def call(command: list) -> None:
    """Runs a command; an error carries all of what it printed."""
    print(shlex.join(command), flush=True)
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode:
        raise RuntimeError(
            f"{shlex.join(command)}\nended with exit code {done.returncode}:\n\n{done.stdout}"
        )
    print(done.stdout, flush=True)


setup(
    ext_modules=[Extension("fusedopt._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
