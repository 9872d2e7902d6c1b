"""What a checkpoint holds, and what a loaded one must hold: everything is checked, and converted,
before anything of the optimizer changes.

``FusedOptimizer.state_dict()`` and ``load_state_dict()`` are the doors to this.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, MutableMapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import dtensor, storage, tensor_kinds

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

Group = dict[str, Any]


def stock_state_dict(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of fusedopt's, as ``torch.optim`` would have written it. What a program or a
    subclass keeps in groups and state stays, as it does there."""
    groups = [
        {name: value for name, value in group.items() if name not in optimizer._own_options}
        for group in state_dict["param_groups"]
    ]
    state = dict(state_dict["state"])
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for param, key in zip(group["params"], saved["params"], strict=True):
            known = optimizer._as_stock(group, param, state.pop(key, {}))
            if known:
                state[key] = known
    return {**state_dict, "state": state, "param_groups": groups}


def loaded_groups(optimizer: FusedOptimizer, state_dict: Mapping[str, Any]) -> list[Group]:
    """The param groups of a checkpoint with the parameters of the optimizer."""
    who = f"fusedopt.{type(optimizer).__name__}"
    for key, kind, name in (("state", Mapping, "dict"), ("param_groups", Sequence, "list")):
        value = state_dict.get(key) if isinstance(state_dict, Mapping) else None
        if not isinstance(value, kind) or isinstance(value, str):
            raise TypeError(
                f"{who}: state_dict[{key!r}] must be a {name}, got "
                f"{type(value).__name__}; is this an optimizer's state_dict?"
            )
    saved = state_dict["param_groups"]
    if len(saved) != len(optimizer.param_groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups "
            f"({len(saved)}, this {who} has {len(optimizer.param_groups)})"
        )
    for g, (group, saved_group) in enumerate(zip(optimizer.param_groups, saved, strict=True)):
        if not isinstance(saved_group, MutableMapping) or "params" not in saved_group:
            raise TypeError(f"{who}: param group {g} of the loaded state dict has no 'params'")
        if len(saved_group["params"]) != len(group["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of "
                f"optimizer's group (group {g}: {len(saved_group['params'])} saved, "
                f"{len(group['params'])} here)"
            )
    loaded = deepcopy([{**g, "params": ()} if type(g) is dict else g for g in saved])
    torch_has = optimizer._torch_options
    # What a checkpoint of torch's cannot know: options of fusedopt and those that a subclass adds.
    unknown = {name for name in optimizer.defaults if name not in torch_has}
    unknown.update(optimizer._own_options)
    for g, (group, loaded_group) in enumerate(zip(optimizer.param_groups, loaded, strict=True)):
        loaded_group["params"] = group["params"]
        if "param_names" in group:
            loaded_group.setdefault("param_names", group["param_names"])
        for name in unknown:
            if name in group:
                loaded_group.setdefault(name, group[name])
        for name, value in optimizer.defaults.items():
            loaded_group.setdefault(name, value)
        if storage.is_on(loaded_group):
            optimizer._check_storage(g, loaded_group)
    return loaded


def loaded_state(
    optimizer: FusedOptimizer, state_dict: Mapping[str, Any], groups: list[Group]
) -> Any:
    """The state of a checkpoint by the parameters of the optimizer."""
    saved_groups = state_dict["param_groups"]
    owner = {
        key: (g, i) for g, saved in enumerate(saved_groups) for i, key in enumerate(saved["params"])
    }
    state: defaultdict[Any, Any] = defaultdict(dict)
    unowned: dict[Any, Any] = {}
    for key, value in state_dict["state"].items():
        if key in owner:
            g, i = owner[key]
            param = groups[g]["params"][i]
            try:
                state[param] = _loaded_entry(optimizer, param, saved_groups[g], groups[g], value)
            except _Problem as problem:
                where = f"{optimizer._describe(g, i)}: the loaded state"
                raise problem.kind(f"{where}{problem}") from problem.__cause__
        elif isinstance(value, Mapping):
            unowned[key] = value
        else:
            raise TypeError(
                f"fusedopt.{type(optimizer).__name__}: the loaded state of {key!r}, which is no "
                f"parameter, is a {type(value).__name__}, not a dict"
            )
    # torch takes the first entry for that of a parameter.
    state.update(unowned)
    return state


class _Problem(Exception):
    """What is wrong with the state of a parameter; the caller knows which, and describes it."""

    def __init__(self, kind: type[Exception], problem: str) -> None:
        super().__init__(problem)
        self.kind = kind


def _loaded_entry(
    optimizer: FusedOptimizer, param: Tensor, saved_group: Group, group: Group, saved: Any
) -> dict[str, Any]:
    """The state of one parameter on its device, in the dtype that it was saved in."""
    if not isinstance(saved, dict):
        raise _Problem(TypeError, f" is a {type(saved).__name__}, not a dict")
    counts = optimizer._has_step
    for key in ("step", *optimizer._required_slots) if saved and counts else ():
        if saved.get(key) is None:
            raise _foreign(f"has no {key!r}", saved)
    if not counts and "step" in saved:
        raise _foreign("has a 'step'", saved)
    dtype, shape, device = param.dtype, None if is_lazy(param) else param.shape, param.device
    extras = storage.extras(group, param) if storage.is_on(group) else ()
    is_plain = shape is not None and not dtensor.is_dtensor(param)
    state = {}
    for key, value in saved.items():
        if key == "step" and counts:
            value = _loaded_step(optimizer, param, saved_group, group, value)
        elif isinstance(value, Tensor):
            # What needs no check and no conversion is most of a checkpoint.
            if not (
                is_plain
                and type(value) is Tensor
                and value.dtype is dtype
                and value.shape == shape
                and value.device == device
                and value.layout is torch.strided
                and key not in extras
            ):
                value = _loaded_tensor(optimizer, param, key, value, saved, key in extras)
        elif key in optimizer._all_slots or (key in extras and key is not None):
            if value is not None:
                raise _Problem(TypeError, f" has {key!r} = {value!r}, not a tensor")
        else:
            value = _on_device(value, device)
        state[key] = value
    return state


def _foreign(problem: str, saved: dict[str, Any]) -> _Problem:
    return _Problem(
        ValueError,
        f" {problem} (it has {sorted(map(str, saved))}); is it the checkpoint of another "
        "optimizer?",
    )


def _loaded_tensor(
    optimizer: FusedOptimizer,
    param: Tensor,
    key: Any,
    value: Tensor,
    saved: dict[str, Any],
    is_extra: bool,
) -> Tensor:
    def fail(error: type[Exception], problem: str) -> NoReturn:
        raise _Problem(error, f": {problem}")

    is_slot = key in optimizer._all_slots
    # Of a parameter that is not materialized yet the first step checks what there is to check.
    if is_slot and not is_lazy(param):
        shape = tensor_kinds.shape(value)
        if shape != tensor_kinds.shape(param):
            raise _Problem(
                ValueError,
                f" has {key!r} of shape {shape}; is it the checkpoint of another model?",
            )
        if not dtensor.placed_alike(value, param):
            raise _Problem(
                ValueError,
                f" has {key!r} as {dtensor.placed(value)}, the parameter is "
                f"{dtensor.placed(param)}; load it with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict",
            )
        if storage.is_code(value):
            optimizer._check_code(param, key, saved, fail)
    if is_slot and not storage.is_code(value):
        is_complex = value.is_complex()
        if is_complex != param.dtype.is_complex or not (is_complex or value.is_floating_point()):
            raise _Problem(ValueError, f" has {key!r} of dtype {value.dtype}")
    if is_extra and not is_lazy(param):
        storage.check_extra(key, value, param, fail, any_device=True)
    if key in optimizer._required_slots and value.layout is not torch.strided:
        raise _Problem(ValueError, f" has a sparse {key!r}; it must be dense")
    if value.is_meta and not param.is_meta:
        raise _Problem(ValueError, f" has {key!r} on the meta device, without data")
    return value.to(device=param.device)


def _loaded_step(
    optimizer: FusedOptimizer, param: Tensor, saved_group: Group, group: Group, step: Any
) -> Tensor:
    try:
        count = float(step) if not tensor_kinds.is_fake(step) else tensor_kinds.number(step) or 0.0
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise _Problem(TypeError, f" has 'step' = {step!r}, not a number") from error
    if not 0 <= count < storage.LAST_STEP:
        raise _Problem(ValueError, f" has 'step' = {count}, not a count")
    if not isinstance(step, Tensor):
        new = optimizer._new_step(group, param)
        return torch.tensor(count, dtype=new.dtype, device=new.device)
    if saved_group.get("fused") or saved_group.get("capturable"):
        return step.to(dtype=torch.float32, device=param.device)
    # torch makes some on the default device, where neither the CPU nor the parameter's may be.
    return step if step.device == param.device else step.cpu()


def _on_device(value: Any, device: torch.device) -> Any:
    """A copy of the containers that a program keeps in the state, with their tensors on the device
    of the parameter."""
    if isinstance(value, Tensor):
        return value.to(device=device)
    if isinstance(value, dict):
        return {key: _on_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        copied = (_on_device(item, device) for item in value)
        is_named = isinstance(value, tuple) and hasattr(value, "_fields")
        return type(value)(*copied) if is_named else type(value)(copied)
    return value
