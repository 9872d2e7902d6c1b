"""How a parameter and its state are to be kept, as docs/storage.md has it: nothing of fusedopt is
asked, but for the random bits of new codes."""

from __future__ import annotations

from typing import Any

import torch
from optimizers import Table
from seam import formats
from torch import Tensor

encode = formats.encode  # the same bits as of the native module: storage/test_codes.py

OPTIONS = ("state_dtype", "master_weights", "rounding", "ema")
EXTRAS = ("master", "master_remainder", "rounding_state", "ema")
HALF = (torch.bfloat16, torch.float16)
SMALLEST_OF_CODES, ELEMENTS_OF_A_SCALE = 4096, 64


def is_on(group: dict[str, Any]) -> bool:
    return any(group.get(option) is not None for option in OPTIONS)


def master(group: dict[str, Any], param: Tensor) -> str | None:
    """The key of what is kept of the master, if there is one."""
    kind = group.get("master_weights") if param.dtype in HALF else None
    return {None: None, "split": "master_remainder", "fp32": "master"}[kind]


def is_rounded_at_random(group: dict[str, Any], param: Tensor) -> bool:
    return bool(group.get("rounding")) and param.dtype in HALF


def extras(group: dict[str, Any], param: Tensor) -> list[str]:
    """The keys of what a parameter has beside the state of its rule."""
    wanted = {
        master(group, param): True,
        "rounding_state": is_rounded_at_random(group, param),
        "ema": group.get("ema") is not None,
    }
    return [key for key, is_wanted in wanted.items() if key and is_wanted]


def dtype_of(table: Table, group: dict[str, Any], param: Tensor, key: str) -> torch.dtype | None:
    """What the group declares for a state tensor; None if any will do."""
    declared = group.get("state_dtype")
    if declared is None or param.dtype not in (torch.float32, *HALF):
        return None
    if declared != "8bit":
        return declared
    slot = table.slots[key]
    if param.numel() < SMALLEST_OF_CODES or not slot.coded(group):
        return torch.float32
    return torch.uint8 if slot.unsigned else torch.int8


def is_kept(table: Table, group: dict[str, Any], param: Tensor, key: str, value: Tensor) -> bool:
    """Whether a state tensor is as the group declares, so that a step does not store it anew."""
    declared = dtype_of(table, group, param, key)
    if not is_code(value):
        return declared in (None, value.dtype)
    moves = any(
        n > 1 and stride != also
        for n, stride, also in zip(value.shape, value.stride(), param.stride(), strict=True)
    )
    reach = sum((n - 1) * stride for n, stride in zip(param.shape, param.stride(), strict=True))
    has_gaps = param.numel() not in (0, reach + 1)
    return declared in (None, value.dtype) and (not moves or has_gaps)


def is_code(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int8, torch.uint8)


def in_memory(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """A signed code is 127 times the root of its share of the scale, another 255 times the fourth
    root."""
    value = torch.empty_like(codes, dtype=torch.float32)
    flat = in_memory(codes).float()
    scale = scales.repeat_interleave(ELEMENTS_OF_A_SCALE)[: len(flat)]
    if codes.dtype == torch.int8:
        root = flat * torch.tensor(1 / 127)
        share = root * root.abs()
    else:
        share = (flat * torch.tensor(1 / 255)).square().square()
    in_memory(value).copy_(share * scale)
    return value


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """A master in float32: the bits of the parameter are its upper half, to the nearest."""
    upper = param.view(torch.int16).int() << 16
    whole = (upper + remainder.int()).view(torch.float32)
    return torch.where(whole.isnan(), upper.view(torch.float32), whole)
