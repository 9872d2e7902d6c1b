"""The doors of an optimizer: what a user calls. The rooms behind them are in the files that this
one imports; a subclass brings its :class:`~fusedopt.rule.Rule`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from . import averages, checkpoint, options
from .core import PICKLED, AmpScalingSupport, Core, of_core
from .grad_norm import NORM
from .record import Members, plain_groups
from .rule import GROUP_OPTIONS, Group, Rule, Shared, with_shared, with_shared_parameters
from .stepper import Stepper
from .turns import Turn

if TYPE_CHECKING:
    from .hooks import InBackward


# fusedopt's classes, by name: whoever needs all of them looks here.
CLASSES: dict[str, type[FusedOptimizer]] = {}


class FusedOptimizer(torch.optim.Optimizer):
    """Base of fusedopt's classes; not meant to be used by itself."""

    _rule: ClassVar[Rule]
    # torch's class of the same name; None if torch has none.
    _stock: ClassVar[type[torch.optim.Optimizer] | None]
    # Options of param groups: those of fusedopt, and those that the class of torch's has. A class
    # that a user derives may have any constructor, and options of its own that are in neither.
    _own_options: ClassVar[tuple[str, ...]] = ()
    _torch_options: ClassVar[frozenset[str]] = frozenset()

    # What wrappers and shallow copies share. (Set on the object: a default on the class would hide
    # it from wrappers that inherit from it.)
    _core: Core
    # Clip the norm of all gradients of a step to this much; may be changed at any time.
    max_grad_norm: float | None = of_core("max_grad_norm")
    grad_scale: Tensor | None = of_core("grad_scale")
    found_inf: Tensor | None = of_core("found_inf")
    _clips: dict[torch.device, Tensor] | None = of_core("_clips")
    _in_backward: InBackward | None = of_core("_in_backward")
    _step_supports_amp_scaling = AmpScalingSupport()

    _turn: Turn
    _stepper: Stepper

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = next(base for base in cls.__mro__ if base.__module__.startswith("torch.optim."))
        cls._stock = None if stock is torch.optim.Optimizer else stock
        if cls.__module__.rpartition(".")[0] == __package__:
            CLASSES[cls.__name__] = cls
            cls.__init__.__signature__ = with_shared_parameters(cls.__init__)  # type: ignore[attr-defined]
        if not cls._torch_options:  # else it is derived from a class that knows them
            cls._torch_options = frozenset(inspect.signature(cls._stock or cls).parameters)
            own = (*GROUP_OPTIONS, *cls._rule.switches)
            cls._own_options = tuple(name for name in own if name not in cls._torch_options)
        if cls.__doc__:
            cls.__doc__ = with_shared(cls.__doc__)

    # Construction -----------------------------------------------------------------------------

    def _finish_init(self, shared: Shared, **switches: bool) -> None:
        """Adds the options that torch does not have, where they are on.

        An option that is off is in no group, so that checkpoints stay those of torch.
        """
        values = options.read_shared(type(self).__name__, shared, **switches)
        options.check_storage({**values, "differentiable": self.defaults["differentiable"]})
        self._set_defaults()
        self.max_grad_norm = shared.get("max_grad_norm")
        self.amp_fused = bool(shared.get("amp_fused"))
        for name, value in values.items():
            self.defaults[name] = value
            for group in self.param_groups:
                group.setdefault(name, value)

    @property
    def amp_fused(self) -> bool:
        """Whether ``step()`` unscales and skips for ``torch.amp.GradScaler``. May be changed."""
        return self._core.amp_fused

    @amp_fused.setter
    def amp_fused(self, value: bool) -> None:
        self._core.amp_fused = value

    def __getstate__(self) -> dict[str, Any]:
        own = self._core.pickled(self._name)  # first of all, for it waits for steps that run
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = {name: value for name, value in state.items() if name in PICKLED}
        super().__setstate__({name: value for name, value in state.items() if name not in own})
        self._set_defaults()
        self._stepper.plan = None
        self._core.resume(self, own)

    def __copy__(self) -> FusedOptimizer:
        """Of the same parameters, state and groups; so it has the same options and takes turns."""
        copied = object.__new__(type(self))
        copied._turn, copied._core = self._turn, self._core
        copied.__setstate__(self.__getstate__())
        return copied

    def _set_defaults(self) -> None:
        """What an object has that no constructor of this class made."""
        for name, kind in (("_core", Core), ("_turn", Turn), ("_stepper", Stepper)):
            if name not in self.__dict__:
                setattr(self, name, kind())

    @property
    def _name(self) -> str:
        return f"fusedopt.{type(self).__name__}"

    def _members(self) -> Members:
        """All parameters, whatever containers a user has put them into."""
        return Members(self, plain_groups(self.param_groups))

    def _describe(self, param: Tensor) -> str:
        return self._members().describe_param(param)

    def add_param_group(self, param_group: Group) -> None:
        if not hasattr(self, "_turn"):  # in the constructor of torch's class
            return super().add_param_group(param_group)
        with self._turn.exclusively(self._name, "add_param_group()"):
            super().add_param_group(param_group)
            if self._in_backward is not None:
                try:
                    self._in_backward.hook()
                except Exception:  # one is attached to another optimizer, or there is no memory
                    self.param_groups.pop()
                    raise
        return None

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients of the last step, unscaled and before it was clipped: a 0-dim
        tensor of float64 (float32 where there is none, as on MPS) on the device of the first
        gradient. None without ``max_grad_norm``.

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
        self._turn.step(self._name, self._step_all)

    def _step_all(self) -> None:
        self._check_can_step()
        if self._in_backward is None:
            self._stepper.step(Members(self, self.param_groups))
        else:
            self._in_backward.step(self)

    def _check_can_step(self, call: str = "step()") -> None:
        self._core.check_can_step(self._name, call)

    def synchronize(self) -> None:
        """Return when all parameters are updated: of an offloaded optimizer, whose ``step()`` with
        ``overlap="forward"`` returns before; of others they always are."""
        if self._in_backward is not None:
            self._in_backward.synchronize()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; gradients that an offloaded optimizer took to the host are forgotten."""
        if self._in_backward is not None:
            self._in_backward.forget_gradients()
        super().zero_grad(set_to_none)

    def accumulating(self) -> AbstractContextManager[None]:
        """Within the context the hooks of :func:`fusedopt.attach` and :func:`fusedopt.offload` step
        nothing, and gradients add up as usual::

            with optimizer.accumulating():
                for batch in micro_batches[:-1]:
                    loss(model, batch).backward()
            loss(model, micro_batches[-1]).backward()

        The first backward after it steps with the sums, at its end also where it reaches a
        parameter no more; if it is part of another backward (``use_reentrant=True``), these are
        left to ``step()``. An ordinary optimizer steps in ``step()`` alone: nothing changes.
        """
        return nullcontext() if self._in_backward is None else self._in_backward.accumulating()

    # The average of the weights ---------------------------------------------------------------

    def ema_parameters(self) -> Iterator[Tensor]:
        """The averages of the parameters (``ema=``) in the order of the groups; of a parameter that
        has not been updated yet the parameter itself. A step without its gradient leaves a
        parameter alone, and its average too.

        Raises:
            ValueError: no group has ``ema``.
        """
        if all(group.get("ema") is None for group in self.param_groups):
            raise ValueError(f"this {self._name} keeps no averages; construct it with ema=")
        self.synchronize()
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state.get(param, {}) if group.get("ema") is not None else {}
                yield state.get("ema", param)

    def swap_ema(self) -> AbstractContextManager[None]:
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
        return averages.swapped(self)

    # Checkpoints ------------------------------------------------------------------------------

    def state_dict(self, *, stock: bool = False) -> dict[str, Any]:
        """As in torch.

        Args:
            stock (bool): as ``torch.optim`` would have written it: 8-bit state as float32, and
                without masters, averages, and options of fusedopt. What a program or a subclass
                adds to groups and state stays (default: False).
        """
        with self._turn.lock:
            self.synchronize()
            state_dict = super().state_dict()
        return checkpoint.stock_state_dict(self, state_dict) if stock else state_dict

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
        with self._turn.exclusively(self._name, "load_state_dict()"):
            checkpoint.load(self, state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
