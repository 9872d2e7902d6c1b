"""What happens to pages while MkDocs builds them.

Formulas become MathML, which browsers show without a script. A comment such as
``<!-- included: figures -->`` becomes what another file says: nothing is said twice.
"""

from __future__ import annotations

import ast
import html
import json
import re
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "bench" / "recipes"
RESULTS = ROOT / "bench" / "results"


# Pages of optimizers ----------------------------------------------------------------


def _optimizers() -> dict[str, str]:
    """The page of each optimizer, by its title."""
    pages = sorted((ROOT / "docs" / "optimizers").glob("*.md"))
    return {
        page.read_text().split("\n", 1)[0].removeprefix("# "): f"optimizers/{page.name}"
        for page in pages
    }


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    pages = [{title: page} for title, page in _optimizers().items()]
    next(part for part in config.nav if "Optimizers" in part)["Optimizers"] = pages
    return config


def _links_to_optimizers() -> str:
    return ", ".join(f"[{title}]({page})" for title, page in _optimizers().items())


# Formulas ---------------------------------------------------------------------------

FORMULA = re.compile(r'(?s)<(span|div) class="arithmatex">\\[([](.*?)\\[])]</\1>')
LETTERS = re.compile(r'(?:<mi mathvariant="normal">\w</mi>){2,}')


def _mathml(formula: re.Match[str]) -> str:
    element, tex = formula[1], html.unescape(formula[2]).strip()
    mathml = convert(tex, display="block" if element == "div" else "inline")
    # The name of a function is one word, not a product of letters.
    mathml = LETTERS.sub(
        lambda name: f"<mi>{re.sub('<[^>]+>', '', name[0])}</mi>", mathml
    )
    return f'<{element} class="formula">{mathml}</{element}>'


def on_page_content(content: str, **_: Any) -> str:
    return FORMULA.sub(_mathml, content)


# Included ---------------------------------------------------------------------------


def _in_readme(pattern: str) -> str:
    found = re.search(pattern, (ROOT / "README.md").read_text())
    if found is None:
        raise PluginError(f"README.md has nothing like {pattern}")
    return found[1]


def _figures() -> str:
    figures = _in_readme(r"(?s)<!-- figures -->\n(.*?)<!-- figures -->")
    return re.sub(
        r"\[([^]]+)\]\((?!http)[^)]+\)", r"`\1`", figures
    )  # files of the repository


def _variables() -> str:
    return _in_readme(r"(?m)(^\| variable .*\n(?:^\|.*\n)+)")


def _recipes() -> str:
    """The recipes that can be run, each with the first sentence of its docstring."""
    rows = ["| recipe | what it does |", "| --- | --- |"]
    for path in sorted(RECIPES.glob("*.py")):
        module = ast.parse(path.read_text())
        if any(getattr(node, "name", "") == "main" for node in module.body):
            summary = ast.get_docstring(module).split("\n\n")[0].replace("\n", " ")
            rows.append(f"| `{path.stem}` | {summary} |")
    return "\n".join(rows)


def _plots(*, of_recipes: bool) -> str:
    images = []
    for png in sorted(RESULTS.rglob("*.png")):
        if (RECIPES / f"{png.stem}.py").exists() == of_recipes:
            title = png.stem.replace("_", " ")
            images.append(
                f"![{title}](results/{png.relative_to(RESULTS)}){{ loading=lazy }}"
            )
    return "\n\n".join(images)


def _errors() -> str:
    """What bench.numerics has written: the error of each contender after all steps."""
    path = next(RESULTS.rglob("numerics.json"))
    measured = json.loads(path.read_text())
    environment, steps = measured["environment"], str(measured["steps"])
    parts = [f"Measured on {environment['cpu']}, torch {environment['torch']}."]
    for dtype, by_optimizer in measured["results"].items():
        labels = dict.fromkeys(
            label for errors in by_optimizer.values() for label in errors
        )
        parts += ["", f"### {dtype} parameters", "", "| | " + " | ".join(by_optimizer)]
        parts += ["| --- " * (1 + len(by_optimizer)) + "|"]
        for label in labels:
            ends = [
                errors[label][steps] if label in errors else "–"
                for errors in by_optimizer.values()
            ]
            cells = [f"{e:.1e}" if isinstance(e, float) else str(e) for e in ends]
            parts += [f"| {label} | " + " | ".join(cells) + " |"]
    return "\n".join(parts).replace("None", "not finite")


