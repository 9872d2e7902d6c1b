"""What a training program does: gradients, options, groups, schedulers, checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from cases import LAYOUTS, bits, snapshot
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch import Tensor, nn

import fusedopt

from . import kept
from .choices import (
    HALF,
    NATIVE,
    REAL,
    choose_backend,
    in_layout,
    random_case,
    random_storage,
    random_values,
    randoms,
)
from .closeness import same_numbers
from .lockstep import Lockstep, with_memory

SCHEDULERS = (
    lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
)
PLAIN = (dict, OrderedDict)


class Training(RuleBasedStateMachine):
    run: Lockstep

    @initialize(rng=randoms)
    def start(self, rng):
        choose_backend(rng)
        self.rng = rng
        self.run = Lockstep(rng, random_case(rng), random_storage(rng))
        self.schedulers: list[Any] = []

    def teardown(self):
        fusedopt.backend.native = NATIVE
        for memory, before in self.run.around if hasattr(self, "run") else ():
            assert bits(memory) == before, "memory beside a parameter was written"

    @invariant()
    def both_go_on(self):
        """After everything that happens."""
        if self.rng.random() < 0.6:
            self.run.set_gradients(self.rng)
        self.run.step(closure=self.rng.random() < 0.1)

    @rule(rng=randoms)
    def other_gradients_of_the_same(self, rng):
        """The plan of the last step is that of these."""
        for _ in range(2):
            for group, p, _ in self.run.pairs():
                if p.grad is not None:
                    self.run.set_gradient(rng, group, p)
            self.run.step()

    @rule()
    def same_gradients(self):
        self.run.step()

    @rule(rng=randoms)
    def refused_step(self, rng):
        """A gradient of another shape: an error, and nothing has changed."""
        present = [
            p
            for p in self.run.params
            if p.grad is not None and not p.grad.is_sparse and not p.grad._is_zerotensor()
        ]
        if not present:
            return
        p = rng.choice(present)
        good, p.grad.data = p.grad.data, torch.ones(*p.shape, 3, dtype=p.grad.dtype)
        before = snapshot(self.run.ours)
        with pytest.raises((ValueError, TypeError)):
            self.run.ours.step()
        assert snapshot(self.run.ours) == before
        p.grad.data = good

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none):
        for p in self.run.params:
            if not to_none and p.grad is not None and not p.grad.is_sparse:
                # torch writes neither what has no memory nor one element in two places.
                p.grad = with_memory(p.grad).clone()
        present = [p.grad is not None for p in self.run.params]
        self.run.ours.zero_grad(set_to_none=to_none)
        for p, was in zip(self.run.params, present, strict=True):
            if to_none or not was:
                assert p.grad is None
            else:
                assert not (p.grad.to_dense() != 0).any()

    @rule(rng=randoms)
    def add_param_group(self, rng):
        if len(self.run.params) > 6:
            return
        run, options = self.run, self.run.random_options(rng)
        pairs = [run.new_pair(rng) for _ in range(rng.randint(1, 2))]
        run.ours.add_param_group({"params": [p for p, _ in pairs], **options})
        run.twin.add_param_group({"params": [q for _, q in pairs], **options})
        self.schedulers = []

    @rule(rng=randoms)
    def freeze_or_unfreeze(self, rng):
        p = rng.choice(self.run.params)
        p.requires_grad_(not p.requires_grad)
        if not p.requires_grad and rng.random() < 0.7:
            p.grad = None

    @rule(rng=randoms)
    def swap_data(self, rng):
        p = rng.choice(self.run.params)
        if rng.random() < 0.3:
            with torch.no_grad():
                p.mul_(0.5)
            return
        dtype = p.dtype
        if dtype in (torch.float32, *HALF) and not self.run.stored and rng.random() < 0.3:
            dtype = rng.choice((torch.float32, *HALF))
            p.grad = None
        values = p.detach() if rng.random() < 0.5 else random_values(rng, p.shape, p.dtype)
        p.data, around = in_layout(LAYOUTS, rng, values.to(dtype).contiguous())
        self.run.around += [(memory, bits(memory)) for memory in around]

    @rule(rng=randoms)
    def swap_state(self, rng):
        ours = self.run.ours
        stepped = [p for p in self.run.params if ours.state.get(p)]
        if not stepped:
            return
        p = rng.choice(stepped)
        state, kind = ours.state[p], rng.random()
        if kind < 0.2:
            del ours.state[p]
        elif kind < 0.4:
            ours.state[p] = dict(reversed(state.items()))
        elif kind < 0.5:
            items = [*ours.state.items()]
            rng.shuffle(items)
            ours.state.clear()
            ours.state.update(items)
        else:
            slots = [k for k in self.run.table.slots if state.get(k) is not None]
            key = rng.choice([k for k in slots if not kept.is_code(state[k])] or ["note"])
            value = state.get(key)
            if not isinstance(value, Tensor):
                state[key] = "of the program"
                return
            if value.layout is not torch.strided:
                return
            if rng.random() < 0.3 and not value.is_complex():
                other = value.to(rng.choice(REAL))
                # A centered average of infinity is NaN in torch alone.
                if not ("grad_avg" in state and other.isinf().any()):
                    value = other
            value, around = in_layout(LAYOUTS, rng, value.contiguous())
            if rng.random() < 0.3:
                state[key].data = value
            else:
                state[key] = value
            self.run.around += [(memory, bits(memory)) for memory in around]

    @rule(rng=randoms)
    def change_options(self, rng):
        run = self.run
        at = rng.randrange(len(run.ours.param_groups))
        group, other = run.ours.param_groups[at], run.twin.param_groups[at]
        changes: dict[str, Any] = {"lr": rng.choice((0.3, 0.003, torch.tensor(0.03)))}
        for name, values in {
            "weight_decay": (0.0, 0.05),
            "maximize": (True, False, None),
            "amsgrad": (True, False, None),
            "centered": (True, False, None),
            "nesterov": (False, None),
            "betas": ((0.7, 0.8), (0.9, 0.999)),
            "momentum": (0.0, 0.8),
            "eps": (1e-6, 1e-2),
        }.items():
            if name in group and rng.random() < 0.3:
                changes[name] = rng.choice(values)
        if group.get("nesterov") and changes.get("momentum") == 0:
            del changes["momentum"]
        if changes.get("momentum", 0) and any(
            p.grad is not None and p.grad.is_sparse for p in group["params"]
        ):
            return
        if changes.get("weight_decay") and any(
            p.grad is not None and p.grad.is_sparse for p in group["params"]
        ):
            return
        group.update(changes)
        other.update(copy.deepcopy(changes))
        self.schedulers = []

    @rule(max_norm=st.sampled_from((None, 0.0, 0.5, 1e3, float("inf"))))
    def clip(self, max_norm):
        self.run.ours.max_grad_norm = max_norm

    @rule(build=st.sampled_from(SCHEDULERS))
    def schedule(self, build):
        for o in (self.run.ours, self.run.twin):
            for group in o.param_groups:
                group.pop("initial_lr", None)
        self.schedulers = [build(o) for o in (self.run.ours, self.run.twin)]

    @precondition(lambda self: getattr(self, "schedulers", None))
    @rule()
    def scheduler_step(self):
        for scheduler in self.schedulers:
            scheduler.optimizer._opt_called = True
            scheduler.step()
        lrs = [[float(g["lr"]) for g in s.optimizer.param_groups] for s in self.schedulers]
        assert lrs[0] == lrs[1]

    # What moves the optimizer elsewhere -----------------------------------------------------

    def without_gradients(self, move):
        """Moves parameters and optimizer; gradients of other dtypes cannot be copied with them."""
        run = self.run
        grads = [p.grad for p in run.params]
        for p in run.params:
            p.grad = None
            if isinstance(p, nn.Parameter):
                p.data = p.detach().clone()  # as its deepcopy does: dense
        before = snapshot(run.ours)
        params, run.ours = move((run.params, run.ours))
        assert snapshot(run.ours) == before
        assert all(a is b for a, b in zip(params, run.params, strict=True))
        for p, grad in zip(params, grads, strict=True):
            if hasattr(p, "grad_dtype"):
                p.grad_dtype = None
            p.grad = grad
        self.schedulers = []

    @rule()
    def deepcopy(self):
        self.without_gradients(copy.deepcopy)

    @rule(rng=randoms)
    def pickle_and_another_backend(self, rng):
        def move(all_of_it):
            file = pickle.dumps(all_of_it)
            choose_backend(rng)
            return pickle.loads(file)

        self.without_gradients(move)

    @rule(rng=randoms)
    def resume(self, rng):
        """From a file, into the same or into a new optimizer, perhaps on another backend."""
        run = self.run
        file = io.BytesIO()
        torch.save(run.ours.state_dict(), file)
        file.seek(0)
        # torch loads no dicts of other classes so.
        is_plain = all(type(state) in PLAIN for state in run.ours.state.values())
        saved = torch.load(file, weights_only=is_plain)
        before, clip = snapshot(run.ours), run.ours.max_grad_norm
        if rng.random() < 0.7:
            choose_backend(rng)
            groups = [{"params": group["params"]} for group in run.ours.param_groups]
            run.ours = run.case.ours(groups, **run.stored, max_grad_norm=clip)
            self.schedulers = []
        run.ours.load_state_dict(saved)
        assert snapshot(run.ours) == before

    @rule()
    def load_from_torch(self):
        run = self.run
        run.follow()
        run.ours.load_state_dict(run.twin.state_dict())
        after = run.ours.state_dict()["state"]
        for i, state in run.twin.state_dict()["state"].items():
            assert {k for k, v in state.items() if v is not None} <= set(after[i])
            for key, value in state.items():
                assert value is None or same_numbers(after[i][key], value), key

    @rule()
    def load_into_torch(self):
        run = self.run
        run.follow()
        expected = [run.numbers(group, p)[1] for group, p, _ in run.pairs()]
        saved = run.ours.state_dict(stock=True)
        run.twin.load_state_dict(saved)
        for (_, _, q), numbers in zip(run.pairs(), expected, strict=True):
            for key, value in numbers.items():
                loaded = run.twin.state[q][key]
                if key == "mu_product":  # torch casts it to the dtype of the parameter
                    value = value.to(loaded.dtype)
                assert same_numbers(loaded, value), key
        for group, other in zip(run.ours.param_groups, run.twin.param_groups, strict=True):
            for name in run.twin.defaults:
                assert str(group[name]) == str(other[name]), name
