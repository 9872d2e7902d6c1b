"""The parameters of a step, and each of them as the step sees it."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import defaultdict
from collections.abc import Iterator, Set
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import backend, dtensor, formats, tensor_kinds
from .rule import Group, Rule, Slot, storage_is_on

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

# The whole state, by parameter, of those for which a step creates state or stores it in another
# way. It becomes the state of the optimizer when nothing can go wrong any more, in one action.
Created = dict[Tensor, dict[str, Any]]


class Members:
    """The parameters of one step in their groups, with their state: all those of an optimizer, or
    with :func:`fusedopt.attach` some of them."""

    def __init__(
        self,
        optimizer: FusedOptimizer,
        groups: list[Group],
        state: dict[Any, Any] | None = None,
        places: list[list[tuple[int, int]]] | None = None,
        absent: Set[int] = frozenset(),
    ) -> None:
        """``state``: theirs, if it is not that of the whole. ``places``: for each group, the groups
        and indices that its parameters have in the optimizer. ``absent``: the ids of parameters
        that have no part in the step, whether they have a gradient or not."""
        self.optimizer = optimizer
        self.rule: Rule = optimizer._rule
        self.groups = groups
        self.state: dict[Any, Any] = optimizer.state if state is None else state
        self.owner: dict[Any, Any] = optimizer.state  # where new state goes
        self.places = places
        self.absent = absent
        self.created: Created = {}
        self.seeds: dict[Any, Tensor] = {}  # that were drawn before, by parameter

    @property
    def name(self) -> str:
        return self.optimizer._name

    def all(self) -> Iterator[Record]:
        for g, group in enumerate(self.groups):
            for i in range(len(group["params"])):
                yield Record(self, g, i)

    def with_grad(self) -> list[Record]:
        return [
            Record(self, g, i)
            for g, group in enumerate(self.groups)
            for i, param in enumerate(group["params"])
            if param.grad is not None and id(param) not in self.absent
        ]

    def grads(self) -> list[Any]:
        """The gradient of each parameter, None for those that have no part in the step."""
        params = [param for group in self.groups for param in group["params"]]
        grads, hidden = [*map(attrgetter("grad"), params)], self.hidden_grads()
        return [None if e in hidden else g for e, g in enumerate(grads)] if hidden else grads

    def hidden_grads(self) -> dict[int, Any]:
        """None for each parameter that has no part in the step, by its number."""
        if not self.absent:
            return {}
        params = (param for group in self.groups for param in group["params"])
        return {e: None for e, param in enumerate(params) if id(param) in self.absent}

    def is_virtual(self) -> bool:
        """Whether what this step creates or measures may have no memory."""
        if tensor_kinds.is_transforming() or tensor_kinds.is_traced():
            return True
        return any(
            tensor_kinds.is_virtual(tensor)
            for record in self.with_grad()
            for tensor in (record.param, record.grad)
        )

    def describe(self, g: int, i: int) -> str:
        """For messages: which parameter it is."""
        param, names = self.groups[g]["params"][i], self.groups[g].get("param_names")
        g, i = self.places[g][i] if self.places else (g, i)
        name = f" {names[i]!r}" if names else ""
        who = f"{self.name}, param group {g}, parameter {i}{name}"
        if is_lazy(param):
            return f"{who} (not materialized yet, {param.dtype})"
        has_strides = param.layout is torch.strided and not param.is_nested
        strides = f", strides {tuple(param.stride())}" if has_strides else ""
        return f"{who} (shape {tensor_kinds.shape(param)}, {param.dtype}{strides})"

    def describe_param(self, param: Tensor) -> str:
        for record in self.all():
            if record.param is param:
                return record.describe()
        return f"a parameter of shape {tuple(param.shape)} that is in no param group now"

    def describe_group(self, g: int) -> str:
        return f"{self.name}, param group {self.places[g][0][0] if self.places else g}"

    def new_entries(self) -> dict[str, Any]:
        """State without an entry, of the class that the optimizer makes it of."""
        factory = getattr(self.owner, "default_factory", None)
        entries: dict[str, Any] = factory() if factory else {}
        return entries

    def commits(self) -> list[functools.partial[Any]]:
        """Calls that make what was created part of the optimizer's state. A dict that is there
        stays, for others may hold it."""
        calls, added = [], {}
        for param, entries in self.created.items():
            existing = self.owner.get(param)
            if existing is None:
                added[param] = entries
            else:
                calls.append(functools.partial(existing.clear))
                calls.append(functools.partial(existing.update, entries))
        return [*calls, functools.partial(self.owner.update, added)]


class Record:
    """One parameter of a step. What is asked of it more than once is asked once."""

    def __init__(self, members: Members, g: int, i: int) -> None:
        self.members, self.g, self.i = members, g, i
        self.rule = members.rule
        self.group: Group = members.groups[g]
        self.param: Any = self.group["params"][i]
        self.grad: Any = self.param.grad
        self.state: Any = members.state.get(self.param)  # as it was before the step, or None

    @property
    def entries(self) -> dict[str, Any]:
        """Its state in this step, with what the step has created."""
        entries: dict[str, Any] = self.members.created.get(self.param, self.state)
        return {} if entries is None else entries

    @cached_property
    def is_lazy(self) -> bool:
        return is_lazy(self.param)

    @cached_property
    def slots(self) -> list[Slot]:
        """The state tensors that its group keeps."""
        return self.rule.slots_of(self.group)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        return tuple(slot.name for slot in self.slots)

    @cached_property
    def extras(self) -> formats.Extras:
        return formats.extras(self.group, self.param)

    @cached_property
    def is_sharded(self) -> bool:
        return dtensor.is_dtensor(self.param)

    @cached_property
    def held(self) -> Tensor:
        """What this process holds of the parameter."""
        held: Tensor = dtensor.local(self.param)
        return held

    @cached_property
    def is_unusual(self) -> bool:
        return tensor_kinds.is_unusual(self.param)

    @property
    def has_sparse_grad(self) -> bool:
        return self.grad is not None and self.grad.layout is not torch.strided

    def declared(self, slot: Slot) -> torch.dtype | None:
        """The dtype that the group declares for a state tensor; None if any will do."""
        return formats.state_dtype(self.group, self.param, slot)

    def describe(self) -> str:
        return self.members.describe(self.g, self.i)

    def copied_entries(self) -> dict[str, Any]:
        """A copy of its state, or a new one, of the class that its state has."""
        return self.members.new_entries() if self.state is None else copy.copy(self.state)

    def value_of(self, key: str) -> Tensor:
        """A state tensor as numbers, however it is stored."""
        value: Tensor = self.entries[key]
        return (
            formats.decode(value, self.entries[f"{key}_scale"]) if formats.is_code(value) else value
        )

    def grad_in_layout(self) -> Tensor | None:
        """A copy of the gradient with the strides of the parameter, or None if it is not an
        ordinary real tensor. Of DTensors that of what this process holds."""
        param, grad = self.held, dtensor.local(dtensor.placed_like(self.grad, self.param))
        if type(grad) is not Tensor or grad.layout is not torch.strided:
            return None
        if grad.dtype not in backend.FLOATS:
            return None
        if (grad.dtype == torch.float64) != (param.dtype == torch.float64):
            return None
        moved = torch.empty_like(param, dtype=grad.dtype, memory_format=torch.preserve_format)
        return moved.copy_(grad.detach())

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Says of an error that an unusual tensor raises which parameter it is."""
        try:
            yield
        except Exception as error:
            kind = tensor_kinds.first_unusual(self.param, self.grad, *(self.state or {}).values())
            if kind is None:
                raise
            name = type(self.members.optimizer).__name__
            raise RuntimeError(
                f"{self.describe()}: {name} cannot update what is {kind}: {error}"
            ) from error

    def is_ordinary(self) -> bool:
        """Whether the native module, which steps only what it knows, can do without checks. For
        nearly every one of the thousands of parameters of a model it can."""
        group, entries = self.group, self.state or {}
        if storage_is_on(group) or group.get("capturable"):
            return False
        if group.get("differentiable") or self.param.is_inference():
            return False
        if type(entries) is not dict:
            return False
        slots = [entries[key] for key in self.keys if entries.get(key) is not None]
        scalars = [entries.get(s.name) for s in self.rule.scalars]
        if entries and any(scalar is None for scalar in scalars):
            return False
        step, *others = scalars or [None]
        is_ordinary = backend.native.is_ordinary
        return bool(
            is_ordinary([self.param, self.grad, *slots], step)
            and all(is_ordinary([], other) for other in others)
        )

    # Steps ----------------------------------------------------------------------------------------

    @property
    def is_first_step(self) -> bool:
        """Whether state exists that did not before."""
        before, after = self.state or {}, self.members.created.get(self.param, {})
        return any(key in after and before.get(key) is None for key in self.rule.by_name)

    @property
    def counts_on_device(self) -> bool:
        """Whether only the device knows how many steps there were."""
        on = self.group.get("capturable") or self.members.optimizer.amp_fused
        return bool(on) and backend.is_accelerator(self.param.device)

    def next_scalars(self, group: Group) -> tuple[list[Tensor], list[float | Tensor]]:
        """The scalars of this step: as they will be kept, and as the rule takes them."""
        if not self.rule.counts_steps:
            return [], [1.0 if self.is_first_step else 2.0]
        step, *others = (self.entries[scalar.name] for scalar in self.rule.scalars)
        kept = [step + 1]
        advanced = self.rule.advance(group, self._number(kept[0]), *others)
        kept += [new.to(old.dtype) for new, old in zip(advanced, others, strict=True)]
        return kept, [*map(self._number, kept)]

    def _number(self, scalar: Tensor) -> float | Tensor:
        # A power of the count is needed more exactly than float32 has it.
        if self.group["differentiable"] or not (scalar.is_cpu or tensor_kinds.is_fake(scalar)):
            return backend.widened(scalar)
        value = tensor_kinds.number(scalar)
        return 1.0 if value is None else value  # a fake tensor without a value: any number will do


def is_plain_dict(mapping: Any) -> bool:
    """Whether its entries are what the C interface of dicts sees."""
    return type(mapping) in (dict, defaultdict)


def plain_groups(groups: Any) -> list[Group]:
    """Param groups as the native side reads them: without asking a subclass what it makes of it."""
    if type(groups) is list and all(
        type(group) is dict and type(group["params"]) is list for group in groups
    ):
        return groups
    return [
        {**{key: group[key] for key in group}, "params": [*group["params"]]} for group in groups
    ]
