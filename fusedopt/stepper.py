"""One step of some parameters: a native call where they are as the last step left them, else
checks, new state, and the Python rule for what the native module does not take."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backend, checks, dtensor, options, python_step, scaling, state, tensor_kinds
from .grad_norm import GradNorm
from .outcome import NoPlan, left_to_python, odd, refused
from .problem import Problem
from .record import Members, Record, is_plain_dict, plain_groups
from .rule import STORAGE_OPTIONS
from .scaling import Scaling
from .together import Together
from .work import Gradients, Work


class Stepper:
    """Steps the same parameters again and again: those of an optimizer, a bucket or a chunk. Never
    pickled. ``num_threads``: on the CPU, if not as many as torch uses."""

    def __init__(self, num_threads: int | None = None) -> None:
        self._num_threads = num_threads
        # The tensors of the last step, as the native module remembers them.
        self.plan: Any = None
        self._plan_amp_fused = False  # it knows where steps are counted
        # Memory on the devices, kept for good: a captured graph goes on using it.
        self._norm = GradNorm()
        self._tickets: dict[torch.device, Tensor] = {}
        self._streams: dict[Tensor, int] = {}  # the last that used tickets
        self._together = Together()
        self._kernels = backend.PutOff()

    def step(self, members: Members) -> None:
        self._check_plan(members)
        if not scaling.repeat_clipped(self.plan, members, self._norm):
            self.step_scaled(members, self._scaling(members))

    def _check_plan(self, members: Members) -> None:
        if self._plan_amp_fused != (now := members.optimizer.amp_fused):
            self.plan, self._plan_amp_fused = None, now

    def step_scaled(self, members: Members, scales: Scaling | None) -> None:
        self._check_plan(members)
        if self._together.settled is not None and self._kernels.may_be_there():
            self._together.settled = None
        if self._together.settled is not None and self._step_again(members, scales):
            return
        outcome = self._native_step(self.plan, members, scales)
        if outcome.is_stale:
            plain = plain_groups(members.groups)
            if plain is not members.groups:
                members.groups = plain
                outcome = self._native_step(self.plan, members, scales)
        if not outcome.is_done:
            with torch.set_grad_enabled(bool(members.optimizer.defaults["differentiable"])):
                self._checked_step(members, scales, outcome)

    def _scaling(self, members: Members) -> Scaling | None:
        try:
            return scaling.read(members.optimizer, self._norm)
        except RuntimeError:
            members.groups = plain_groups(members.groups)
            _check_all(members.with_grad())  # says which
            raise

    @torch.no_grad()
    def _step_again(self, members: Members, scales: Scaling | None) -> bool:
        """Does what the last step left to torch's operators, if that was all and nothing is another
        tensor since."""
        if backend.is_capturing():
            _check_capturable(members)
        work = self._together.again(members, scales)
        if work is None:
            return False
        self._mixed_step(None, members, scales, NoPlan(), lambda _: work)
        return True

    def _native_step(
        self,
        plan: Any,
        members: Members,
        scales: Scaling | None,
        grads: Gradients | None = None,
    ) -> Any:
        """One native call for all groups.

        Returns an Outcome of the native module. When the step is done, what was created is part of
        the state. Otherwise nothing was written, and the plan is stale, or some of its entries are
        odd: not as the native side takes them. ``grads``: instead of some; see Gradients.
        """
        if plan is None:
            return NoPlan()
        for tickets in self._tickets.values():
            backend.use_on_stream(tickets, self._streams)
        known, owner, created = members.state, members.owner, members.created
        is_plain = all(map(is_plain_dict, (known, owner, *created.values())))
        outcome = plan.step(
            members.groups,
            known if is_plain else dict(known),
            self._num_threads or torch.get_num_threads(),
            members.hidden_grads() or None if grads is None else grads,
            scales,
            created or None,
            owner if is_plain else None,
        )
        if outcome.is_done and created and not is_plain:
            _call_all(members.commits())
        return outcome

    def _checked_step(self, members: Members, scales: Scaling | None, outcome: Any) -> None:
        """The steps that one native call cannot do: tensors that are new, moved or unusual."""
        capturing = backend.is_capturing()
        if capturing:
            _check_capturable(members)
        # Kept only if the step succeeds.
        plan, self.plan = self.plan, None
        together, self._together = self._together, Together()
        is_stale = outcome.is_stale
        if not is_stale:
            records = odd(plan, outcome, members)
            unknown = together.unknown(members, records)
            _check_all(unknown)
            is_stale = any(map(state.missing, unknown))
        if is_stale:
            for g in range(len(members.groups)):
                options.check_group(members, g)
            can_plan = backend.native is not None and not members.is_virtual()
            records = members.with_grad()
            unknown = together.unknown(members, records)
            _check_all(r for r in unknown if not (can_plan and r.is_ordinary()))
            if capturing and any(map(state.missing, unknown)):
                raise backend.capture_error(f"{members.name} creates state")
            for record in unknown:
                state.complete(record)
            fills = members.created and members.rule.first_step_fills_state
            if fills and scaling.is_skipped(scales):
                return  # it is the state that says that there was a first step
            plan, outcome = None, NoPlan()
            if can_plan:
                plan = self._make_plan(members)
                outcome = self._native_step(plan, members, scales)
                if outcome.is_stale:  # it is not as the plan has it, and would not be next time
                    plan = None
                _check_all(odd(plan, outcome, members))
        if not outcome.is_done:
            together.remember(members, records, unknown, refused(plan, outcome, members))

            def arrange(python: list[Record] | None) -> Work:
                return together.arrange(members, records if python is None else python, scales)

            self._mixed_step(plan, members, scales, outcome, arrange)
            if not unknown and len(records) == len(members.with_grad()):
                together.settle(members, records)
        self.plan, self._together = plan, together

    def _mixed_step(
        self,
        plan: Any,
        members: Members,
        scales: Scaling | None,
        outcome: Any,
        arrange: Callable[[list[Record] | None], Work],
    ) -> None:
        """Takes the Python rule where the native side cannot go, copies gradients that have another
        layout than their parameter, and does all the rest in one native call."""
        grads = members.hidden_grads()
        written: list[Tensor] = []
        kept: list[Tensor] = []
        # Python delivers an interrupt after a call. There is none between the last write and the
        # place where it counts as done, nor between an error and the restoration.
        done: list[bool] = []
        commits = [*members.commits(), functools.partial(done.append, True)]
        try:
            while not outcome.is_done:
                # Without a plan, it is all of them.
                work = arrange(plan and left_to_python(plan, members, outcome, grads))
                targets, copies = work.kept()
                written, kept = written + targets, kept + copies
                last = self.step_in_python(work) if work.buckets or work.alone else []
                if plan is None:
                    with torch.no_grad():
                        _call_all([*last, *commits])
                    break
                with torch.no_grad():
                    _call_all(last)
                outcome = self._native_step(plan, members, scales, grads)
                if outcome.is_stale:
                    raise RuntimeError(
                        f"{members.name}: parameters, gradients or state changed while step() was "
                        "reading them; let other threads change them before or after it"
                    )
        except BaseException:
            if written and not (done or (plan is not None and plan.has_stepped)):
                with torch.no_grad():
                    tensor_kinds.write(written, kept)
            raise

    def step_in_python(self, work: Work) -> list[functools.partial[Any]]:
        """What is not left to the native module. Tests look here. Returns calls that are still to
        be made, which nothing can make fail."""
        with torch.no_grad():  # those of one group that is differentiable go alone
            last = [call for bucket in work.buckets for call in python_step.take_together(bucket)]
        for record, factor in work.alone:
            python_step.take(record, factor)
        return last

    def _make_plan(self, members: Members) -> Any:
        if (cls := dtensor.dtensor_type()) is not None:
            backend.native.set_dtensor_type(cls)
        plan = backend.native.Plan(members.rule.name, members.name)
        for device in {p.device for group in members.groups for p in group["params"]}:
            if backend.has_kernels(device):
                if device not in self._tickets:
                    count = backend.native.NUM_TICKETS
                    self._tickets[device] = backend.lasting_zeros(count, torch.float32, device)
                plan.add_tickets(self._tickets[device])
        for g, group in enumerate(members.groups):
            in_python = bool(group.get("differentiable"))
            plan.add_group(
                in_python,
                bool(group.get("capturable")),
                members.optimizer.amp_fused,
                {name: group.get(name) for name in STORAGE_OPTIONS},
            )
            for i in range(len(group["params"])):
                record = Record(members, g, i)
                entries = record.entries
                if record.grad is None and state.missing(record):
                    entries = {}  # unknown until its next step completes it
                if entries and not in_python:
                    state.match_layout(record)
                scale_keys = (f"{key}_scale" for key in record.keys)
                plan.add(
                    record.param,
                    entries or None,
                    record.keys,
                    (*record.extras, *scale_keys),
                    record.is_first_step,
                )
        plan.finish({**members.state, **members.created})
        return plan


def _check(record: Record) -> None:
    try:
        checks.check(record)
    except Problem as problem:
        raise problem.at(record.describe()) from problem.__cause__


def _check_all(records: Any) -> None:
    for record in records:
        _check(record)


def _check_capturable(members: Members) -> None:
    if not members.rule.counts_steps:
        return  # there is nothing on the host that a replay would miss
    for g, group in enumerate(members.groups):
        if not group.get("capturable"):
            raise RuntimeError(
                f"{members.name}: step() is being captured into a CUDA graph, but param group {g} "
                "has capturable=False; construct the optimizer with capturable=True"
            )


def _call_all(calls: list[functools.partial[Any]]) -> None:
    """In one call, which no interrupt divides."""
    deque(map(functools.partial.__call__, calls), maxlen=0)
