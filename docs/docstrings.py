"""Docstrings are written for ``help()``: the site makes Markdown of them."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe
from fusedopt.rule import SHARED_DEFAULTS, Shared, with_shared


def _displayed(block: re.Match[str]) -> str:
    indent, tex = block[1], textwrap.dedent(block[2]).strip()
    if "&" in tex:  # aligned at these signs, as Sphinx takes it
        tex = rf"\begin{{split}}{tex}\end{{split}}"
    return textwrap.indent(f"\n$$\n{tex}\n$$\n\n", indent)


def _code(block: re.Match[str]) -> str:
    return f":\n\n```python\n{textwrap.dedent(block[1]).strip()}\n```\n\n"


def to_markdown(docstring: str) -> str:
    """What Markdown says differently from reStructuredText."""
    for pattern, replacement in (
        (r"(?m)^( *)\.\. math::\n((?:\1 +.*\n|\n)+)", _displayed),
        (r"(?m)::\n\n((?: {4}.*\n|\n)+)", _code),
        (r":math:`([^`]+)`", r"$\1$"),
        (r":(?:class|func|meth):`([^`]+)`", r"[`\1`][fusedopt.\1]"),
        (r"\s*\(default:[^()]*(?:\([^)]*\))?\)", ""),  # has a column of its own
        (r"(?m)^( +)(\w+), (\w+): (.*)$", r"\1\2: \4\n\1\3: \4"),  # a row for each
        (r"\barXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)"),
        (r"(?m)^((?:Source|State per parameter|Differences from)\b.*?):", r"**\1:**"),
    ):
        docstring = re.sub(pattern, replacement, docstring)
    return docstring


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(with_shared(obj.docstring.value))

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Shows the options that the classes share by name, with their defaults."""
        if "shared" not in func.parameters:
            return
        del func.parameters["shared"]
        for name, default in SHARED_DEFAULTS.items():
            func.parameters.add(
                griffe.Parameter(
                    name,
                    annotation=Shared.__annotations__[name].__forward_arg__,
                    kind=griffe.ParameterKind.keyword_only,
                    default=repr(default),
                )
            )
