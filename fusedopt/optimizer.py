"""What the five optimizers share: ``step()``, its checks, state creation, ``load_state_dict``.

A subclass says which state it keeps (``_slots``), what its update is (``_python_rule``) and under
which name the native module knows the same update (``_rule``). The rest is here, once.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import os
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.graph import increment_version
from torch.nn.parameter import is_lazy

from . import averages, backend, checkpoint, dtensor, memory, stock_step, storage, tensor_kinds
from .core import AmpScalingSupport, Core, of_core
from .grad_norm import FACTOR, NORM, SKIP, GradNorm

if TYPE_CHECKING:
    from .attached import Attached

Group = dict[str, Any]
# By device: found_inf, loss scale and clip tensor (see grad_norm), or None where there is none.
Scaling = dict[torch.device, tuple[Tensor | None, Tensor | None, Tensor | None]]
# The whole state, by parameter, of those for which this step creates state or stores it in another
# way. It becomes the state of the optimizer when nothing can go wrong any more, in one action.
Created = dict[Tensor, dict[str, Any]]


class Turn:
    """Whose turn it is to change an optimizer: threads wait for each other. Not part of a copy."""

    __slots__ = ("__weakref__", "is_stepping", "lock")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.is_stepping = False  # seen by code that the step itself runs, such as a signal handler
        _turns.add(self)

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()


_turns: weakref.WeakSet[Turn] = weakref.WeakSet()


def _after_fork() -> None:
    """The thread that had a turn is not in this process. What it was stepping stays unfinished."""
    for turn in _turns:
        turn.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the five optimizers; not meant to be used by itself."""

    _rule: ClassVar[str]
    _has_step: ClassVar[bool] = True
    _takes_sparse: ClassVar[bool] = False
    _required_slots: ClassVar[tuple[str, ...]] = ()
    _all_slots: ClassVar[tuple[str, ...]]
    _unsigned_slots: ClassVar[tuple[str, ...]] = ()  # second moments
    # Options of param groups: those of fusedopt, and those that the class of torch's has. A class
    # that a user derives may have any constructor, and options of its own that are in neither.
    _own_options: ClassVar[tuple[str, ...]] = ("l1", *storage.OPTIONS)
    _torch_options: ClassVar[frozenset[str]] = frozenset()

    # What wrappers and shallow copies share. (Set on the object: a default on the class would hide
    # it from wrappers that inherit from it.)
    _core: Core
    # Clip the norm of all gradients of a step to this much; may be changed at any time.
    max_grad_norm: float | None = of_core("max_grad_norm")
    grad_scale: Tensor | None = of_core("grad_scale")
    found_inf: Tensor | None = of_core("found_inf")
    _clips: dict[torch.device, Tensor] | None = of_core("_clips")
    _attached: Attached | None = of_core("_attached")
    _step_supports_amp_scaling = AmpScalingSupport()

    # The tensor lists of the last step, as the native module remembers them. Never pickled.
    _plan: Any = None
    _plan_amp_fused: bool = False  # it knows where steps are counted
    # Memory on the devices, kept for good: a captured graph goes on using it.
    _norm: GradNorm | None = None
    _tickets: dict[torch.device, Tensor] | None = None
    # param_groups as the running step reads them; None between steps.
    _step_groups: list[Group] | None = None

    _turn: Turn

    # Of an optimizer of one parameter in the backward: the state of the whole, for new state.
    _state_of_whole: dict[Any, Any] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls._torch_options:  # else it is derived from a class that knows them
            stock = next(base for base in cls.__mro__ if base.__module__.startswith("torch.optim"))
            cls._torch_options = frozenset(inspect.signature(stock).parameters)
            cls._own_options = tuple(
                name for name in cls._own_options if name not in cls._torch_options
            )

    # What a subclass defines ------------------------------------------------------------------

    @staticmethod
    def _slots(group: Group) -> tuple[str, ...]:
        """Names of the state tensors of one parameter, in the order of the native rule."""
        raise NotImplementedError

    # A static method (group, step, param, grad, *state) that names the state it takes. It returns
    # the new values of the parameter and of its state, computed out of place.
    _python_rule: ClassVar[Callable[..., tuple[Tensor, ...]]]

    def _sparse_update(
        self, group: Group, param: Tensor, grad: Tensor, state: dict[str, Any]
    ) -> None:
        """Updates ``param`` from a sparse gradient; only called if ``_takes_sparse``. Also creates
        the state of a rule without a step count."""
        raise NotImplementedError

    # A static method (group, step) that gives the numbers which the rule takes in the dtype of the
    # parameter, by what they are, and raises where torch's for-loop cannot compute one.
    _numbers: ClassVar[Callable[..., dict[str, float]]]

    def _state_dtype(self, group: Group, param: Tensor, key: str) -> torch.dtype | None:
        """The dtype that the group declares for a state tensor; None if any will do."""
        return storage.state_dtype(group, param, key in self._unsigned_slots)

    def _initial_state(self, group: Group, param: Tensor) -> Tensor:
        return torch.zeros_like(param, memory_format=torch.preserve_format)

    # Construction -----------------------------------------------------------------------------

    def _finish_init(
        self,
        *,
        l1: float,
        max_grad_norm: float | None,
        amp_fused: bool,
        state_dtype: torch.dtype | str | None,
        master_weights: str | None,
        rounding: str | None,
        ema: float | None,
        **switches: bool,
    ) -> None:
        """Adds the options that torch does not have, where they are on.

        An option that is off is in no group, so that checkpoints stay those of torch.
        """
        if not l1 >= 0.0:
            raise ValueError(f"Invalid l1 value: {l1}")
        _check_max_grad_norm(max_grad_norm)
        self._set_defaults()
        self.max_grad_norm = max_grad_norm
        stored: dict[str, Any] = {
            "state_dtype": state_dtype,
            "master_weights": master_weights,
            "rounding": rounding,
            "ema": ema,
        }
        storage.check_options(differentiable=self.defaults["differentiable"], **stored)
        switched_on = {name: value for name, value in {"l1": l1, **switches}.items() if value}
        for name, value in (switched_on | stored).items():
            if value is not None:
                self.defaults[name] = value
                for group in self.param_groups:
                    group.setdefault(name, value)
        self.amp_fused = amp_fused

    @property
    def amp_fused(self) -> bool:
        """Whether ``step()`` unscales and skips for ``torch.amp.GradScaler``. May be changed."""
        return self._core.amp_fused

    @amp_fused.setter
    def amp_fused(self, value: bool) -> None:
        self._core.amp_fused = value

    def __getstate__(self) -> dict[str, Any]:
        own = {"max_grad_norm": self.max_grad_norm, "_amp_fused": self.amp_fused or None}
        return super().__getstate__() | {k: v for k, v in own.items() if v is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        own = {name: state.pop(name) for name in ("max_grad_norm", "_amp_fused") if name in state}
        super().__setstate__(state)
        self._plan = None
        self._set_defaults()
        for name, value in own.items():
            setattr(self._core, name.removeprefix("_"), value)

    def __copy__(self) -> FusedOptimizer:
        """Of the same parameters, state and groups; so it has the same options and takes turns."""
        copied = object.__new__(type(self))
        copied._turn, copied._core = self._turn, self._core
        copied.__setstate__(self.__getstate__())
        return copied

    def _set_defaults(self) -> None:
        """What an object has that no constructor of this class made."""
        if "_core" not in self.__dict__:
            self._core = Core()
        if "_turn" not in self.__dict__:
            self._turn = Turn()

    def add_param_group(self, param_group: Group) -> None:
        if not hasattr(self, "_turn"):  # in the constructor of torch's class
            return super().add_param_group(param_group)
        with self._exclusively("add_param_group()"):
            super().add_param_group(param_group)
            if self._attached is not None:
                try:
                    self._attached.hook()
                except ValueError:  # a parameter is attached to another optimizer
                    self.param_groups.pop()
                    raise
        return None

    @contextlib.contextmanager
    def _exclusively(self, call: str) -> Iterator[None]:
        """While no other thread changes the optimizer."""
        with self._turn.lock:
            if self._turn.is_stepping:
                raise self._turn_error(call)
            yield

    def _turn_error(self, call: str) -> RuntimeError:
        return RuntimeError(
            f"fusedopt.{type(self).__name__}: {call} was called from within step(), by a signal "
            "handler or a tensor subclass, or in a child that was forked while another thread was "
            "in step(); call it, or fork, before or after the step"
        )

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients of the last step, unscaled and before it was clipped: a 0-dim
        float64 tensor on the device of the first gradient. None without ``max_grad_norm``.

        Reading it starts no synchronization; ``.item()`` does.
        """
        clips = self._clips
        return next(iter(clips.values()))[NORM].clone() if clips else None

    # step() -----------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Every tensor is checked before anything is written: if this raises, no parameter, state
        or step count has changed. An interrupt comes before the step or after it. Threads that step
        one optimizer wait for each other.

        Args:
            closure (Callable, optional): reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step()
        return loss

    @_disable_dynamo  # a compiled training step breaks its graph here
    def _take_step(self) -> None:
        turn = self._turn
        with turn.lock:
            if turn.is_stepping:
                raise self._turn_error("step()")
            turn.is_stepping = True
            try:
                self._check_not_swapped()
                scaling = self._grad_scaling()
                self._step_groups = self.param_groups
                todo = self._native_step(self._plan, scaling)
                if todo is False:
                    self._step_groups = _plain_groups(self.param_groups)
                    if self._step_groups is not self.param_groups:
                        todo = self._native_step(self._plan, scaling)
                if todo is not None:
                    with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
                        self._checked_step(todo, scaling)
            finally:
                turn.is_stepping = False
                self._step_groups = None

    @property
    def _groups(self) -> list[Group]:
        """``param_groups`` as plain dicts, whatever a user has put there."""
        return self._step_groups or _plain_groups(self.param_groups)

    @torch.no_grad()
    def _grad_scaling(self) -> Scaling | None:
        """What this step multiplies the gradients with, and whether it is skipped: from the
        GradScaler, which sets ``grad_scale`` and ``found_inf`` for the step, and from clipping."""
        core = self._core
        core._clips = None
        if self._plan_amp_fused != core.amp_fused:
            self._plan, self._plan_amp_fused = None, core.amp_fused
        max_norm = self.max_grad_norm
        if max_norm is None and not core.amp_fused:
            return None
        _check_max_grad_norm(max_norm)
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [grad for p in params if (grad := p.grad) is not None]
        devices = dict.fromkeys(grad.device for grad in grads)

        def on_devices(name: str) -> dict[torch.device, Tensor]:
            value = getattr(self, name, None) if self.amp_fused else None
            if value is None:
                return {}
            if (problem := memory.reading_problem(value)) is not None:
                raise RuntimeError(f"fusedopt.{type(self).__name__}: {name} {problem}")
            if dtensor.is_dtensor(value):
                value = value.full_tensor()
            scalars = {d: torch.as_tensor(value, dtype=torch.float32, device=d) for d in devices}
            return {d: memory.materialized(scalar).reshape(()) for d, scalar in scalars.items()}

        found_inf, scale = on_devices("found_inf"), on_devices("grad_scale")
        clips: dict[torch.device, Tensor] = {}
        if max_norm is not None:
            self._norm = self._norm or GradNorm()
            try:
                clips = self._norm.measure(grads, max_norm, scale, core.amp_fused, params)
            except RuntimeError:
                for g, i in self._with_grad():
                    self._check(g, i)  # says which
                raise
            core._clips = clips
        return {d: (found_inf.get(d), scale.get(d), clips.get(d)) for d in devices}

    def _native_step(
        self,
        plan: Any,
        scaling: Scaling | None,
        grads: dict[int, Tensor | None] | None = None,
        created: Created | None = None,
    ) -> Any:
        """One native call for all groups.

        Returns None when the step is done, and then what was created is part of the state.
        Otherwise nothing was written, and it returns the entries of the plan that the native side
        cannot take as they are, or False if the plan is out of date. ``grads`` replaces the
        gradients of some entries; None leaves them out.
        """
        if plan is None:
            return False
        state, owner = self.state, self._owner_of_state()
        is_plain = all(map(_is_plain_dict, (state, owner, *(created or {}).values())))
        outcome = plan.step(
            self._groups,
            state if is_plain else dict(state),
            torch.get_num_threads(),
            grads,
            scaling,
            created or None,
            owner if is_plain else None,
        )
        if not outcome.is_done:
            return False if outcome.is_stale else outcome.odd
        if created and not is_plain:
            _call_all(self._commits(created))
        return None

    def _commits(self, created: Created) -> list[functools.partial[Any]]:
        """Calls that make new state part of the optimizer's. A dict that is there stays, for others
        may hold it."""
        owner, calls, added = self._owner_of_state(), [], {}
        for param, entries in created.items():
            existing = owner.get(param)
            if existing is None:
                added[param] = entries
            else:
                calls.append(functools.partial(existing.clear))
                calls.append(functools.partial(existing.update, entries))
        return [*calls, functools.partial(owner.update, added)]

    def _owner_of_state(self) -> dict[Any, Any]:
        """Where new state goes."""
        return self.state if self._state_of_whole is None else self._state_of_whole

    def _checked_step(self, todo: Any, scaling: Scaling | None) -> None:
        """The steps that one native call cannot do: tensors that are new, moved or unusual."""
        capturing = backend.is_capturing()
        for g, group in enumerate(self._groups if capturing else ()):
            if not group.get("capturable"):
                raise RuntimeError(
                    f"fusedopt.{type(self).__name__}: step() is being captured into a CUDA graph, "
                    f"but param group {g} has capturable=False; construct the optimizer with "
                    "capturable=True"
                )
        plan, self._plan = self._plan, None  # kept only if the step succeeds
        created: Created = {}
        if todo is not False:
            self._check_left(plan, todo)
            if any(self._missing_state(g, i) for g, i, _ in map(plan.locate, todo)):
                todo = False
        if todo is False:
            for g in range(len(self._groups)):
                self._check_options(g)
            can_plan = backend.native is not None and not self._is_virtual()
            for g, i in self._with_grad():
                if not (can_plan and self._is_ordinary(g, i)):
                    self._check(g, i)
            if capturing and any(self._missing_state(g, i) for g, i in self._with_grad()):
                raise backend.capture_error(f"fusedopt.{type(self).__name__} creates state")
            for g, i in self._with_grad():
                self._complete_state(g, i, created)
            if created and not self._has_step and scaling and any(map(_skips, scaling.values())):
                # Without a step count, it is the state that says that there was a first step.
                return
            plan = None
            if can_plan:
                plan = self._make_plan(created)
                todo = self._native_step(plan, scaling, created=created)
                if todo is False:  # it is not as the plan has it, and would not be the next time
                    plan = None
                self._check_left(plan, todo)
        if todo is not None:
            self._mixed_step(plan, todo, created, scaling)
        self._plan = plan

    def _check_left(self, plan: Any, todo: Any) -> None:
        """Checks what the native side has left: these entries of a plan, or everything."""
        if todo is False:
            left = [*self._with_grad()]
        else:
            left = [plan.locate(entry)[:2] for entry in todo or ()]
        for g, i in left:
            self._check(g, i)

    def _mixed_step(self, plan: Any, todo: Any, created: Created, scaling: Scaling | None) -> None:
        """Takes the Python rule where the native side cannot go, copies gradients that have another
        layout than their parameter, and does all the rest in one native call."""
        grads: dict[int, Tensor | None] = {}
        written: list[Tensor] = []
        kept: list[Tensor] = []
        # Python delivers an interrupt after a call. There is none between the last write and the
        # place where it counts as done, nor between an error and the restoration.
        done: list[bool] = []
        commits = [*self._commits(created), functools.partial(done.append, True)]
        try:
            while todo is not None:
                python = self._left_to_python(plan, todo, grads)
                targets, copies = self._kept(python)
                written, kept = written + targets, kept + copies
                for g, i in python:
                    self._python_step(g, i, created, scaling)
                if plan is None:
                    _call_all(commits)
                    break
                todo = self._native_step(plan, scaling, grads, created)
                if todo is False:
                    raise RuntimeError(
                        f"fusedopt.{type(self).__name__}: parameters, gradients or state changed "
                        "while step() was reading them; let other threads change them before or "
                        "after it"
                    )
        except BaseException:
            if written and not (done or (plan is not None and plan.has_stepped)):
                with torch.no_grad():
                    tensor_kinds.write(written, kept)
            raise

    def _left_to_python(
        self, plan: Any, todo: Any, grads: dict[int, Tensor | None]
    ) -> list[tuple[int, int]]:
        """Which of the entries of a plan take the Python rule, in the order of the groups; without
        a plan all of them. Adds to ``grads`` what the kernels see instead of their gradients: None,
        or for the other entries a copy. A copy that they do not take either is given up."""
        if plan is None:
            return [*self._with_grad()]
        python = []
        for entry in todo:
            g, i, native = plan.locate(entry)
            param = self._groups[g]["params"][i]
            can_copy = native and entry not in grads
            grads[entry] = _in_layout_of(param, param.grad) if can_copy else None
            if grads[entry] is None:
                python.append((g, i))
        return sorted(python)

    @torch.no_grad()
    def _kept(self, entries: list[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor]]:
        """What the Python rule is about to write, and copies of it. On the CPU only: other devices
        seldom have the memory for that, and there an error may leave some parameters stepped."""
        written, kept = {}, []
        for g, i in entries:
            param = self._groups[g]["params"][i]
            if param.device.type != "cpu":
                continue
            for value in (param, *self.state.get(param, {}).values()):
                if not isinstance(value, Tensor) or id(value := dtensor.local(value)) in written:
                    continue
                copy = tensor_kinds.copy(value)
                if copy is not None:
                    written[id(value)] = value if tensor_kinds.is_unusual(value) else value.detach()
                    kept.append(copy)
        return [*written.values()], kept

    def _is_virtual(self) -> bool:
        """Whether what this step creates or measures may have no memory."""
        if tensor_kinds.is_transforming() or tensor_kinds.is_traced():
            return True
        params = (self._groups[g]["params"][i] for g, i in self._with_grad())
        return any(tensor_kinds.is_virtual(t) for p in params for t in (p, p.grad))

    def _with_grad(self) -> Iterator[tuple[int, int]]:
        for g, group in enumerate(self._groups):
            for i, param in enumerate(group["params"]):
                if param.grad is not None:
                    yield g, i

    def _complete_state(self, g: int, i: int, created: Created) -> None:
        """Creates the state that the parameter lacks: all of it at its first step, or what an
        option needs that was switched on later (amsgrad, momentum, centered)."""
        group = self._groups[g]
        param = group["params"][i]
        missing = self._missing_state(g, i)
        if not missing or param in created:  # listed twice
            return
        if (mode := tensor_kinds.inactive_mode(param)) is not None:
            with mode:
                return self._complete_state(g, i, created)
        state = created[param] = self._entries_of(param)
        if self._makes_its_state(group, param, state):
            return
        with self._explained(g, i):
            self._make_missing(group, param, state, missing)

    def _make_missing(
        self, group: Group, param: Tensor, state: dict[str, Any], missing: list[str]
    ) -> None:
        for key in missing:
            if key in storage.EXTRAS:
                state[key] = storage.new_extra(key, param)
            elif key != "step":
                has_value = state.get(key) is not None
                value = _value_of(state, key) if has_value else self._initial_state(group, param)
                self._store_state(state, group, param, key, value)
            elif key not in state:
                state[key] = self._new_step(group, param)
            elif tensor_kinds.is_fake(param) and not tensor_kinds.is_fake(state[key]):
                count = tensor_kinds.number(state[key])
                state[key] = torch.tensor(count, dtype=state[key].dtype, device=state[key].device)
            elif self._counts_on_device(group, param):
                state[key] = state[key].to(dtype=torch.float32, device=param.device)
            else:
                state[key] = state[key].double()

    def _entries_of(self, param: Tensor) -> dict[str, Any]:
        """A copy of the state of a parameter, or a new one, of the class that its state has."""
        existing = self.state.get(param)
        if existing is not None:
            return copy.copy(existing)
        factory = getattr(self._owner_of_state(), "default_factory", None)
        entries: dict[str, Any] = factory() if factory else {}
        return entries

    def _makes_its_state(self, group: Group, param: Tensor, state: dict[str, Any]) -> bool:
        """Whether it is the update of this parameter that makes the state it lacks."""
        if self._has_step or param.grad is None:
            return False
        return _is_sparse(param.grad) or (
            stock_step.concerns(param, param.grad, state) and stock_step.can_take(group, state)
        )

    def _store_state(
        self, state: dict[str, Any], group: Group, param: Tensor, key: str, value: Tensor
    ) -> None:
        """Puts numbers into the state, in the layout of the parameter, as the group declares."""
        state.pop(f"{key}_scale", None)
        dtype = self._state_dtype(group, param, key)
        dense = value
        if not tensor_kinds.is_unusual(param):
            dense = torch.empty_like(
                param, dtype=value.dtype, memory_format=torch.preserve_format
            ).copy_(value)
        if dtype is None or dtype.is_floating_point:
            state[key] = dense if dtype is None else dense.to(dtype)
        else:
            slot = self._slots(group).index(key)
            state[key], state[f"{key}_scale"] = storage.encode(dense, dtype, 0, slot)

    def _missing_state(self, g: int, i: int) -> list[str]:
        """What the next step of the parameter needs and does not find in its state. A step count
        that its dtype cannot continue is missing, too."""
        group = self._groups[g]
        param = group["params"][i]
        state = self.state.get(param, {})
        if is_lazy(param):  # of what shape it will be is not known yet
            return ["step", *self._slots(group)]
        if not self._has_step and param.grad is not None and _is_sparse(param.grad):
            return [key for key in self._slots(group) if state.get(key) is None]
        missing = [key for key in self._slots(group) if not self._is_stored(group, param, key)]
        if self._has_step:
            step = state.get("step")
            if step is None or not self._can_count(group, param, step):
                missing.insert(0, "step")
        return missing + [k for k in storage.extras(group, param) if k and state.get(k) is None]

    def _is_stored(self, group: Group, param: Tensor, key: str) -> bool:
        """Whether the state has a tensor that is stored as the group declares."""
        value = self.state.get(param, {}).get(key)
        if value is None:
            return False
        dtype = self._state_dtype(group, param, key)
        if storage.is_code(value):
            # A scale is of neighbours in memory.
            value, param = dtensor.local(value), dtensor.local(param)
            return dtype in (None, value.dtype) and (
                storage.same_layout(value, param) or not storage.is_dense(param)
            )
        return dtype is None or value.dtype == dtype

    def _counts_on_device(self, group: Group, param: Tensor) -> bool:
        """Whether only the device knows how many steps there were."""
        on = group.get("capturable") or self.amp_fused
        return bool(on) and backend.is_accelerator(param.device)

    def _can_count(self, group: Group, param: Tensor, step: Tensor) -> bool:
        if self._counts_on_device(group, param):
            return step.device == param.device
        if tensor_kinds.is_fake(param) and not tensor_kinds.is_fake(step):
            return False
        if step.device.type != "cpu" or step.dtype == torch.float64:
            return True
        count = tensor_kinds.number(step)
        return count is None or count < _last_count(step.dtype)

    def _new_step(self, group: Group, param: Tensor) -> Tensor:
        fused = group.get("fused")
        double = torch.get_default_dtype() == torch.float64 and not fused
        # torch.zeros would make one that does not know its value in FakeTensorMode.
        return torch.tensor(
            0.0,
            dtype=torch.float64 if double else torch.float32,
            device=param.device if fused or self._counts_on_device(group, param) else "cpu",
        )

    def _make_plan(self, created: Created) -> Any:
        if (cls := dtensor.dtensor_type()) is not None:
            backend.native.set_dtensor_type(cls)
        plan = backend.native.Plan(self._rule, f"fusedopt.{type(self).__name__}")
        states = {**self.state, **created}
        self._tickets = self._tickets or {}
        for device in {p.device for group in self._groups for p in group["params"]}:
            if backend.has_kernels(device):
                if device not in self._tickets:
                    count = backend.native.NUM_TICKETS
                    self._tickets[device] = backend.lasting_zeros(count, torch.float32, device)
                plan.add_tickets(self._tickets[device])
        for g, group in enumerate(self._groups):
            keys = self._slots(group)
            python = bool(group.get("differentiable"))
            plan.add_group(
                python,
                bool(group.get("capturable")),
                self.amp_fused,
                {name: group.get(name) for name in storage.OPTIONS},
            )
            for i, param in enumerate(group["params"]):
                state = states.get(param)
                if param.grad is None and self._missing_state(g, i):
                    state = None  # unknown until its next step completes it
                extras = storage.extras(group, param)
                if state and not python:
                    master, _, ema = extras
                    shaped = filter(None, (*keys, master, ema))
                    _match_layout(param, [state.get(key) for key in shaped])
                scales = (f"{key}_scale" for key in (*keys, *[""] * 3)[:3])
                is_new = self._is_new(param, created)
                plan.add(param, state or None, keys, (*extras, *scales), is_new)
        plan.finish(states)
        return plan

    # The Python rule --------------------------------------------------------------------------

    def _python_step(self, g: int, i: int, created: Created, scaling: Scaling | None) -> None:
        group = self._groups[g]
        param = group["params"][i]
        factor = None
        if scaling is not None:
            if _skips(scaling[param.device]):
                return
            factor = _grad_factor(scaling[param.device])
        if stock_step.concerns(param, param.grad, self._state_of(param, created)):
            self._unusual_step(g, i, created, factor)
        else:
            self._rule_step(group, param, created, factor)

    def _unusual_step(self, g: int, i: int, created: Created, factor: Tensor | None) -> None:
        """Of what is no ordinary tensor: torch's own for-loop, if it knows all options."""
        group = self._groups[g]
        param = group["params"][i]
        if (mode := tensor_kinds.inactive_mode(param)) is not None:
            with mode:
                return self._unusual_step(g, i, created, factor)
        state = self._state_of(param, created)
        with self._explained(g, i), stock_step.scaled_grad(param, factor):
            if stock_step.can_take(group, state):
                stock_step.take(self, group, param, state)
            else:
                self._rule_step(stock_step.with_numbers(group, param), param, created, None)
        return None

    @contextlib.contextmanager
    def _explained(self, g: int, i: int) -> Iterator[None]:
        """Says of an error that an unusual tensor raises which parameter it is."""
        try:
            yield
        except Exception as error:
            param = self._groups[g]["params"][i]
            tensors = (param, param.grad, *self.state.get(param, {}).values())
            kind = tensor_kinds.first_unusual(*tensors)
            if kind is None:
                raise
            raise RuntimeError(
                f"{self._describe(g, i)}: {type(self).__name__} cannot update what is {kind}: "
                f"{error}"
            ) from error

    def _rule_step(
        self, group: Group, param: Tensor, created: Created, factor: Tensor | None
    ) -> None:
        grad: Tensor = param.grad  # type: ignore[assignment]
        if memory.is_zero(grad):
            grad = grad.clone()  # torch takes its product with an infinity for zero
        state = self._state_of(param, created)
        if _is_sparse(grad):
            grad = grad.to(torch.promote_types(grad.dtype, param.dtype))
            self._sparse_update(group, param, grad if factor is None else grad * factor, state)
            return
        if storage.is_on(group) or any(storage.is_code(state[key]) for key in self._slots(group)):
            self._python_step_on_stored(group, param, grad, factor, created)
            return
        step = self._next_step(group, param, created)
        old = [param, *(state[key] for key in self._slots(group))]
        if dtensor.is_dtensor(param) and not group["differentiable"]:
            increment_version(old)  # what is written below is what they hold
            grad, *old = map(dtensor.local, (dtensor.placed_like(grad, param), *old))
        written = old
        if grad.is_complex():
            grad = torch.view_as_real(grad.resolve_conj())
            old = [torch.view_as_real(t.resolve_conj()) for t in old]
            written = [t if t.is_conj() else view for t, view in zip(written, old, strict=True)]
        opmath = torch.float32 if old[0].dtype.itemsize == 2 else old[0].dtype
        # What autograd saves must not be what copy_ overwrites below.
        param_, *slots = (t.to(opmath, copy=bool(group["differentiable"])) for t in old)
        grad = grad.to(opmath)
        grad = grad if factor is None else (grad * factor).to(opmath)
        values = self._python_rule(_with_scalars(group), step, param_, grad, *slots)
        new = [
            torch.view_as_complex(value.contiguous()) if tensor.is_conj() else value
            for tensor, value in zip(written, values, strict=True)
        ]
        if group["differentiable"]:
            if self._has_step:
                state["step"] += 1
            for tensor, value in zip(written, new, strict=True):
                tensor.copy_(value)
            return
        if self._has_step:
            written, new = [state["step"], *written], [state["step"] + 1, *new]
        # At once: an error or interrupt finds all of it or nothing.
        tensor_kinds.write(written, new)

    def _python_step_on_stored(
        self, group: Group, param: Tensor, grad: Tensor, factor: Tensor | None, created: Created
    ) -> None:
        state = self._state_of(param, created)
        step = self._next_step(group, param, created)
        keys, (master, rounding, ema) = self._slots(group), storage.extras(group, param)
        opmath = torch.float32 if param.dtype.itemsize == 2 else param.dtype
        grad = dtensor.local(dtensor.placed_like(grad, param)).to(opmath)
        grad = grad if factor is None else (grad * factor).to(opmath)
        held = dtensor.local(param)
        if master == "master_remainder":
            value = storage.join(held, dtensor.local(state[master]))
        elif master is not None:
            value = dtensor.local(state[master])
            # A parameter that is not its master rounded was written by somebody else: it counts.
            value = torch.where(value.to(held.dtype) == held, value, held.float())
        else:
            value = held.to(opmath)
        slots = [dtensor.local(_value_of(state, key)).to(opmath) for key in keys]
        is_complex = param.is_complex()
        if is_complex:
            grad = torch.view_as_real(grad.resolve_conj())
            value, *slots = (torch.view_as_real(t.resolve_conj()) for t in (value, *slots))
        value, *slots = self._python_rule(_with_scalars(group), step, value, grad, *slots)
        if is_complex:
            value, *slots = (torch.view_as_complex(t.contiguous()) for t in (value, *slots))
        written: list[tuple[Tensor, Tensor]] = []
        if self._has_step:
            written.append((state["step"], state["step"] + 1))
        for slot, (key, new) in enumerate(zip(keys, slots, strict=True)):
            target = dtensor.local(state[key])
            if storage.is_code(target):
                new = torch.empty_like(target, dtype=new.dtype).copy_(new)  # for its strides
                codes, scales = storage.encode(new, target.dtype, float(step), slot)
                target_scales = dtensor.local(state[f"{key}_scale"]).view(-1)[: scales.numel()]
                written += [(target, codes), (target_scales, scales)]
            else:
                written.append((target, new))
        if master == "master_remainder":
            high, low = storage.split(value)
            written += [(held, high), (dtensor.local(state[master]), low)]
        elif rounding is not None:
            rounded = storage.round_stochastically(value, state[rounding])
            count = dtensor.local(state[rounding])
            next_count = count.clone()
            next_count.view(-1)[1] += 1
            written += [(held, rounded), (count, next_count)]
        else:
            written.append((held, value))
            if master is not None:
                written.append((dtensor.local(state[master]), value))
        if ema is not None:
            average = dtensor.local(state[ema])
            written.append((average, average + (1 - group["ema"]) * (value - average)))
        old, new_values = map(list, zip(*written, strict=True))
        tensor_kinds.write(old, new_values)  # at once: see _rule_step
        if held is not param:
            increment_version([param, *(state[key] for key in keys)])

    def _is_new(self, param: Tensor, created: Created) -> bool:
        """Whether this is the first step of the parameter: its state did not exist before."""
        before, after = self.state.get(param, {}), created.get(param, {})
        return any(key in after and before.get(key) is None for key in self._all_slots)

    def _state_of(self, param: Tensor, created: Created) -> dict[str, Any]:
        state: dict[str, Any] = (created if param in created else self.state).get(param, {})
        return state

    def _next_step(self, group: Group, param: Tensor, created: Created) -> float | Tensor:
        """The number of this step. Rules that do not count get 1 at the first one, then 2."""
        if not self._has_step:
            return 1.0 if self._is_new(param, created) else 2.0
        step: Tensor = self._state_of(param, created)["step"] + 1
        if step.device.type == "mps":
            return step  # it has no float64
        # A power of the count is needed more exactly than float32 has it.
        if group["differentiable"] or not (step.is_cpu or tensor_kinds.is_fake(step)):
            return step.double()
        count = tensor_kinds.number(step)
        return 1.0 if count is None else count  # a fake tensor without a value: any number will do

    # Checks -----------------------------------------------------------------------------------

    def _check_not_swapped(self, call: str = "step()") -> None:
        if self._core.swaps:
            raise RuntimeError(
                f"fusedopt.{type(self).__name__}: the parameters hold their averages; leave "
                f"swap_ema() before {call}"
            )

    def _check_options(self, g: int) -> None:
        """Raises if a number among the options of a group is none, or an option no choice."""
        group = self._groups[g]
        self._check_storage(g, group)
        for name, default in self.defaults.items():
            numbers = default if isinstance(default, tuple) else (default,)
            if name not in self._torch_options and name not in self._own_options:
                continue  # a subclass added it
            if name in ("foreach", "fused", "initial_accumulator_value") or not all(
                isinstance(n, (int, float, Tensor)) for n in numbers
            ):
                continue
            if name in ("l1", "eps_inside_sqrt") and group.get(name) is None:
                continue  # off
            if (problem := _reading_problem(group.get(name))) is not None:
                raise RuntimeError(
                    f"fusedopt.{type(self).__name__}, param group {g}: {name!r} {problem}"
                )
            try:
                values = group[name]
                if isinstance(default, bool):
                    bool(values)
                    continue
                if isinstance(default, tuple) and len(values) != len(default):
                    raise ValueError(f"{len(values)} values")
                for value in values if isinstance(default, tuple) else (values,):
                    if isinstance(value, str):
                        raise ValueError("a string")
                    if not isinstance(value, Tensor):
                        float(value)
                    elif value.device.type == "cpu":
                        tensor_kinds.check_number(value)
            except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
                raise TypeError(
                    f"fusedopt.{type(self).__name__}, param group {g}: {name!r} must be a number "
                    f"like {default!r}, got {group.get(name)!r}"
                ) from error

    def _check_storage(self, g: int, group: Group) -> None:
        try:
            storage.check_options(
                differentiable=group.get("differentiable"),
                **{name: group.get(name) for name in storage.OPTIONS},
            )
        except ValueError as error:
            raise ValueError(f"fusedopt.{type(self).__name__}, param group {g}: {error}") from error

    def _check(self, g: int, i: int) -> None:
        """Raises if the parameter, its gradient or its state cannot be updated."""
        group = self._groups[g]
        param = group["params"][i]
        grad = param.grad

        def fail(error: type[Exception], problem: str) -> NoReturn:
            raise error(f"{self._describe(g, i)}: {problem}")

        if not (param.is_floating_point() or param.is_complex()):
            fail(
                TypeError,
                "only floating point and complex parameters can be optimized; leave it out of "
                "the optimizer or convert it",
            )
        if param.device.type == "meta":
            fail(ValueError, "a meta tensor has no data; materialize it with to_empty() first")
        if param.is_inference() and not torch.is_inference_mode_enabled():
            fail(RuntimeError, "it was made in inference mode; clone() it outside")
        state = self.state.get(param)
        left_to_torch = stock_step.concerns(param, grad, state)
        if (problem := memory.problem(param)) is not None:
            fail(RuntimeError, f"it {problem}")
        if not (left_to_torch and tensor_kinds.is_unusual(param)) and (
            torch._debug_has_internal_overlap(dtensor.local(param)) == 1
        ):
            fail(
                ValueError,
                "several of its elements share one memory location (an expanded tensor?); "
                "clone() it before optimizing",
            )
        if group.get("capturable") and not backend.is_accelerator(param.device):
            fail(
                RuntimeError,
                "If capturable=True, params and state_steps must be on an accelerator; "
                "set capturable=False for parameters on the CPU",
            )
        if group.get("fused") and not param.is_floating_point():
            fail(
                RuntimeError,
                "`fused=True` requires all the params to be floating point Tensors; leave fused "
                "unset for complex parameters",
            )
        if left_to_torch:
            stock_step.check(group, param, fail)
        if _is_sparse(grad):
            self._check_sparse(group, param, grad, fail)
        if tensor_kinds.shape(grad) != tensor_kinds.shape(param):
            fail(
                ValueError,
                f"its grad has shape {tensor_kinds.shape(grad)}; "
                "set grad to None and run backward again",
            )
        if grad.device != param.device:
            fail(ValueError, f"its grad is on {grad.device}; move both to one device")
        if (problem := memory.reading_problem(grad)) is not None:
            fail(RuntimeError, f"its grad {problem}")
        if grad.is_complex() != param.is_complex() or not (
            grad.is_floating_point() or grad.is_complex()
        ):
            fail(TypeError, f"its grad has dtype {grad.dtype}; set it to a grad of matching kind")
        if state is not None and not isinstance(state, dict):
            fail(TypeError, f"its state is a {type(state).__name__}, not a dict")
        storage.check_param(group, param, fail)
        placed = (*self._slots(group), "master", "master_remainder", "ema")
        slots = {key: state[key] for key in placed if key in state} if state else {}
        dtensor.check(param, grad, slots, fail)
        if state:
            self._check_state(group, param, state, left_to_torch, fail)
        self._check_numbers(group, param, fail)

    def _check_numbers(self, group: Group, param: Tensor, fail: Callable[..., NoReturn]) -> None:
        """Raises if an option, which may be changed at any time, has no meaning at this step."""
        step = self._known_step(group, param)
        try:
            numbers = self._numbers(_known_numbers(group), 1.0 if step is None else step)
        except (ArithmeticError, RuntimeError) as error:
            fail(type(error), str(error))
        if step is None:
            return  # what follows depends on it
        wide = param.dtype in (torch.float64, torch.complex128)
        largest = torch.finfo(torch.float64 if wide else torch.float32).max
        for name, value in numbers.items():
            if abs(value) > largest and not math.isinf(value):
                fail(
                    RuntimeError,
                    f"{name} is {value:g}, which {param.dtype} cannot be multiplied with; the "
                    f"largest is {largest:g}",
                )

    def _known_step(self, group: Group, param: Tensor) -> float | None:
        """The number of the next step, see _next_step; None if only the device knows it."""
        state = self.state.get(param)
        state = state if isinstance(state, dict) else {}
        if not self._has_step:
            return 1.0 if any(state.get(key) is None for key in self._slots(group)) else 2.0
        count = state.get("step")
        if count is None:
            return 1.0
        if not memory.is_plain(count) or count.device.type != "cpu" or count.numel() != 1:
            return None
        number = tensor_kinds.number(count)
        return None if number is None else number + 1

    def _is_ordinary(self, g: int, i: int) -> bool:
        """Whether the native module, which steps only what it knows, can do without _check. For
        nearly every one of the thousands of parameters of a model it can."""
        group = self._groups[g]
        param = group["params"][i]
        if storage.is_on(group) or group.get("capturable"):
            return False
        if group.get("differentiable") or param.is_inference():
            return False
        state = self.state.get(param) or {}
        if type(state) is not dict or (self._has_step and state and state.get("step") is None):
            return False
        slots = [state[key] for key in self._slots(group) if state.get(key) is not None]
        answer: bool = backend.native.is_ordinary(
            [param, param.grad, *slots], state.get("step") if self._has_step else None
        )
        return answer

    def _check_sparse(
        self, group: Group, param: Tensor, grad: Tensor, fail: Callable[..., NoReturn]
    ) -> None:
        name = type(self).__name__
        # Here torch's loop decides.
        unusual = tensor_kinds.is_unusual(param) or tensor_kinds.has_own_operators(grad)
        if not (self._takes_sparse if grad.layout is torch.sparse_coo else unusual):
            hint = ", please consider SparseAdam instead" if name.startswith("Adam") else ""
            fail(RuntimeError, f"{name} does not support sparse gradients{hint}")
        if group["weight_decay"] != 0 and not unusual:
            fail(RuntimeError, "weight_decay option is not compatible with sparse gradients")
        on = [name for name in storage.OPTIONS if group.get(name) is not None]
        if on:
            fail(RuntimeError, f"{on[0]} option is not compatible with sparse gradients")
        if group.get("l1"):
            fail(RuntimeError, "l1 option is not compatible with sparse gradients")

    def _check_state(
        self,
        group: Group,
        param: Any,
        state: dict[str, Any],
        left_to_torch: bool,
        fail: Callable[..., NoReturn],
    ) -> None:
        for key, value in state.items():
            if isinstance(value, Tensor) and (problem := memory.problem(value)) is not None:
                fail(RuntimeError, f"state[{key!r}] {problem}")
        if self._has_step:
            step = state.get("step")
            if not isinstance(step, Tensor) or step.numel() != 1 or step.is_complex():
                fail(TypeError, f"state['step'] must be a tensor of one number, got {step!r}")
            if step.device.type != "cpu" and step.device != param.device:
                fail(ValueError, f"state['step'] is on {step.device}; move it to the CPU")
            if group.get("differentiable") and step.requires_grad:
                fail(
                    RuntimeError,
                    "`requires_grad` is not supported for `step` in differentiable mode",
                )
            count = tensor_kinds.number(step) if step.device.type == "cpu" else None
            if count is not None and not 0 <= count < storage.LAST_STEP:
                fail(ValueError, f"state['step'] is {count}, not a count")
        for key in self._slots(group):
            value = state.get(key)
            if value is None:
                continue
            if not isinstance(value, Tensor):
                fail(TypeError, f"state[{key!r}] is a {type(value).__name__}, not a tensor")
            if tensor_kinds.shape(value) != tensor_kinds.shape(param):
                fail(
                    ValueError,
                    f"state[{key!r}] has shape {tensor_kinds.shape(value)}; load the state of this "
                    "parameter, or delete it to start anew",
                )
            if value.device != param.device:
                fail(ValueError, f"state[{key!r}] is on {value.device}; move it to {param.device}")
            if storage.is_code(value):
                self._check_code(param, key, state, fail)
            elif value.is_complex() != param.is_complex() or not (
                value.is_floating_point() or value.is_complex()
            ):
                fail(TypeError, f"state[{key!r}] has dtype {value.dtype}")
            if left_to_torch:
                continue
            if _is_sparse(value) and not _is_sparse(param.grad):
                fail(RuntimeError, f"state[{key!r}] is sparse, but the gradient is dense")
            shard = dtensor.local(value)
            if not _is_sparse(value) and torch._debug_has_internal_overlap(shard) == 1:
                fail(ValueError, f"elements of state[{key!r}] share one memory location; clone it")

        for key in filter(None, storage.extras(group, param)):
            value = state.get(key)
            if value is not None:
                storage.check_extra(key, value, param, fail)

    def _check_code(
        self, param: Tensor, key: str, state: dict[str, Any], fail: Callable[..., NoReturn]
    ) -> None:
        expected = torch.uint8 if key in self._unsigned_slots else torch.int8
        codes = dtensor.local(state[key])
        if param.is_complex() or codes.dtype != expected:
            fail(TypeError, f"state[{key!r}] has dtype {codes.dtype}")
        if not storage.is_dense(codes):
            fail(ValueError, f"state[{key!r}] must be without gaps, its strides {codes.stride()}")
        storage.check_scale(key, state.get(f"{key}_scale"), codes, param, fail)

    def _describe(self, g: int, i: int) -> str:
        group = self._groups[g]
        param = group["params"][i]
        names = group.get("param_names")
        name = f" {names[i]!r}" if names else ""
        who = f"fusedopt.{type(self).__name__}, param group {g}, parameter {i}{name}"
        if is_lazy(param):
            return f"{who} (not materialized yet, {param.dtype})"
        has_strides = param.layout is torch.strided and not param.is_nested
        strides = f", strides {tuple(param.stride())}" if has_strides else ""
        return f"{who} (shape {tensor_kinds.shape(param)}, {param.dtype}{strides})"

    # The average of the weights ---------------------------------------------------------------

    def ema_parameters(self) -> Iterator[Tensor]:
        """The averages of the parameters (``ema=``) in the order of the groups; of a parameter that
        has not been updated yet the parameter itself. A step without its gradient leaves a
        parameter alone, and its average too.

        Raises:
            ValueError: no group has ``ema``.
        """
        if all(group.get("ema") is None for group in self.param_groups):
            raise ValueError(
                f"this {type(self).__name__} keeps no averages; construct it with ema="
            )
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state.get(param, {}) if group.get("ema") is not None else {}
                yield state.get("ema", param)

    @contextlib.contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Within the context the parameters hold their averages, for validation or saving::

            with optimizer.swap_ema():
                validate(model)

        Afterwards they are what they were, bit for bit, whatever they were converted to or moved
        to in between, as far as the dtype that they have then can hold it. Copies, pickles and
        state dicts of the model that are made inside hold the averages. ``step()`` raises
        RuntimeError inside.

        Raises:
            fusedopt.averages.WeightsNotRestoredError: when it ends, a parameter has another shape,
                say, and cannot take its weights back; the error holds them.
        """
        core, turn = self._core, self._turn
        weights: averages.Weights = {}
        try:
            with self._exclusively("swap_ema()"):
                theirs = [*self.ema_parameters()]
                params = [param for group in self.param_groups for param in group["params"]]
                kept = averages.kept(params)
                core.swaps.append(weights)
                weights.update(kept)  # from here on there is something to restore
                averages.swap_in(params, theirs)
            yield
        finally:
            # An interrupt, or what a signal handler raises, comes after it.
            try:
                with turn.lock:
                    self._leave_swap(core, weights)
            except averages.WeightsNotRestoredError:
                raise
            except BaseException:
                with turn.lock:
                    self._leave_swap(core, weights)
                raise

    def _leave_swap(self, core: Core, weights: averages.Weights) -> None:
        """Restores the weights; once that is done, calling it again does nothing."""
        at = next((i for i, swap in enumerate(core.swaps) if swap is weights), None)
        if at is None:
            return
        if at + 1 < len(core.swaps):  # a context that began later is still open: it restores them
            core.swaps[at + 1].update(weights)
        elif weights:
            try:
                averages.restore(weights, self._describe_param)
            except averages.WeightsNotRestoredError:
                del core.swaps[at]
                raise
        del core.swaps[at]

    def _describe_param(self, param: Tensor) -> str:
        for g, group in enumerate(self.param_groups):
            for i, own in enumerate(group["params"]):
                if own is param:
                    return self._describe(g, i)
        return f"a parameter of shape {tuple(param.shape)} that is in no param group now"

    # Checkpoints ------------------------------------------------------------------------------

    def state_dict(self, *, stock: bool = False) -> dict[str, Any]:
        """As in torch.

        Args:
            stock (bool): as ``torch.optim`` would have written it: 8-bit state as float32, and
                without masters, averages, and options of fusedopt. What a program or a subclass
                adds to groups and state stays (default: False).
        """
        with self._turn.lock:
            state_dict = super().state_dict()
        if not stock:
            return state_dict
        return checkpoint.stock_state_dict(self, state_dict)

    def _as_stock(self, group: Group, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """The state of one parameter as torch's class has it."""
        return storage.as_stock(state, self._all_slots)

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of the ``torch.optim`` class of the same name.

        Everything is checked first: if this raises, the optimizer is as it was.

        Args:
            state_dict (dict): what ``state_dict()`` of either returned.

        Raises:
            ValueError: groups, parameters or shapes do not match this optimizer.
            TypeError: an entry is not what ``state_dict()`` makes.

        Differences from torch.optim: state tensors keep the dtype they were saved in (torch casts
        them to the parameter's dtype), options that the checkpoint does not know are taken from
        the defaults, and those that torch does not have (fusedopt's, and what a subclass adds to
        ``defaults``) stay what they are, and shapes are checked.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            if result is not None:
                state_dict = result
        with self._exclusively("load_state_dict()"):
            groups = checkpoint.loaded_groups(self, state_dict)
            state = checkpoint.loaded_state(self, state_dict, groups)
            before = self.__dict__.copy()
            try:
                self.__setstate__({"state": state, "param_groups": groups})
            except Exception as error:
                self.__dict__.update(before)
                raise ValueError(
                    f"fusedopt.{type(self).__name__}: torch.optim cannot take the loaded state "
                    f"over ({error!r}); is it the checkpoint of another optimizer?"
                ) from error
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def _check_max_grad_norm(value: Any) -> None:
    if value is not None and not (isinstance(value, (int, float)) and value >= 0.0):
        raise ValueError(f"Invalid max_grad_norm value: {value}")


def _skips(scaling: tuple[Tensor | None, Tensor | None, Tensor | None]) -> bool:
    found_inf, _, clip = scaling
    return any(
        flag is not None and tensor_kinds.number(flag) not in (None, 0)
        for flag in (found_inf, None if clip is None else clip[SKIP])
    )


def _grad_factor(scaling: tuple[Tensor | None, Tensor | None, Tensor | None]) -> Tensor | None:
    _, loss_scale, clip = scaling
    factor = None if clip is None else clip[FACTOR]
    if loss_scale is not None:
        factor = loss_scale.double().reciprocal() * (1.0 if factor is None else factor)
    return None if factor is None else memory.materialized(factor)


@functools.cache
def _last_count(dtype: torch.dtype) -> float:
    """Up to where a step count of this dtype can go on."""
    if dtype == torch.bool:
        return 0
    return 2 / torch.finfo(dtype).eps if dtype.is_floating_point else torch.iinfo(dtype).max


def _value_of(state: dict[str, Any], key: str) -> Tensor:
    """A state tensor as numbers, however it is stored."""
    value: Tensor = state[key]
    return storage.decode(value, state[f"{key}_scale"]) if storage.is_code(value) else value


def _call_all(calls: list[functools.partial[Any]]) -> None:
    """In one call, which no interrupt divides."""
    deque(map(functools.partial.__call__, calls), maxlen=0)


def _is_plain_dict(mapping: Any) -> bool:
    return type(mapping) in (dict, defaultdict)


def _plain_groups(groups: Any) -> list[Group]:
    """Param groups as the native side reads them: without asking a subclass what it makes of it."""
    if type(groups) is list and all(
        type(group) is dict and type(group["params"]) is list for group in groups
    ):
        return groups
    return [
        {**{key: group[key] for key in group}, "params": [*group["params"]]} for group in groups
    ]


def _is_sparse(tensor: Tensor) -> bool:
    return tensor.layout is not torch.strided


def _in_layout_of(param: Tensor, grad: Tensor) -> Tensor | None:
    """A copy of grad with the strides of param, or None if it is not an ordinary real tensor. Of
    DTensors that of what this process holds."""
    param, grad = dtensor.local(param), dtensor.local(dtensor.placed_like(grad, param))
    if type(grad) is not Tensor or _is_sparse(grad) or grad.dtype not in backend.FLOATS:
        return None
    if (grad.dtype == torch.float64) != (param.dtype == torch.float64):
        return None
    copy = torch.empty_like(param, dtype=grad.dtype, memory_format=torch.preserve_format)
    return copy.copy_(grad.detach())


def _match_layout(param: Tensor, state: list[Any]) -> None:
    """Gives state tensors the strides of their parameter, which may have moved to another memory
    format since they were made. Values and identity stay."""
    param = dtensor.local(param)
    for value in map(dtensor.local, state):
        if (
            type(value) is Tensor
            and value.layout is param.layout is torch.strided
            and not param.is_nested
            and not value.is_nested
            and value.stride() != param.stride()
            and value.device == param.device
        ):
            copy = torch.empty_like(param, dtype=value.dtype, memory_format=torch.preserve_format)
            if copy.stride() == param.stride():
                value.data = copy.copy_(value)


def penalized_grad(group: Group, grad: Tensor, param: Tensor) -> Tensor:
    """``(-grad if maximize else grad) + weight_decay * param + l1 * sign(param)``."""
    if group["maximize"]:
        grad = -grad
    if group["weight_decay"] != 0:
        grad = grad + group["weight_decay"] * param
    if group.get("l1"):
        grad = grad + group["l1"] * param.sign()
    return grad


def _reading_problem(option: Any) -> str | None:
    """Why not all of an option can be read. It cannot be printed then, either."""
    values = option if isinstance(option, (tuple, list)) else (option,)
    return next(filter(None, map(memory.reading_problem, values)), None)


def _known_numbers(group: Group) -> Group:
    """The group with its tensors of one element as numbers. One that is on a device, where nobody
    waits for it, is taken for 0.5, which all options may be."""

    def known(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(map(known, value))
        if not isinstance(value, Tensor) or value.numel() != 1:
            return value
        can_read = tensor_kinds.is_fake(value) or (value.is_cpu and memory.is_plain(value))
        number = tensor_kinds.number(value) if can_read else None
        return 0.5 if number is None else number

    return {name: known(value) for name, value in group.items() if name != "params"}


def _with_scalars(group: Group) -> Group:
    """The group with its tensors of one element, of whatever shape, as 0-dim tensors: any other
    would broadcast a 0-dim parameter."""
    return {
        name: scalar(value) if isinstance(value, Tensor) and value.numel() == 1 else value
        for name, value in group.items()
    }


def scalar(value: float | Tensor) -> float | Tensor:
    """A hyperparameter as a number or a 0-dim tensor, no integer one: divided by a number, that
    would have torch's default dtype."""
    if not isinstance(value, Tensor) or _is_sparse(value):
        return value
    is_integer = not (value.is_floating_point() or value.is_complex())
    return value.squeeze().to(torch.float32 if is_integer else value.dtype)


def add_sparse(tensor: Tensor, other: Tensor, alpha: float = 1.0) -> None:
    """``tensor.add_(other, alpha=alpha)`` for a sparse ``other``. If ``tensor`` is a view or has
    unusual strides, torch's own writes to memory beside it (torch 2.13)."""
    if tensor.is_sparse or not other.is_sparse:
        tensor.add_(other, alpha=alpha)
        return
    other = other.coalesce()
    indices, values = other._indices(), other._values().to(tensor.dtype)
    if len(indices) == 1:
        tensor.index_add_(0, indices[0], values, alpha=alpha)
    elif len(indices) == 0:
        tensor.add_(values.sum(0), alpha=alpha)
    else:
        tensor.index_put_(tuple(indices), alpha * values, accumulate=True)
