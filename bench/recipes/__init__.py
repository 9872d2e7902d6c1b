"""Training recipes to start from: `python -m bench.recipes.NAME`, listed in README.md."""

from __future__ import annotations

import importlib
from types import ModuleType


def needed(name: str) -> ModuleType:
    """The module of an optional package; where that is missing, the program ends by saying so."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).partition(".")[0]
        raise SystemExit(
            f"This recipe needs {missing}, which is not installed. This installs all "
            'that the recipes need:\n  pip install "fusedopt[recipes]"'
        ) from None


# bench.report, which every recipe prints and draws with, imports these two.
needed("matplotlib")
needed("rich")
