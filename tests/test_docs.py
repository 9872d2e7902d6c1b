"""Every code block of README.md, CONTRIBUTING.md and docs/ runs or is checked, and the site builds.

The blocks of a page are one program: they share a namespace and an empty directory. A block is
left out only by ``<!-- not run: reason -->`` in front of it, and only as many as stated here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import skip_or_fail

import fusedopt

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST_NOT_RUN = 2
FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>.*)")
NOT_RUN = re.compile(r" *<!-- not run: (\S.*\S) -->")


@dataclass
class Block:
    page: Path
    line: int  # of its first line of code
    language: str
    code: str
    not_run: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    lines = page.read_text().splitlines()
    at = 0
    while at < len(lines):
        opening, begin = FENCE.fullmatch(lines[at]), at + 1
        at += 1
        if opening is None:
            continue
        while lines[at].strip() != opening["fence"]:  # an IndexError: it is never closed
            at += 1
        before = next((line for line in reversed(lines[: begin - 1]) if line.strip()), "")
        code = textwrap.dedent("\n".join(lines[begin:at]))
        language = (opening["info"].split() or [""])[0]
        yield Block(page, begin + 1, language, code, bool(NOT_RUN.fullmatch(before)))
        at += 1


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def in_language(*languages: str) -> pytest.MarkDecorator:
    blocks = [b for b in BLOCKS if b.language in languages and not b.not_run]
    return pytest.mark.parametrize("block", blocks, ids=str)


def test_languages_and_blocks_that_do_not_run():
    assert {b.language for b in BLOCKS} <= {"python", "sh", "json", "text"}
    left_out = [b for b in BLOCKS if b.not_run]
    assert len(left_out) <= MOST_NOT_RUN, left_out
    comments = sum(page.read_text().count("<!-- not run") for page in PAGES)
    assert comments == len(left_out), "a comment that belongs to no block, or gives no reason"


# Python ---------------------------------------------------------------------------------------


@dataclass
class Program:
    """A page, as far as it has run."""

    directory: Path
    namespace: dict[str, Any] = field(default_factory=dict)
    lines_run: int = 0

    def run(self, block: Block) -> None:
        # An error in a block shows the page and the line in it.
        code = "\n" * (block.line - 1) + block.code
        self.lines_run = block.line
        exec(compile(code, block.page, "exec"), self.namespace)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Program]:
    return {page: Program(tmp_path_factory.mktemp(page.stem)) for page in PAGES}


@pytest.fixture
def one_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun tells a program, for the page about it: that it is the only process."""
    if request.node.callspec.params["block"].page.name != "distributed.md":
        return
    if not torch.distributed.is_available():
        skip_or_fail("this torch has no torch.distributed")
    if not torch.distributed.is_initialized():
        port = str(torch.distributed.TCPStore("localhost", 0, is_master=True).port)
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", port)


@in_language("python")
def test_python_block(block, programs, monkeypatch, one_process):
    program = programs[block.page]
    monkeypatch.chdir(program.directory)
    same_page = (b for b in BLOCKS if b.page == block.page and b.language == "python")
    for earlier in same_page:  # those that this session has not asked for
        if program.lines_run < earlier.line <= block.line and not earlier.not_run:
            try:
                program.run(earlier)
            except ModuleNotFoundError as error:
                if error.name.split(".")[0] in ("fusedopt", "torch", "bench"):
                    raise
                skip_or_fail(f"{error.name} is not installed")


@pytest.fixture(scope="module", autouse=True)
def leave_no_trace() -> Iterator[None]:
    yield
    fusedopt.unpatch()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# Everything else ------------------------------------------------------------------------------


@in_language("json")
def test_json_block(block):
    json.loads(block.code)


@in_language("sh")
def test_commands(block):
    """What a command names is there: files, targets of make, modules and their options."""
    for line in block.code.splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):  # variables set for one command
            assert any(words[0].split("=")[0] in file.read_text() for file in READ_VARIABLES)
            words.pop(0)
        if words:
            program, *arguments = words
            if program in CHECKS:
                CHECKS[program](*arguments)
            else:
                assert os.access(ROOT / program, os.X_OK), f"{program} is no program of ours"


READ_VARIABLES = [ROOT / "setup.py", ROOT / "fusedopt" / "backend.py"]
EXTRAS = (ROOT / "pyproject.toml").read_text()


def check_make(*arguments: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"(?m)^([a-z_]+):", makefile)
    for argument in arguments:
        variable, is_set, _ = argument.partition("=")
        assert f"$({variable})" in makefile if is_set else argument in targets, argument


def check_python(m: str, module: str, *arguments: str) -> None:
    assert m == "-m"
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"there is no module {module}"
    source = Path(spec.origin)
    if spec.submodule_search_locations:
        source = source.with_name("__main__.py")
    text = source.read_text()
    for option in arguments:
        if option.startswith("-") and option != "--help":
            assert f'"{option}"' in text, f"{module} has no {option}"


def check_pip(command: str, *arguments: str) -> None:
    assert command == "install"
    for argument in arguments:
        for extras in re.findall(r"\[(.*)\]", argument):
            for extra in extras.split(","):
                assert re.search(rf"(?m)^{extra} = \[", EXTRAS), f"there is no extra {extra}"


def check_torchrun(*arguments: str) -> None:
    from torch.distributed.run import get_args_parser

    get_args_parser().parse_args(arguments)


def check_cmake(*arguments: str) -> None:
    if "-S" in arguments:
        source = arguments[arguments.index("-S") + 1]
        assert (ROOT / source / "CMakeLists.txt").exists()


CHECKS = {
    "make": check_make,
    "python": check_python,
    "pip": check_pip,
    "torchrun": check_torchrun,
    "cmake": check_cmake,
}


# The site -------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml"):
        if importlib.util.find_spec(package) is None:
            skip_or_fail(f"{package} is not installed; pip install 'fusedopt[docs]'")
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*mkdocs, "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pages = [*(tmp_path / "site").rglob("*.html")]
    assert len(pages) > 10
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|link|img)[^>]+https?://[^>]+>", text)
        assert not loaded, f"{page.name} loads from another server: {loaded}"
        assert "arithmatex" not in text and ".. math::" not in text, f"{page.name}: a bare formula"
