"""The package and code that uses it pass mypy, and the stub describes the native module."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import require_kernels, require_native, skip_or_fail

import fusedopt

PACKAGE = Path(fusedopt.__file__).parent
EXAMPLES = Path(__file__).with_name("typing_examples.py")


def test_mypy_strict(pytestconfig):
    """A comment that excuses an error where there is none is an error too."""
    if find_spec("mypy") is None:
        skip_or_fail("no mypy: pip install mypy")
    settings = PACKAGE.with_name("pyproject.toml")
    cache = pytestconfig.cache.mkdir("mypy")
    # In a process of its own: mypy's garbage would be collected together with all of torch.
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", settings, "--cache-dir", cache]
        + [PACKAGE, EXAMPLES],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def in_stub():
    """The number of arguments of each function, and a type for each constant."""
    found = {}

    def read(body, prefix=""):
        for node in body:
            if isinstance(node, ast.ClassDef):
                read(node.body, f"{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                found[prefix + node.name] = number_of_arguments(node)
            elif isinstance(node, ast.AnnAssign):
                found[node.target.id] = node.annotation.id

    read(ast.parse((PACKAGE / "_native.pyi").read_text()).body)
    return found


def in_module(module):
    """The same; pybind11 leaves signatures in docstrings."""
    found = {}

    def read(owner, prefix=""):
        for name, value in vars(owner).items():
            if name.startswith("_") and name != "__init__":
                continue
            if type(value).__name__ == "wrapper_descriptor":
                continue  # the __init__ of a class that only the module makes
            if inspect.isclass(value):
                read(value, f"{name}.")
            elif isinstance(value, property):
                found[prefix + name] = 1  # the object that has it
            elif callable(value):
                (node,) = ast.parse(f"def {value.__doc__.strip()}: ...").body
                found[prefix + name] = number_of_arguments(node)
            else:
                found[name] = type(value).__name__

    read(module)
    return found


def number_of_arguments(node):
    return len(node.args.posonlyargs + node.args.args)


@pytest.mark.parametrize("kind", ["native", "kernels"])
def test_the_stub_has_what_the_module_has(kind):
    if kind == "kernels":
        assert in_module(require_kernels()) == in_stub() | {"RUN_ON_HOST": "int"}
    else:
        require_native()
        assert in_module(fusedopt.backend.native) == in_stub()
