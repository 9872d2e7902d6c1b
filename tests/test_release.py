"""What a release is made from: the list of its files, its version, the workflows that build it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import fusedopt
from fusedopt.info import report

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))
FORMS = sorted(set(GITHUB.glob("ISSUE_TEMPLATE/*.yml")) - {GITHUB / "ISSUE_TEMPLATE/config.yml"})
# Of no use without the repository.
LEFT_OUT = re.compile(r"\.ci/|\.github/|\.gitignore")
MOST_BYTES = 2_800_000
in_repository = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="this is not the repository"
)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


# The environment ------------------------------------------------------------------------------


def test_pip_is_held_to_the_torch_that_it_knows(tmp_path):
    """The wheels of PyPI are of a version without the +cu130 that torch itself has."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text('__version__ = "2.14.1+cu130"\n')
    (tmp_path / "torch-2.14.1.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: torch\nVersion: 2.14.1\n"
    (tmp_path / "torch-2.14.1.dist-info/METADATA").write_text(metadata)
    make = ["make", "--no-print-directory", "torch-version", f"PY={sys.executable}"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(make, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert done.stdout.decode().split() == ["2.14.1"]
    assert "torch.__version__)" not in (ROOT / "Makefile").read_text()


# The source distribution ----------------------------------------------------------------------


@in_repository
def test_source_distribution_has_what_git_has(tmp_path):
    egg_info = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(egg_info, cwd=ROOT, check=True, capture_output=True)
    listed = (tmp_path / "fusedopt.egg-info/SOURCES.txt").read_text().splitlines()
    packed = {name for name in listed if ".egg-info/" not in name}
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    output = subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    kept = {name for name in output.split("\0") if name and (ROOT / name).exists()}
    assert packed == {name for name in kept if not LEFT_OUT.match(name)}
    assert sum((ROOT / name).stat().st_size for name in packed) < MOST_BYTES


# The version ----------------------------------------------------------------------------------


def test_changelog_and_info_name_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    version, date = re.search(r"(?m)^## \[(.+?)\] - (.+)$", changelog).groups()
    assert version == fusedopt.__version__
    assert report().startswith(f"fusedopt {version}, ")
    if os.environ.get("GITHUB_REF_TYPE") == "tag":
        assert os.environ["GITHUB_REF_NAME"] == f"v{version}"
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", date), "a release has a date"
    else:
        assert re.fullmatch(r"unreleased|\d{4}-\d\d-\d\d", date)


def test_version_is_in_one_place():
    line = re.compile(rf"(?i)version[_\W]{{1,6}}{re.escape(fusedopt.__version__)}\b")
    files = [*ROOT.glob("*.toml"), ROOT / "setup.py", *ROOT.glob("*.md"), *ROOT.rglob("docs/*.md")]
    files += [*(ROOT / "fusedopt").glob("*.py"), *(ROOT / "csrc").rglob("CMakeLists.txt")]
    found = [path.name for path in files if line.search(path.read_text("utf-8"))]
    assert found == ["__init__.py"]


# Workflows ------------------------------------------------------------------------------------


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request: pytest.FixtureRequest) -> dict[str, Any]:
    return load(request.param)


def commands(workflow: dict[str, Any]) -> Iterator[str]:
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            yield from step.get("run", "").splitlines()


@in_repository
def test_there_are_workflows():
    assert {path.stem for path in WORKFLOWS} == {"ci", "docs", "release"}


def test_workflow_runs_what_there_is(workflow):
    targets = set(re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text()))
    for command in commands(workflow):
        program, *arguments = command.partition(" #")[0].split()
        if program == "make":
            assert arguments[0] in targets, command
        else:
            assert program == "python" or os.access(ROOT / program, os.X_OK), command
        for path in re.findall(r"\btests/\S+", command):
            assert (ROOT / path).exists(), command


def test_workflow_takes_few_rights_and_ends(workflow):
    assert workflow["permissions"] == {"contents": "read"}
    assert "concurrency" in workflow
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 90, name
        if "id-token" in job.get("permissions", {}):
            assert job["environment"], name
            # Whoever may publish runs no code of the repository.
            assert not any("run" in step or "checkout" in step["uses"] for step in job["steps"])
        for action in (step["uses"] for step in job["steps"] if "uses" in step):
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d[\d.]*|release/v1|[0-9a-f]{40})", action)


@in_repository
def test_variables_of_workflows_are_read_somewhere():
    sources = [ROOT / "setup.py", ROOT / "tests/conftest.py", ROOT / "fusedopt/backend.py"]
    read = set(re.findall(r"FUSEDOPT_\w+", "".join(path.read_text() for path in sources)))
    settings = [*WORKFLOWS, ROOT / "pyproject.toml"]
    used = set(re.findall(r"\bFUSEDOPT_\w+", "".join(path.read_text() for path in settings)))
    assert used and used <= read


# Reports of users -----------------------------------------------------------------------------


@in_repository
@pytest.mark.parametrize("name", ["bug", "slow"])
def test_reports_come_with_the_output_of_info(name):
    fields = [f for f in load(GITHUB / f"ISSUE_TEMPLATE/{name}.yml")["body"] if "id" in f]
    required = [f["attributes"]["label"] for f in fields if f["validations"]["required"]]
    assert any("python -m fusedopt.info" in label for label in required)


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_forms_are_complete(form):
    content = load(form)
    assert content["name"] and content["description"]
    fields = [f for f in content["body"] if f["type"] != "markdown"]
    assert len({f["id"] for f in fields}) == len(fields)
    assert all(f["attributes"]["label"] for f in fields)


# The native module ----------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_openmp_runtime_for_torch_and_fusedopt(native):
    """Wheels leave libgomp out because torch brings it under the same name."""
    program = """
import torch, fusedopt
param = torch.nn.Parameter(torch.randn(1 << 18))
param.grad = torch.randn_like(param)
fusedopt.Adam([param]).step()
print({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/")[-1]})
"""
    run = [sys.executable, "-W", "ignore", "-c", program]
    output = subprocess.run(run, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    runtimes = [path for path in eval(output) if re.search(r"lib(gomp|omp|iomp5)\b", path)]
    assert len(runtimes) == 1, runtimes
