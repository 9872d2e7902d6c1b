"""AdamW of other packages with fewer bytes: what comes closest to a way of storing of ours."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch


def torchao_8bit(params: Any, **arguments: Any) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, bf16_stochastic_round=True, **arguments)


def bitsandbytes_8bit(params: Any, **arguments: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, **arguments)


def optimi_kahan(params: Any, **arguments: Any) -> torch.optim.Optimizer:
    from optimi import AdamW

    return AdamW(params, **{"lr": 1e-3, **arguments}, kahan_sum=True)


def deepspeed_cpu(params: Any, **arguments: Any) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(params, adamw_mode=True, fp32_optimizer_states=True, **arguments)


PEERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torchao": torchao_8bit,
    "bitsandbytes": bitsandbytes_8bit,
    "optimi": optimi_kahan,
    "deepspeed": deepspeed_cpu,
}


def installed() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """What builds them, by package."""
    return {package: build for package, build in PEERS.items() if find_spec(package)}
