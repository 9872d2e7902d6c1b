"""What a program sets around its steps: modes and defaults of torch, other containers."""

from __future__ import annotations

import contextlib
import random
from collections import OrderedDict, UserDict, UserList, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from cases import snapshot
from hypothesis import strategies as st
from hypothesis.stateful import rule
from torch import Tensor, nn

from .choices import random_values, randoms
from .lockstep import Lockstep
from .training import Training

# Modes ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def flush_denormal() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


# State made inside of inference mode cannot be stepped outside of it, as in torch.
MODES = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "default float64": lambda: default_dtype(torch.float64),
    "default float16": lambda: default_dtype(torch.float16),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "with meta": lambda: torch.device("meta"),
    "with cpu": lambda: torch.device("cpu"),
    "default meta": lambda: default_device("meta"),
    "default cpu": lambda: default_device("cpu"),
}
SMALLEST, LARGEST = 1e-30, 1e15


# Containers -----------------------------------------------------------------------------------


class State(defaultdict):
    pass


class ReadableState(UserDict):
    def __missing__(self, param: Tensor) -> dict[str, Any]:
        return self.data.setdefault(param, {})


class StateOfOne(dict):
    pass


class Group(dict):
    pass


class FasterGroup(dict):
    """Says another learning rate than it holds."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return 2 * value if key == "lr" else value


class Groups(list):
    pass


class Params(list):
    pass


STATES = (State, lambda _, state: OrderedDict(state), lambda _, state: ReadableState(state))
STATES_OF_ONE = (StateOfOne, OrderedDict, lambda state: defaultdict(list, state), dict)
GROUPS = (Group, OrderedDict, dict)
PARAMS = (
    *(tuple, Params, UserList),
    # It makes parameters of what are none.
    lambda params: nn.ParameterList(params) if is_of_parameters(params) else (*params,),
    lambda params: {str(i): p for i, p in enumerate(params)}.values(),
)


def is_of_parameters(params: list[Tensor]) -> bool:
    return all(isinstance(p, nn.Parameter) for p in params)


class SettingMoves(Training):
    @rule(rng=randoms, name=st.sampled_from(sorted(MODES)))
    def step_in_a_mode(self, rng, name):
        run, mode = self.run, MODES[name]
        if name != "inference_mode":
            if rng.random() < 0.5:
                run.set_gradients(rng)
            if rng.random() < 0.3:
                run.ours.state.pop(rng.choice(run.params), None)
            if rng.random() < 0.3:
                before = snapshot(run.ours)
                with mode():
                    run.ours.load_state_dict(run.ours.state_dict())
                assert snapshot(run.ours) == before
                self.schedulers = []
        run.step(ours_in=mode)
        run.step(ours_in=mode)

    @rule(rng=randoms)
    def flush_denormal(self, rng):
        """Of numbers that are none in float32; float16 has smaller ones of its own."""
        run = self.run
        for p in run.params:
            scale = 1e-6 if p.dtype is torch.float16 and rng.random() < 0.5 else 1.0
            values, grad = (random_values(rng, p.shape, p.dtype).mul_(scale) for _ in range(2))
            p.data.copy_(values)
            run.give(p, grad)
            if run.stored or not all(map(is_ordinary, run.ours.state.get(p, {}).values())):
                run.ours.state.pop(p, None)
        max_norm, run.ours.max_grad_norm = run.ours.max_grad_norm, None
        for _ in range(2):
            run.step(both_in=flush_denormal)
        run.ours.max_grad_norm = max_norm

    @rule(rng=randoms)
    def other_containers(self, rng):
        run = self.run
        if rng.random() < 0.5:
            for p in run.params:
                if run.ours.state.get(p):
                    run.ours.state[p] = rng.choice(STATES_OF_ONE)(run.ours.state[p])
        if rng.random() < 0.5:
            groups = run.ours.param_groups
            groups[:] = [rng.choice(GROUPS)(group) for group in groups]
        kinds = [{type(run.ours.state[p]) for p in run.params if p in run.ours.state}]
        with contextlib.ExitStack() as stack:
            for move in (state_elsewhere, params_elsewhere, groups_elsewhere, another_lr):
                if rng.random() < 0.4:
                    stack.enter_context(move(rng, run))
            for _ in range(2):
                if rng.random() < 0.5:
                    run.set_gradients(rng)
                run.step()
        kinds.append({type(run.ours.state[p]) for p in run.params if p in run.ours.state})
        assert kinds[0] <= kinds[1]
        self.schedulers = []


def is_ordinary(value: Any) -> bool:
    """Whether its numbers are zero or neither very small nor very large."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return not isinstance(value, Tensor) or not value.is_complex()
    size = value.abs()
    return bool(((size == 0) | ((size > SMALLEST) & (size < LARGEST))).all())


@contextlib.contextmanager
def state_elsewhere(rng: random.Random, run: Lockstep) -> Iterator[None]:
    state = run.ours.state = rng.choice(STATES)(dict, run.ours.state)
    yield
    assert run.ours.state is state
    run.ours.state = defaultdict(dict, state)


@contextlib.contextmanager
def params_elsewhere(rng: random.Random, run: Lockstep) -> Iterator[None]:
    groups = run.ours.param_groups
    before = [group["params"] for group in groups]
    for group in groups:
        group["params"] = rng.choice(PARAMS)(group["params"])
    yield
    for group, params in zip(groups, before, strict=True):
        group["params"] = params


@contextlib.contextmanager
def groups_elsewhere(rng: random.Random, run: Lockstep) -> Iterator[None]:
    before = run.ours.param_groups
    run.ours.param_groups = rng.choice((tuple, Groups))(before)
    yield
    run.ours.param_groups = before


@contextlib.contextmanager
def another_lr(rng: random.Random, run: Lockstep) -> Iterator[None]:
    at = rng.randrange(len(run.twin.param_groups))
    groups = [*run.ours.param_groups]
    before, group = groups[at], run.twin.param_groups[at]
    groups[at] = FasterGroup(before)
    lr, group["lr"] = group["lr"], 2 * group["lr"]
    run.ours.param_groups = type(run.ours.param_groups)(groups)
    yield
    group["lr"] = lr
    run.ours.param_groups = [before if type(g) is FasterGroup else g for g in run.ours.param_groups]
