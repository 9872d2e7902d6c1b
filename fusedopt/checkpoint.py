"""What a checkpoint holds, and what a loaded one must hold: everything is checked, and converted,
before anything of the optimizer changes.

``FusedOptimizer.state_dict()`` and ``load_state_dict()`` are the doors to this.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, MutableMapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checks, formats, options, state, tensor_kinds
from .problem import Problem
from .record import Members, Record, plain_groups
from .rule import STEP, Group, Scalar, storage_is_on

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


def stock_state_dict(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of fusedopt's, as ``torch.optim`` would have written it. What a program or a
    subclass keeps in groups and state stays, as it does there."""
    groups = [
        {name: value for name, value in group.items() if name not in optimizer._own_options}
        for group in state_dict["param_groups"]
    ]
    entries = dict(state_dict["state"])
    members = Members(optimizer, plain_groups(optimizer.param_groups))
    for record in members.all():
        key = state_dict["param_groups"][record.g]["params"][record.i]
        known = as_stock(record, entries.pop(key, {}))
        if known:
            entries[key] = known
    return {**state_dict, "state": entries, "param_groups": groups}


def as_stock(record: Record, entries: dict[str, Any]) -> dict[str, Any]:
    """The state of one parameter as torch's class has it."""
    if not entries and record.rule.stock_starts_with_state:
        step = state.new_scalar(record, STEP)
        made = {slot.name: state.initial(record, slot) for slot in record.slots}
        return {
            "step": step.to(record.param.device if record.group.get("fused") else "cpu"),
            **made,
        }
    codes = [key for key in record.rule.by_name if formats.is_code(entries.get(key))]
    left_out = {*formats.EXTRAS, *(f"{key}_scale" for key in codes)}
    return {
        key: formats.decode(value, entries[f"{key}_scale"]) if key in codes else value
        for key, value in entries.items()
        if key not in left_out
    }


def load(optimizer: FusedOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Everything is checked first: if this raises, the optimizer is as it was."""
    optimizer._core.check_loaded(optimizer._name, "load_state_dict()")
    optimizer.synchronize()
    groups = loaded_groups(optimizer, state_dict)
    state = loaded_state(optimizer, state_dict, groups)
    before = optimizer.__dict__.copy()
    try:
        optimizer.__setstate__({"state": state, "param_groups": groups})
    except Exception as error:
        optimizer.__dict__.update(before)
        raise ValueError(
            f"{optimizer._name}: torch.optim cannot take the loaded state over ({error!r}); is it "
            "the checkpoint of another optimizer?"
        ) from error


def loaded_groups(optimizer: FusedOptimizer, state_dict: Mapping[str, Any]) -> list[Group]:
    """The param groups of a checkpoint with the parameters of the optimizer."""
    who = optimizer._name
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
        if storage_is_on(loaded_group):
            try:
                options.check_storage(loaded_group)
            except ValueError as error:
                raise ValueError(f"{who}, param group {g}: {error}") from error
    return loaded


def loaded_state(
    optimizer: FusedOptimizer, state_dict: Mapping[str, Any], groups: list[Group]
) -> Any:
    """The state of a checkpoint by the parameters of the optimizer."""
    saved_groups = state_dict["param_groups"]
    in_backward = optimizer._in_backward
    like = groups if in_backward is None else in_backward.with_images(groups)
    members = Members(optimizer, like, state={})
    owner = {
        key: (g, i) for g, saved in enumerate(saved_groups) for i, key in enumerate(saved["params"])
    }
    loaded: defaultdict[Any, Any] = defaultdict(dict)
    unowned: dict[Any, Any] = {}
    for key, value in state_dict["state"].items():
        if key in owner:
            record = Record(members, *owner[key])
            try:
                entries = _loaded_entries(record, saved_groups[record.g], value)
                loaded[groups[record.g]["params"][record.i]] = entries
            except Problem as problem:
                raise problem.kind(
                    f"{record.describe()}: in the loaded state, {problem}; is it the checkpoint of "
                    "another model or optimizer?"
                ) from problem.__cause__
        elif isinstance(value, Mapping):
            unowned[key] = value
        else:
            raise TypeError(
                f"{optimizer._name}: the loaded state of {key!r}, which is no parameter, is a "
                f"{type(value).__name__}, not a dict"
            )
    # torch takes the first entry for that of a parameter.
    loaded.update(unowned)
    return loaded


def _loaded_entries(record: Record, saved_group: Group, saved: Any) -> dict[str, Any]:
    """The state of one parameter on its device, in the dtype that it was saved in."""
    if not isinstance(saved, dict):
        raise Problem(TypeError, f"state is a {type(saved).__name__}, not a dict")
    rule, param = record.rule, record.param
    for key in rule.required if saved else ():
        if saved.get(key) is None:
            raise Problem(ValueError, f"there is no {key!r} (only {sorted(map(str, saved))})")
    if not rule.counts_steps and "step" in saved:
        raise Problem(ValueError, f"there is a 'step' (among {sorted(map(str, saved))})")
    dtype, shape, device = param.dtype, None if record.is_lazy else param.shape, param.device
    extras, scalars = record.extras.names, rule.scalar_by_name
    is_plain = shape is not None and not record.is_sharded
    loaded = {}
    for key, value in saved.items():
        if key in scalars:
            value = _loaded_scalar(record, scalars[key], saved_group, value)
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
                _check_tensor(record, key, value, saved)
                value = value.to(device=device)
        elif key in rule.by_name or key in extras:
            if value is not None:
                raise Problem(TypeError, f"state[{key!r}] is {value!r}, not a tensor")
        else:
            value = _on_device(value, device)
        loaded[key] = value
    return loaded


def _check_tensor(record: Record, key: Any, value: Tensor, saved: dict[str, Any]) -> None:
    # Of a parameter that is not materialized yet the first step checks what there is to check.
    if key in record.rule.by_name:
        checks.check_slot(record, record.rule.by_name[key], value, saved)
    elif key in record.extras.names and not record.is_lazy:
        checks.check_extra(record, key, value)
    if key in record.rule.required and value.layout is not torch.strided:
        raise Problem(ValueError, f"state[{key!r}] is sparse; it must be dense")
    if value.is_meta and not record.param.is_meta:
        raise Problem(ValueError, f"state[{key!r}] is on the meta device, without data")


def _loaded_scalar(record: Record, scalar: Scalar, saved_group: Group, value: Any) -> Tensor:
    is_fake = tensor_kinds.is_fake(value)
    try:
        number = float(value) if not is_fake else tensor_kinds.number(value) or 0.0
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise Problem(TypeError, f"state[{scalar.name!r}] is {value!r}, not a number") from error
    if scalar is STEP:
        checks.check_count(number)
    if not isinstance(value, Tensor) or (scalar is not STEP and not value.is_floating_point()):
        new = state.new_scalar(record, scalar)
        return torch.tensor(number, dtype=new.dtype, device=new.device)
    if saved_group.get("fused") or saved_group.get("capturable"):
        return value.to(dtype=torch.float32, device=record.param.device)
    # torch makes some on the default device, where neither the CPU nor the parameter's may be.
    return value if value.device == record.param.device else value.cpu()


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