def _storage_steps() -> str:
    """What bench.storage has written."""
    measured = json.loads(next(RESULTS.rglob("storage.json")).read_text())
    environment = measured["environment"]
    parts = [f"Measured on {environment['cpu']}, torch {environment['torch']}.", ""]
    parts += [
        "| | bytes held | bytes moved | ms per step | of the floor |",
        "| --- " * 5 + "|",
    ]
    for result in measured["results"]:
        numbers = (
            f"{result['bytes_held']:.2f}",
            f"{result['bytes_moved']:.2f}",
            f"{result['median_ms']['step']:.3g}",
            f"{result['fraction_of_floor']:.0%}",
        )
        parts += [f"| {result['variant']} | " + " | ".join(numbers) + " |"]
    return "\n".join(parts)


def _storage_codes() -> str:
    """What bench.codes has written: by how much second moments are too large."""
    results = json.loads(next(RESULTS.rglob("codes.json")).read_text())["results"]
    names = list(results)
    parts = [
        "| gradients beside their largest neighbours | " + " | ".join(names) + " |"
    ]
    parts += ["| --- " * (1 + len(names)) + "|"]
    for row in zip(*results.values(), strict=True):
        cells = [f"{found['moment']:+.1%}" for found in row]
        parts += [f"| {row[0]['ratio']:g} | " + " | ".join(cells) + " |"]
    return "\n".join(parts)


def _processes() -> str:
    """What bench.processes has written."""
    measured = json.loads(next(RESULTS.rglob("processes.json")).read_text())
    results = measured["results"]
    parts = ["| | processes | " + " | ".join(results[0]["steps_per_s"]) + " |"]
    parts += ["| --- " * (2 + len(results[0]["steps_per_s"])) + "|"]
    for result in results:
        cells = [f"{rate:,.0f}" for rate in result["steps_per_s"].values()]
        parts += [
            f"| {result['workload']} | {result['processes']} | "
            + " | ".join(cells)
            + " |"
        ]
    return "\n".join(parts)


def _storage_losses() -> str:
    """What bench.storage_training has written, a table for each task."""
    measured = json.loads(next(RESULTS.rglob("storage_training.json")).read_text())
    results = measured["results"]
    parts = []
    for task in dict.fromkeys(result["task"] for result in results):
        of_task = [result for result in results if result["task"] == task]
        losses = {(r["variant"], r["optimizer"]): r["losses"] for r in of_task}
        names = list(dict.fromkeys(r["optimizer"] for r in of_task))
        title = {"gpt": "GPT", "cnn": "LeNet on the digits"}[task]
        parts += ["", f"| {title} | " + " | ".join(names) + " |"]
        parts += ["| --- " * (1 + len(names)) + "|"]
        for variant in dict.fromkeys(r["variant"] for r in of_task):
            cells = [_mean_and_spread(losses.get((variant, name))) for name in names]
            parts += [f"| {variant} | " + " | ".join(cells) + " |"]
    return "\n".join(parts)


def _mean_and_spread(losses: list[float] | None) -> str:
    if losses is None:
        return "–"
    return f"{statistics.fmean(losses):.4f} ± {statistics.stdev(losses):.4f}"


INCLUDED = {
    "processes": _processes,
    "storage codes": _storage_codes,
    "storage losses": _storage_losses,
    "storage steps": _storage_steps,
    "errors": _errors,
    "figures": _figures,
    "optimizers": _links_to_optimizers,
    "plots": partial(_plots, of_recipes=False),
    "variables": _variables,
    "recipes": _recipes,
    "plots of recipes": partial(_plots, of_recipes=True),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for png in RESULTS.rglob("*.png"):
        uri = f"results/{png.relative_to(RESULTS)}"
        files.append(File.generated(config, uri, abs_src_path=str(png)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub("<!-- included: (.*) -->", lambda name: INCLUDED[name[1]](), markdown)
