"""What a checkpoint holds, and what a loaded one must hold: everything is checked, and converted,
before anything of the optimizer changes.

``FusedOptimizer.state_dict()`` and ``load_state_dict()`` are the doors to this.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from . import dtensor, storage

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

Group = dict[str, Any]


def own_options(cls: type[FusedOptimizer]) -> list[str]:
    """The options of param groups that the class of torch's that this one extends has not."""
    stock = next(base for base in cls.__mro__ if base.__module__.startswith("torch.optim"))
    known = inspect.signature(stock).parameters
    return [name for name in inspect.signature(cls).parameters if name not in known]


def stock_state_dict(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of fusedopt's, as ``torch.optim`` would have written it."""
    own = own_options(type(optimizer))
    groups = [
        {name: value for name, value in group.items() if name not in own}
        for group in state_dict["param_groups"]
    ]
    state = dict(state_dict["state"])
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for param, key in zip(group["params"], saved["params"], strict=True):
            state[key] = optimizer._as_stock(group, param, state.get(key, {}))
    return {
        **state_dict,
        "state": {k: v for k, v in state.items() if v},
        "param_groups": groups,
    }


def loaded_groups(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> list[Group]:
    who = f"fusedopt.{type(optimizer).__name__}"
    for key, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict.get(key), kind):
            raise TypeError(
                f"{who}: state_dict[{key!r}] must be a {kind.__name__}, got "
                f"{type(state_dict.get(key)).__name__}; is this an optimizer's state_dict?"
            )
    saved = state_dict["param_groups"]
    if len(saved) != len(optimizer.param_groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups "
            f"({len(saved)}, this {who} has {len(optimizer.param_groups)})"
        )
    for g, (group, saved_group) in enumerate(zip(optimizer.param_groups, saved, strict=True)):
        if not isinstance(saved_group, dict) or "params" not in saved_group:
            raise TypeError(f"{who}: param group {g} of the loaded state dict has no 'params'")
        if len(saved_group["params"]) != len(group["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of "
                f"optimizer's group (group {g}: {len(saved_group['params'])} saved, "
                f"{len(group['params'])} here)"
            )
    loaded = []
    own = own_options(type(optimizer))
    for g, (group, saved_group) in enumerate(
        zip(optimizer.param_groups, deepcopy(saved), strict=True)
    ):
        saved_group["params"] = group["params"]
        if "param_names" in group:
            saved_group.setdefault("param_names", group["param_names"])
        known = {name: group[name] for name in own if name in group}
        for name, value in {**optimizer.defaults, **known}.items():
            saved_group.setdefault(name, value)
        optimizer._check_storage(g, saved_group)
        loaded.append(saved_group)
    return loaded


def loaded_state(optimizer: FusedOptimizer, state_dict: dict[str, Any], groups: list[Group]) -> Any:
    owner = {}
    for g, saved_group in enumerate(state_dict["param_groups"]):
        for i, key in enumerate(saved_group["params"]):
            owner[key] = (g, i)
    saved = state_dict["param_groups"]
    state: defaultdict[Any, Any] = defaultdict(dict)
    unowned: dict[Any, Any] = {}
    for key, value in state_dict["state"].items():
        if key in owner:
            g, i = owner[key]
            state[groups[g]["params"][i]] = _loaded_entry(
                optimizer, g, i, saved[g], groups[g], value
            )
        elif isinstance(value, dict):
            unowned[key] = value
        else:
            raise TypeError(
                f"fusedopt.{type(optimizer).__name__}: the loaded state of {key!r}, which is no "
                f"parameter, is a {type(value).__name__}, not a dict"
            )
    # torch takes the first entry for that of a parameter.
    state.update(unowned)
    return state


def _loaded_entry(
    optimizer: FusedOptimizer, g: int, i: int, saved_group: Group, group: Group, saved: Any
) -> dict[str, Any]:
    """The state of one parameter on its device, in the dtype that it was saved in."""
    param = optimizer.param_groups[g]["params"][i]
    where = f"{optimizer._describe(g, i)}: the loaded state"

    def fail(error: type[Exception], problem: str) -> NoReturn:
        raise error(f"{where}: {problem}")

    if not isinstance(saved, dict):
        raise TypeError(f"{where} is a {type(saved).__name__}, not a dict")
    required = (
        ("step", *optimizer._required_slots) if optimizer._has_step else optimizer._required_slots
    )
    missing = [key for key in required if saved and saved.get(key) is None]
    foreign = saved and not optimizer._has_step and "step" in saved
    if missing or foreign:
        problem = f"has no {missing[0]!r}" if missing else "has a 'step'"
        raise ValueError(
            f"{where} {problem} (it has {sorted(map(str, saved))}); "
            "is it the checkpoint of another optimizer?"
        )
    state = {}
    extras = [key for key in storage.extras(group, param) if key]
    for key, value in saved.items():
        if key == "step" and optimizer._has_step:
            value = _loaded_step(where, param, saved_group, value)
        elif isinstance(value, Tensor):
            if key in optimizer._all_slots and value.shape != param.shape:
                raise ValueError(
                    f"{where} has {key!r} of shape {tuple(value.shape)}; is it the "
                    "checkpoint of another model?"
                )
            if key in optimizer._all_slots and not dtensor.placed_alike(value, param):
                raise ValueError(
                    f"{where} has {key!r} as {dtensor.placed(value)}, the parameter is "
                    f"{dtensor.placed(param)}; load it with "
                    "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
                )
            if key in optimizer._all_slots and storage.is_code(value):
                optimizer._check_code(param, key, saved, fail)
            elif key in optimizer._all_slots and (
                value.is_complex() != param.is_complex()
                or not (value.is_floating_point() or value.is_complex())
            ):
                raise ValueError(f"{where} has {key!r} of dtype {value.dtype}")
            if key in extras:
                storage.check_extra(key, value, param, fail, any_device=True)
            if key in optimizer._required_slots and value.layout is not torch.strided:
                raise ValueError(f"{where} has a sparse {key!r}; it must be dense")
            if value.is_meta and not param.is_meta:
                raise ValueError(f"{where} has {key!r} on the meta device, without data")
            value = value.to(device=param.device)
        elif key in (*optimizer._all_slots, *extras) and value is not None:
            raise TypeError(f"{where} has {key!r} = {value!r}, not a tensor")
        state[key] = value
    return state


def _loaded_step(where: str, param: Tensor, saved_group: Group, step: Any) -> Any:
    try:
        count = float(step)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(f"{where} has 'step' = {step!r}, not a number") from error
    if not 0 <= count < storage.LAST_STEP:
        raise ValueError(f"{where} has 'step' = {count}, not a count")
    if isinstance(step, Tensor) and (saved_group.get("fused") or saved_group.get("capturable")):
        return step.to(dtype=torch.float32, device=param.device)
    return step
