"""Random damage of dicts, lists, tensors and numbers."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import torch
from torch import Tensor

VALUES: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 3, 2**24, 2**63, 10**400, 0.5, -0.5, 1e308),
    *(math.nan, math.inf, -math.inf, 1j, "x", "8bit", "1.0", b"x", (), [], {}, (0.9,), [0.9, 0.99]),
    *([[1]], {"a": 1}, {0: {}}, torch.float32, torch.int8, torch.device("cpu"), print),
)


def hostile_tensor(rng: random.Random, like: Tensor | None) -> Any:
    like = torch.ones(2, 3) if like is None or like.layout is not torch.strided else like.detach()
    shape = rng.choice([like.shape, like.shape, (), (1,), (0,), (3,), (2, 3), (3, 2), (1, 2, 3)])
    dtypes = (*[torch.float32] * 3, torch.float64, torch.bfloat16, torch.float16, torch.int64)
    dtypes += (torch.int8, torch.uint8, torch.int16, torch.bool, torch.complex64, like.dtype)
    value = torch.full(shape, rng.choice((0, 1, 1, 3, 100)), dtype=rng.choice(dtypes))
    if value.is_floating_point() or value.is_complex():
        value = value * rng.choice((1, 1, -1, math.nan, math.inf, 1e30))
    kind = rng.random()
    if kind < 0.1:
        return value.to("meta")
    if kind < 0.2:
        return value.to_sparse() if value.dim() else value
    if kind < 0.3:
        return value.new_ones(()).expand(like.shape)
    if kind < 0.35:
        return torch.nn.Parameter(value) if value.is_floating_point() else value
    if kind < 0.4 and value.dim():
        return torch.stack([value, value], -1)[..., 0]
    if kind < 0.45 and value.dtype != torch.bool:
        return value.numpy() if value.dtype != torch.bfloat16 else value.tolist()
    return value


def replacement(rng: random.Random, old: Any) -> Any:
    if rng.random() < (0.7 if isinstance(old, Tensor) else 0.3):
        return hostile_tensor(rng, old if isinstance(old, Tensor) else None)
    return copy.deepcopy(rng.choice(VALUES))


def places(node: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """Every entry of every dict and list, as (container, key)."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    found = [(node, key) for key in keys]
    for key in keys:
        if isinstance(node[key], (dict, list)) and depth < 4:
            found += places(node[key], depth + 1)
    return found


def damage(rng: random.Random, node: Any) -> None:
    """One random change, at any depth."""
    if not (found := places(node)):
        return
    container, key = rng.choice(found)
    kind = rng.random()
    if kind < 0.2:
        del container[key]
    elif kind < 0.3 and isinstance(container, dict):
        names = ("step", "exp_avg", "sum", "momentum_buffer", "exp_avg_sq_scale", "master", "ema")
        names += ("master_remainder", "rounding_state", "note", 7, None)
        container[rng.choice(names)] = replacement(rng, None)
    elif kind < 0.4 and isinstance(container, list):
        container.append(copy.copy(container[key]))
    else:
        container[key] = replacement(rng, container[key])
