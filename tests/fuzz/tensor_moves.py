"""What happens to the tensors of a program: other shapes, swaps, memory that is too short, one
count of steps for several parameters."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from cases import LAYOUTS, bits, snapshot
from hypothesis.stateful import rule
from torch import Tensor, nn
from torch.utils import swap_tensors

import fusedopt

from . import kept
from .choices import in_layout, random_shape, random_values, randoms
from .closeness import real
from .lockstep import place_of
from .training import Training


class TensorMoves(Training):
    def backward(self, rng: random.Random, p: Tensor) -> None:
        """A gradient that autograd puts there, after it has been asked for one of this shape."""
        if not p.requires_grad:
            self.run.give(p, random_values(rng, p.shape, p.dtype))
            return
        factor = random_values(rng, p.shape, p.dtype)
        p.grad = None
        loss = (p * factor).sum()
        (loss.real if loss.is_complex() else loss).backward()
        assert p.grad.shape == p.shape
        assert torch.equal(p.grad, factor.conj())

    def fresh_like(self, rng: random.Random, key: str, shape: Any, dtype: torch.dtype) -> Tensor:
        values = random_values(rng, shape, dtype)
        if key in self.run.table.unsigned:
            real(values).abs_().add_(25)  # more than the square of a centered average
        values, around = in_layout(LAYOUTS, rng, values)
        self.run.around += [(memory, bits(memory)) for memory in around]
        return values

    @rule(rng=randoms)
    def another_shape(self, rng):
        """Through ``data``, as programs prune and grow; the state does not follow by itself."""
        run = self.run
        group, p, q = rng.choice(run.pairs())
        old, shape = p.shape, random_shape(rng)
        p.grad = q.grad = None
        p.data = self.fresh_like(rng, "param", shape, p.dtype)
        q.data = torch.zeros(shape, dtype=q.dtype)
        self.backward(rng, p)
        state = run.ours.state.get(p, {})
        shaped = [k for k in run.table.slots if state.get(k) is not None]
        if shape != old and any(key in shaped for key in run.table.slots_of(group)):
            before = snapshot(run.ours)
            with pytest.raises((ValueError, RuntimeError)):
                run.ours.step()
            assert snapshot(run.ours) == before
        if rng.random() < 0.3 or kept.is_on(group) or any(map(kept.is_code, state.values())):
            run.ours.state.pop(p, None)
        else:
            for key in shaped:
                fresh = self.fresh_like(rng, key, shape, state[key].dtype)
                if rng.random() < 0.5:
                    state[key] = fresh
                else:
                    state[key].data = fresh
        run.step()
        self.backward(rng, p)
        run.step()

    @rule(rng=randoms)
    def swap_parameter(self, rng):
        run = self.run
        p = rng.choice(run.params)
        other = self.fresh_like(rng, "param", p.shape, p.dtype).requires_grad_(p.requires_grad)
        if isinstance(p, nn.Parameter):
            other = nn.Parameter(other, p.requires_grad)
        swap_tensors(p, other)
        self.backward(rng, p)
        run.step()
        if rng.random() < 0.7:
            swap_tensors(p, other)
            if rng.random() < 0.5:
                run.step()
            self.backward(rng, p)
            run.step()

    @rule(rng=randoms)
    def swap_tensor_of_state(self, rng):
        run = self.run
        found = [
            (state, key)
            for p in run.params
            for state in (run.ours.state.get(p, {}),)
            for key, value in state.items()
            if isinstance(value, Tensor) and value.layout is torch.strided
        ]
        if not found:
            return
        state, key = rng.choice(found)
        is_known = kept.is_code(state[key]) or "grad_avg" in state  # one goes with the other
        if key in run.table.slots and not is_known:
            other = self.fresh_like(rng, key, state[key].shape, state[key].dtype)
        else:
            other = state[key].clone()
        there_and_back = rng.random() < 0.5
        swap_tensors(state[key], other)
        run.step()
        if there_and_back:
            swap_tensors(state[key], other)
            run.step()

    @rule(rng=randoms)
    def storage_cut_short(self, rng):
        """An error, and nothing is written; then all of it is there again."""
        run = self.run
        found = []
        for group, p, _ in run.pairs():
            if p.grad is None or p.grad.is_sparse:
                continue
            state = run.ours.state.get(p, {})
            keys = [*run.table.slots_of(group), *kept.extras(group, p)]
            keys += [f"{key}_scale" for key in keys if kept.is_code(state.get(key))]
            keys += ["step"] * run.table.counts_steps
            found += [p, p.grad, *(state[key] for key in keys if key and key in state)]
        found = [
            tensor
            for tensor in found
            if isinstance(tensor, Tensor) and tensor.numel() and can_be_cut(tensor)
        ]
        if not found:
            return
        tensor = rng.choice(found)
        memory = tensor.untyped_storage()
        place, size, saved = memory.data_ptr(), memory.nbytes(), memory.clone()
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (tensor.storage_offset() + reach + 1) * tensor.element_size()
        others = [t for t in self.everything() if place_of(t) != place]
        before = [bits(t) for t in others]
        memory.resize_(rng.choice((0, rng.randrange(needed), needed - 1)))
        with pytest.raises((ValueError, RuntimeError), match="storage of"):
            run.ours.step()
        assert [bits(t) for t in others] == before
        memory.resize_(size)
        memory.copy_(saved)
        run.step()

    def everything(self) -> list[Tensor]:
        run = self.run
        values = [v for p in run.params for v in run.ours.state.get(p, {}).values()]
        values += [*run.params, *(p.grad for p in run.params)]
        return [v for v in values if isinstance(v, Tensor) and v.layout is torch.strided]

    @rule(rng=randoms)
    def one_count_of_steps(self, rng):
        """Which several parameters share, and count up one after the other."""
        counted = [s for p in self.run.params if "step" in (s := self.run.ours.state.get(p, {}))]
        if not counted:
            return
        count = rng.choice(counted)["step"]
        for state in counted:
            if rng.random() < 0.7:
                state["step"] = count
        for _ in range(2):
            self.run.step()
        if rng.random() < 0.5:
            for state in counted:
                state["step"] = state["step"].clone()

    @rule(rng=randoms)
    def not_dense_for_a_while(self, rng):
        """Afterwards the native side takes it again."""
        run = self.run
        group, p, twin = rng.choice(run.pairs())
        values = random_values(rng, p.shape, p.dtype)
        p.data = torch.stack((values, values), -1)[..., 0]
        self.backward(rng, p)
        run.step()
        state = run.ours.state[p] if run.ours.state.get(p) else {}
        dense = {"memory_format": torch.contiguous_format}
        p.data = p.detach().clone(**dense)
        for key in run.table.slots:
            if isinstance(state.get(key), Tensor) and not kept.is_code(state[key]):
                state[key] = state[key].clone(**dense)
        self.backward(rng, p)
        run.step()
        if fusedopt.backend.native is None or not self.is_ordinary(group, p):
            return
        self.backward(rng, p)
        run.step()
        assert next((g, i) for g, i, q in run.places() if q is twin) not in run.by_python

    def is_ordinary(self, group: dict[str, Any], p: Tensor) -> bool:
        """Whether there is nothing about it that the native side leaves to Python."""
        state = self.run.ours.state.get(p, {})
        slots = [state.get(key) for key in self.run.table.slots_of(group)]
        counts = [s["step"].data_ptr() for s in self.run.ours.state.values() if "step" in s]
        return (
            p.numel() > 0
            and type(state) is dict
            and len(set(counts)) == len(counts)
            and not (p.is_complex() or self.run.stored)
            and all(slot is not None and slot.dtype == p.dtype for slot in slots)
        )


def can_be_cut(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and not tensor._is_zerotensor()
        and tensor.untyped_storage().resizable()
    )
