"""Random options, shapes, values and layouts, and the backend that takes them."""

from __future__ import annotations

import random
from typing import Any

import torch
from cases import NAMES, TABLES, Case
from conftest import require_kernels
from hypothesis import strategies as st
from torch import Tensor

import fusedopt

HALF = (torch.bfloat16, torch.float16)
REAL = (torch.float32, torch.float64, *HALF)
COMPLEX = (torch.complex64, torch.complex128)
SPECIAL = (0.0, -0.0, 1e-42, -1e-38, 1e-20, 6e4, -1e15, 3e38, float("inf"), -float("inf"))
SPECIAL = (*SPECIAL, float("nan"))

# Not st.randoms: it prefers small numbers, and most parameters would have no gradient.
randoms = st.builds(random.Random, st.integers(0, 2**32))


def opmath(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF else dtype


def random_case(rng: random.Random) -> Case:
    name = rng.choice(NAMES)
    chosen: dict[str, Any] = {
        "lr": rng.choice((0.1, 0.01, 1e-3, torch.tensor(0.05))),
        "weight_decay": rng.choice((0.0, 0.0, 0.1)),
        "maximize": rng.choice((False, False, True)),
    }
    if rng.random() < 0.2:
        chosen["l1"] = rng.choice((0.02, 0.3))
    for option, values in TABLES[name].drawn.items():
        chosen[option] = rng.choice(values)
    TABLES[name].settle(chosen)
    return Case(name, chosen)


def random_storage(rng: random.Random) -> dict[str, Any]:
    """Options beyond torch's; none of them half of the time."""
    if rng.random() < 0.5:
        return {}
    chosen: dict[str, Any] = {}
    if rng.random() < 0.6:
        dtypes = (torch.float32, torch.float32, *HALF, "8bit")
        chosen["state_dtype"] = rng.choice(dtypes)
    kind = rng.choice((None, "split", "fp32", "stochastic"))
    if kind == "stochastic":
        chosen["rounding"] = kind
    elif kind:
        chosen["master_weights"] = kind
    if rng.random() < 0.3:
        chosen["ema"] = rng.choice((0.0, 0.9, 0.99))
    return chosen


def random_shape(rng: random.Random) -> tuple[int, ...]:
    kind = rng.random()
    if kind < 0.7:
        return tuple(rng.randint(0, 5) for _ in range(4))
    return rng.choice(((), (1,), (7,), (33, 3), (4099,), (2, 3, 16, 47)))


def in_layout(
    layouts: dict[str, Any], rng: random.Random, values: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The values in a random layout, and the memory around them."""
    names = sorted(layouts) if values.dim() == 4 else ["contiguous"]
    if values.is_complex() and "odd_bytes" in names:
        names.remove("odd_bytes")  # torch's own copy_ crashes there
    return layouts[rng.choice(names)](values)


def random_values(rng: random.Random, shape: Any, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(31))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, dtype=wide, generator=generator).to(dtype)


def random_gradient(rng: random.Random, shape: Any, dtype: torch.dtype) -> Tensor:
    kind = rng.choice(("ordinary", "ordinary", "large", "zero", "tiny", "huge", "special"))
    values = random_values(rng, shape, dtype)
    if kind == "special":
        generator = torch.Generator().manual_seed(rng.getrandbits(31))
        table = torch.tensor([*SPECIAL, *[1.0] * 8], dtype=torch.float64).to(dtype)
        picked = table[torch.randint(len(table), tuple(shape), generator=generator)]
        return torch.where(picked == 1, values, picked)
    scale = {"ordinary": 1, "large": 1e4, "zero": 0, "tiny": 1e-23, "huge": 3e38}[kind]
    return (values.to(torch.complex128 if dtype.is_complex else torch.float64) * scale).to(dtype)


BACKENDS = {
    "python": lambda: None,
    "native": lambda: NATIVE,
    "kernels": require_kernels,
}
NATIVE = fusedopt.backend.native


def choose_backend(rng: random.Random) -> None:
    fusedopt.backend.native = BACKENDS[rng.choice(("native", "native", "kernels", "python"))]()
