"""Memory that is not there: tensors of zeros that autograd keeps without any, and storages that are
shorter than what their tensors span. Nothing is read or written beyond a storage."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

# Options and the dtype of the parameter.
STORED = {
    "plain": ({}, torch.float32),
    "double": ({}, torch.float64),
    "clipped": ({"max_grad_norm": 0.5}, torch.float32),
    "l1": ({"l1": 0.01}, torch.float32),
    "8bit": ({"state_dtype": "8bit"}, torch.float32),
    "bfloat16 state": ({"state_dtype": torch.bfloat16}, torch.float32),
    "average": ({"ema": 0.9}, torch.float32),
    "master": ({"master_weights": "fp32", "state_dtype": "8bit"}, torch.float16),
    "split": ({"master_weights": "split", "ema": 0.9}, torch.bfloat16),
    "rounding": ({"rounding": "stochastic"}, torch.bfloat16),
}
stored = pytest.mark.parametrize("stored", STORED)
SIZE = 4160  # 8-bit state has so many elements at least, and a block of scales that is not full


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch._efficientzerotensor(shape, dtype=dtype)


def cut(tensor: Tensor, num_bytes: int) -> None:
    tensor.untyped_storage().resize_(num_bytes)
