"""What ``csrc/python/`` exports. Internal: it may change with every version."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

KERNEL_DEVICE: str
NUM_TICKETS: int
layout_problem: str  # set by backend.py; empty if there is none

class Outcome:
    """What a step came to: it is done, or nothing was written. Then the plan is stale, or ``odd``
    has the entries that need the Python side."""

    @property
    def is_done(self) -> bool: ...
    @property
    def is_stale(self) -> bool: ...
    @property
    def odd(self) -> list[int]: ...

class Plan:
    def __init__(self, rule: str, owner: str, /) -> None: ...
    def add_tickets(self, tickets: Tensor, /) -> None: ...
    def add_group(
        self, python: bool, capturable: bool, amp_fused: bool, storage: dict[str, Any], /
    ) -> None: ...
    def add(
        self,
        param: Tensor,
        state: dict[str, Any] | None,
        keys: tuple[str, ...],
        extras: tuple[str | None, ...],
        first_step: bool,
        /,
    ) -> None: ...
    def finish(self, state: dict[Any, Any], /) -> None: ...
    def step(
        self,
        groups: object,
        state: object,
        num_threads: int,
        grads: dict[int, Tensor | None] | None,
        scaling: dict[torch.device, tuple[Tensor | None, Tensor | None, Tensor | None]] | None,
        created: dict[Tensor, dict[str, Any]] | None,
        owner: dict[Any, Any] | None,
        /,
    ) -> Outcome: ...
    @property
    def has_stepped(self) -> bool: ...
    def locate(self, entry: int, /) -> tuple[int, int, bool]: ...

def bind(
    table: object,
    tensor_type: type[Tensor],
    parameter_type: type[Tensor],
    increment_version: Callable[[Any], object],
    parts_of: Callable[[Any], list[Tensor]],
    reading_problem: Callable[[Any], str | None],
    defaultdict_type: type[dict[Any, Any]],
    /,
) -> None: ...
def learn_layout(samples: list[tuple[Tensor, int, int, int, int, bool]], /) -> None: ...
def read_layout(tensor: Tensor, /) -> tuple[tuple[int, int] | None, bool | None]: ...
def forget_layout(what: Literal["memory", "negative", "words"], /) -> None: ...
def trust_words() -> None: ...

class RememberedTensor:
    def __init__(self, tensor: Tensor, /) -> None: ...
    def is_equal(self, tensor: Tensor, /) -> bool: ...

def rules() -> dict[str, dict[str, list[str]]]: ...
def is_ordinary(tensors: list[Any], step: Any, /) -> bool: ...
def set_dtensor_type(dtensor_type: type[Tensor], /) -> None: ...
def describe() -> str: ...
def describe_cuda() -> str: ...
def grad_norm(
    grads: list[Tensor],
    clip: Tensor,
    loss_scale: Tensor | None,
    max_norm: float,
    skip_nonfinite: bool,
    num_threads: int,
    /,
) -> list[int] | int | None: ...
def memory_floor(reads: list[Tensor], writes: list[Tensor], num_threads: int) -> None: ...

# Only with CUDA.
def cuda_problem(device: int, /) -> str: ...
def num_launches() -> int: ...
