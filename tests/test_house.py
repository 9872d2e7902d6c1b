"""How the house is built: small files, no circles, and no file that needs one of a higher floor."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = sorted((ROOT / "fusedopt").glob("*.py"))
NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp"))
# From the ground to the top.
FLOORS = ("update_rules", "storage", "multi_tensor", "ops", "rules", "device", "plan", "python")
KERNEL_BODIES = {"apply_kernel.h", "stored_kernel.h"}


@pytest.mark.parametrize("path", [*PYTHON, *NATIVE], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_one_subject(path):
    assert len(path.read_text().splitlines()) <= (400 if path.name in KERNEL_BODIES else 300)


def imports(path: Path) -> set[str]:
    """The modules of the package that this one needs when it is imported."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return found


def test_no_module_imports_itself_by_a_detour():
    graph = {path.stem: imports(path) for path in PYTHON if path.stem != "__init__"}
    assert graph["optimizer"] >= {"rule", "stepper"}
    assert [*graphlib.TopologicalSorter(graph).static_order()]


def includes(path: Path) -> set[str]:
    return set(re.findall(r'^#include "(.*)"', path.read_text(), re.M))


def test_no_header_includes_itself_by_a_detour():
    graph = {str(path.relative_to(ROOT / "csrc")): includes(path) for path in NATIVE}
    assert [*graphlib.TopologicalSorter(graph).static_order()]


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_floor_needs_a_higher_one(path):
    floors = {floor: height for height, floor in enumerate(FLOORS)}
    own = floors.get(path.parent.name, len(FLOORS))
    for name in includes(path):
        assert floors.get(Path(name).parent.name, -1) <= own, name


def test_what_depends_on_cuda_is_in_few_places():
    with_cuda = {
        str(path.relative_to(ROOT / "csrc"))
        for path in NATIVE
        if re.search(r"^#\s*(if|elif|ifdef|ifndef).*(CUDA|HIP|ON_HOST)", path.read_text(), re.M)
    }
    kernels = {"stored_kernel.h", "apply_kernel.h", "device_scalars.h"}
    on_host = {"device_kernel.cpp", "prepare_gpu.h"}  # what the kernels are for the tests
    assert with_cuda <= {
        *(f"multi_tensor/{name}" for name in kernels | on_host),
        *("device/gpu.h", "python/device.cpp", "storage/instructions.h"),
        *("update_rules/host_device.h", "update_rules/number.h"),
    }
