"""fusedopt's optimizer, and torch's beside it.

The twin is torch's class with ``foreach=False`` in the dtype that fusedopt computes in (float32 for
the half types), and starts every step from the numbers that fusedopt starts it from. What they may
differ by follows from how far the twin's own result moves if its inputs are moved by a few
roundings, and from rounding once to the dtype that a tensor is stored in.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import seam
import torch
from cases import GRAD_LAYOUTS, LAYOUTS, SCALARS, Case, bits
from torch import Tensor, nn

from . import kept
from .choices import (
    COMPLEX,
    REAL,
    in_layout,
    opmath,
    random_gradient,
    random_shape,
    random_values,
)
from .closeness import ROUNDINGS, check_close, real, same_numbers, smallest, spread_of

Mode = Callable[[], contextlib.AbstractContextManager[Any]]


class Lockstep:
    """fusedopt's optimizer, and torch's beside it."""

    def __init__(self, rng: random.Random, case: Case, stored: dict[str, Any]):
        self.case, self.table, self.stored = case, case.table, stored
        self.around: list[tuple[Tensor, tuple]] = []
        # Gradients that lie inside of another parameter: which, in the other, and where in it.
        self.inside: dict[Tensor, tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]] = {}
        # Whether parameters read or write what others write.
        self.is_entangled = False
        # Which parameters took the Python rule in the last step: group and index.
        self.by_python: list[tuple[int, int]] = []
        if stored.get("master_weights") == "split" or stored.get("rounding"):
            self.dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
        elif set(case.options) & {"l1", "eps_inside_sqrt"}:
            self.dtypes = REAL
        else:
            self.dtypes = (*REAL, *REAL, *COMPLEX)
        pairs = [self.new_pair(rng) for _ in range(rng.randint(1, 4))]
        cut = rng.randint(1, len(pairs))
        other = self.random_options(rng) if cut < len(pairs) else {}

        def groups(which: int) -> list[dict[str, Any]]:
            lists = [pair[which] for pair in pairs[:cut]], [pair[which] for pair in pairs[cut:]]
            return [{"params": lists[0]}, {"params": lists[1], **copy.deepcopy(other)}]

        self.ours = case.ours(groups(0), **stored)
        self.twin = case.stock(groups(1))
        self.follow()

    def new_pair(self, rng: random.Random) -> tuple[Tensor, Tensor]:
        values = random_values(rng, random_shape(rng), rng.choice(self.dtypes))
        param, around = in_layout(LAYOUTS, rng, values)
        self.around += [(memory, bits(memory)) for memory in around]
        twin = values.to(opmath(values.dtype)).clone().contiguous()
        param = param.detach()
        param = nn.Parameter(param) if rng.random() < 0.5 else param.requires_grad_()
        return param, twin.requires_grad_()

    def random_options(self, rng: random.Random) -> dict[str, Any]:
        return {
            "lr": rng.choice((0.2, 0.02)),
            "weight_decay": rng.choice((0.0, 0.2)),
            "maximize": rng.random() < 0.5,
        }

    @property
    def params(self) -> list[Tensor]:
        return [p for group in self.ours.param_groups for p in group["params"]]

    def pairs(self) -> list[tuple[dict[str, Any], Tensor, Tensor]]:
        return [
            (group, p, q)
            for group, other in zip(self.ours.param_groups, self.twin.param_groups, strict=True)
            for p, q in zip(group["params"], other["params"], strict=True)
        ]

    def places(self) -> list[tuple[int, int, Tensor]]:
        """Of the twin's parameters, in the order in which the loop takes them."""
        return [
            (g, i, q)
            for g, group in enumerate(self.twin.param_groups)
            for i, q in enumerate(group["params"])
        ]

    def counted_before(self) -> dict[Tensor, int]:
        """How often the count of each of the twin's parameters is counted up before its turn."""
        seen: Counter[int] = Counter()
        before = {}
        for _, _, q in self.places():
            if q.grad is not None:
                count = self.twin.state.get(q, {}).get("step")
                before[q] = 0 if count is None else seen[id(count)]
                seen[id(count)] += 1
        return before

    # What the state says --------------------------------------------------------------------

    def numbers(self, group: dict[str, Any], param: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The parameter and the state of torch's rule that the next step starts from."""
        state = self.ours.state.get(param, {})
        dtype = opmath(param.dtype)
        value = param.detach().to(dtype, copy=True)
        master = kept.master(group, param)
        if master == "master_remainder" and master in state:
            value = kept.join(param.detach(), state[master])
        elif master == "master" and master in state:
            rounded = state[master].to(param.dtype)
            value = torch.where(rounded == param.detach(), state[master], value)
        rule = {}
        for key, slot in state.items():
            if key in SCALARS:
                rule[key] = slot.clone()
            elif key in self.table.slots and slot is not None:
                if kept.is_code(slot):
                    slot = kept.decode(slot, state[f"{key}_scale"])
                rule[key] = slot.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return value.contiguous(), rule

    @torch.no_grad()
    def follow(self) -> None:
        """Gives the twin the numbers of ours, and one count of steps where ours has one."""
        counts: dict[int, Tensor] = {}
        for group, p, q in self.pairs():
            value, state = self.numbers(group, p)
            q.copy_(value)
            if "step" in state:
                place = self.ours.state[p]["step"].data_ptr()
                state["step"] = counts.setdefault(place, state["step"])
            self.twin.state.pop(q, None)
            if state:
                self.twin.state[q] = state

    def complete(self) -> None:
        """What fusedopt does to the state before it steps and torch does not do: it adds what an
        option needs that was switched on later, and stores all as the options say."""
        for group, p, q in self.pairs():
            state = self.twin.state.get(q)
            if not state or p.grad is None or p.grad.is_sparse:
                continue
            held = self.ours.state[p]
            if self.table.counts_steps:
                state.setdefault("step", torch.tensor(0.0))
            for slot, key in enumerate(self.table.slots_of(group)):
                if key not in state and self.table.counts_steps:
                    initial = self.ours.defaults.get("initial_accumulator_value", 0.0)
                    initial = complex(initial, initial) if q.is_complex() else initial
                    state[key] = torch.full_like(q.detach(), initial)
                elif held.get(key) is not None and not kept.is_kept(
                    self.table, group, p, key, held[key]
                ):
                    dtype = kept.dtype_of(self.table, group, p, key) or held[key].dtype
                    value = torch.empty_like(p, dtype=state[key].dtype).copy_(state[key]).detach()
                    if dtype.is_floating_point:
                        value = value.to(dtype)
                    else:
                        value = kept.decode(*kept.encode(value, dtype, 0, slot))
                    state[key].copy_(value)

    # One step -------------------------------------------------------------------------------

    def set_gradients(self, rng: random.Random) -> None:
        for group, p, _ in self.pairs():
            kind = rng.random()
            if kind < 0.15:
                p.grad = None
            elif kind < 0.25 and p.grad is not None:
                continue
            else:
                self.set_gradient(rng, group, p)

    def set_gradient(self, rng: random.Random, group: dict[str, Any], p: Tensor) -> None:
        dtype = p.dtype
        if rng.random() < 0.2:
            dtype = rng.choice(COMPLEX if p.is_complex() else REAL)
        grad = random_gradient(rng, p.shape, dtype)
        if group.get("eps_inside_sqrt"):
            grad = grad.nan_to_num(1.0, 1.0, 1.0)  # an oracle for numbers only
        if p.is_complex():  # torch multiplies infinities as complex numbers, fusedopt their parts
            grad = torch.where(grad.abs() < 1e5, grad, 1.0)
        elif group.get("centered") and opmath(p.dtype) == torch.float32:
            # Minus the square of an average that was rounded to infinity, torch's variance is NaN.
            stored = group.get("state_dtype")
            stored = stored if isinstance(stored, torch.dtype) else p.dtype
            held = (self.ours.state.get(p, {}).get(key) for key in self.table.slots)
            stored = [stored, *(slot.dtype for slot in held if slot is not None)]
            top = min(torch.finfo(d).max for d in stored if d.is_floating_point) / 8
            grad = torch.where(grad.abs() > top, grad.sgn() * top, grad)
        kind = rng.random()
        if self.takes_sparse(group, p) and kind < 0.2:
            grad = grad.nan_to_num(0).double().clamp(-1e30, 1e30).to(dtype).to_sparse()
        elif kind < 0.24:
            grad = torch._efficientzerotensor(p.shape, dtype=dtype)
        else:
            grad, _ = in_layout(GRAD_LAYOUTS, rng, grad)
            if kind > 0.94:
                grad = torch._neg_view(grad)
            if p.is_complex() and kind > 0.9:
                grad = grad.conj()
        self.give(p, grad)

    def give(self, p: Tensor, grad: Tensor) -> None:
        p.grad = None
        if hasattr(p, "grad_dtype"):  # torch 2.10 has it not, and takes any dtype
            p.grad_dtype = None
        p.grad = grad

    def takes_sparse(self, group: dict[str, Any], p: Tensor) -> bool:
        return (
            self.table.takes_sparse
            and p.dim() > 0
            and p.dtype in (torch.float32, torch.float64)
            and not (self.stored or group.get("l1") or group["weight_decay"])
            and not group.get("momentum")
        )

    @torch.no_grad()
    def give_gradients(self) -> None:
        """The twin's gradients: those of ours, clipped by torch."""
        pairs = [(p, q) for _, p, q in self.pairs()]
        twin_of = dict(pairs)
        for p, q in pairs:
            grad = None if p.grad is None else with_memory(p.grad)
            if p in self.inside and p.grad is self.inside[p][0]:
                _, other, part = self.inside[p]
                grad = part(twin_of[other].detach())
            elif grad is not None and not grad.is_sparse:
                grad = grad.to(q.dtype, copy=True, memory_format=torch.contiguous_format)
            q.grad = grad if grad is None else grad.to(q.dtype)
        max_norm = self.ours.max_grad_norm
        present = [with_memory(p.grad) for p, _ in pairs if p.grad is not None]
        if max_norm is None or not present:
            return
        wide = [grad.coalesce().values() if grad.is_sparse else grad for grad in present]
        wide = [g.to(torch.complex128 if g.is_complex() else torch.float64) for g in wide]
        self.norm = torch.nn.utils.get_total_norm(wide)
        if 1e18 < self.norm < float("inf"):
            # The squares leave float32: infinite here, and in torch for some dtypes.
            self.ours.max_grad_norm = None
            return
        dense = [q for _, q in pairs if q.grad is not None and not q.grad.is_sparse]
        torch.nn.utils.clip_grads_with_norm_(dense, max_norm, self.norm, foreach=False)
        factor = (max_norm / (self.norm + 1e-6)).clamp(max=1)
        for _, q in pairs:
            if q.grad is not None and q.grad.is_sparse:
                q.grad = q.grad * factor

    def rounding(self, group: dict[str, Any], q: Tensor) -> float:
        """The relative error of one operation. With a tensor among the options torch computes
        with it in float32."""
        options = [*group.values(), *group.get("betas", ())]
        single = any(isinstance(value, Tensor) for value in options)
        return torch.finfo(torch.float32 if single else q.dtype).eps

    def witnesses(self) -> tuple[Any, list[tuple[Tensor, Tensor, float]]]:
        """Steps of torch's from inputs moved by some roundings, one input at a time."""
        if self.is_entangled:
            return self.entangled_witnesses()
        groups, runs, states = [], [], {}
        ahead = self.counted_before()
        for group in self.twin.param_groups:
            options = {k: v for k, v in group.items() if k != "params"}
            same: list[Tensor] = []
            faster: list[Tensor] = []
            for q in group["params"]:
                if q.grad is None:
                    continue
                unit = self.rounding(group, q)
                state = self.twin.state.get(q, {})
                for name in ("lr", "param", "grad", *(key for key in state if key not in SCALARS)):
                    moved = {"param": q.detach(), "grad": q.grad, **state}
                    if name != "lr":
                        # The norm that clips has the accuracy of float32.
                        clipped = name == "grad" and self.ours.max_grad_norm is not None
                        move = ROUNDINGS * (max(unit, 2.0**-23) if clipped else unit)
                        moved[name] = moved[name] * (1 + move)
                    if name in self.table.slots:
                        moved[name] += 8 * smallest(q.dtype)
                    leaf = moved.pop("param").clone().requires_grad_()
                    leaf.grad = moved.pop("grad").clone()
                    if moved:
                        states[leaf] = {k: v.clone() for k, v in moved.items()}
                        if "step" in moved:
                            states[leaf]["step"] += ahead[q]
                    (faster if name == "lr" else same).append(leaf)
                    runs.append((q, leaf, unit))
            lr = options["lr"]
            groups += [
                {"params": same, **options},
                {"params": faster, **options, "lr": lr * (1 + ROUNDINGS * 2.0**-23)},
            ]
        witness = self.case.stock(groups)
        for leaf, state in states.items():
            witness.state[leaf] = state
        return witness, runs

    def entangled_witnesses(self) -> tuple[Any, list[tuple[Tensor, Tensor, float]]]:
        """One copy of all of the twin for each input that is moved."""
        runs, states = [], {}
        places = [(g, i) for g, i, q in self.places() if q.grad is not None]
        memory = {place_of(q) for _, _, q in self.places()}
        for g, i in places:
            q = self.twin.param_groups[g]["params"][i]
            unit = self.rounding(self.twin.param_groups[g], q)
            names = ["lr", "param", *(k for k in self.twin.state.get(q, {}) if k not in SCALARS)]
            if place_of(q.grad) not in memory:
                names.append("grad")
            for name in names:
                twin = copy.deepcopy(self.twin)
                group = twin.param_groups[g]
                leaf = group["params"][i]
                if name == "lr":
                    group["lr"] = group["lr"] * (1 + ROUNDINGS * 2.0**-23)
                else:
                    inputs = {"param": leaf.detach(), "grad": leaf.grad, **twin.state.get(leaf, {})}
                    inputs[name].mul_(1 + ROUNDINGS * unit)
                    if name in self.table.slots:
                        inputs[name].add_(8 * smallest(q.dtype))
                twin.step()
                for a, b in places:
                    moved = twin.param_groups[a]["params"][b]
                    runs.append((self.twin.param_groups[a]["params"][b], moved, unit))
                    states[moved] = twin.state.get(moved, {})
        return SimpleNamespace(step=lambda: None, state=states), runs

    def step(
        self,
        closure: bool = False,
        ours_in: Mode = contextlib.nullcontext,
        both_in: Mode = contextlib.nullcontext,
    ) -> None:
        """Steps both, and compares all that they wrote."""
        self.follow()
        self.complete()
        self.give_gradients()
        updated = [(g, p, q) for g, p, q in self.pairs() if p.grad is not None]
        untouched = [(p, bits(p)) for p in self.params if p.grad is None]
        written = {place_of(p) for p in self.params if p.numel()}
        grads = [
            (p.grad, bits(with_memory(p.grad)))
            for _, p, _ in updated
            if place_of(p.grad) not in written
        ]
        ahead = self.counted_before()
        counts = {q: 1 + ahead[q] + float(self.twin.state.get(q, {}).get("step", 0)) for q in ahead}
        averages = {p: self.average(g, p) for g, p, _ in updated}
        with both_in():
            copied = self.copied() if self.stored.get("master_weights") == "split" else None
            witness, runs = self.witnesses() if updated else (None, [])
            with ours_in(), seam.python_steps(self.ours) as self.by_python:
                result = self.ours.step(lambda: 3.5) if closure else self.ours.step()
            assert result == (3.5 if closure else None)
            self.twin.step()
            if witness:
                witness.step()
        for p, before in untouched:
            assert bits(p) == before, "a parameter without a gradient"
        for grad, before in grads:
            assert bits(with_memory(grad)) == before, "a gradient was written"
        if self.ours.max_grad_norm is not None and updated:
            torch.testing.assert_close(
                self.ours.grad_norm, self.norm.double(), rtol=1e-5, atol=1e-18, equal_nan=True
            )
        for group, p, q in updated:
            mine = [(leaf, unit) for target, leaf, unit in runs if target is q]
            self.compare(group, p, q, mine, witness, averages[p], counts[q])
        if copied:
            self.compare_bits(*copied)

    def compare(self, group, p, q, runs, witness, average, count) -> None:
        state, other = self.ours.state.get(p, {}), self.twin.state.get(q, {})
        master = kept.master(group, p)
        where = f"{self.case}, {self.stored}, parameter {tuple(p.shape)}, {p.dtype}"
        known = {k for k, v in state.items() if v is not None} & {*SCALARS, *self.table.slots}
        if not group.get("eps_inside_sqrt"):  # that oracle keeps what it does not need
            assert known == {k for k, v in other.items() if v is not None}, where
        unit = max(unit for _, unit in runs)
        moved = [leaf.detach() for leaf, _ in runs]
        spread = spread_of(q.detach(), moved)
        value = p.detach()
        if master:
            value, _ = self.numbers(group, p)
            if master == "master":
                value = state["master"]
                check_close(p.detach(), value, torch.zeros_like(value), unit, f"{where} of master")
        check_close(value, q.detach(), spread, unit, where, kept.is_rounded_at_random(group, p))
        if average is not None and not self.is_entangled:
            weight = 1 - group["ema"]
            expected = average + weight * (q.detach() - average)
            size = real(average).abs() + real(q.detach()).abs()
            off = weight * spread + ROUNDINGS * unit * size
            check_close(state["ema"], expected, off, unit, f"{where}: ema")
        for slot, key in enumerate(self.table.slots_of(group)):
            if key not in other:
                continue
            at = f"{where}: {key}"
            moved = [witness.state[leaf][key] for leaf, _ in runs]
            spread = spread_of(other[key], moved)
            if kept.is_code(state[key]):
                self.compare_codes(state, key, other, p, slot, count, at)
            else:
                check_close(state[key], other[key], spread, unit, at)
        if "step" in other:
            assert float(state["step"]) == float(other["step"]), where

    def compare_codes(self, state, key, other, p, slot, count, where) -> None:
        dense = torch.empty_like(state[key], dtype=torch.float32).copy_(other[key])
        step = count if "step" in other else 0
        codes, scales = kept.encode(dense, state[key].dtype, step, slot)
        ok = scales.isfinite()
        torch.testing.assert_close(
            state[f"{key}_scale"][ok], scales[ok], rtol=1e-4, atol=1e-37, msg=where
        )
        flat = [kept.in_memory(t).int() for t in (state[key], codes)]
        near = (flat[0] - flat[1]).abs() <= 1
        blocks = ok.repeat_interleave(kept.ELEMENTS_OF_A_SCALE)[: len(near)]
        assert (near | ~blocks).all(), where

    def average(self, group: dict[str, Any], p: Tensor) -> Tensor | None:
        """The average before the step, which starts as the parameter."""
        if group.get("ema") is None:
            return None
        ema = self.ours.state.get(p, {}).get("ema")
        # A new average starts as the parameter that is seen, not as its master.
        return (p.detach() if ema is None else ema).to(opmath(p.dtype), copy=True).contiguous()

    # Exact masters --------------------------------------------------------------------------

    def copied(self) -> tuple[Any, list[tuple[Tensor, Tensor]], list[tuple[int, int]]]:
        """The same optimizer over float32 copies of the masters."""
        pairs, groups, states = [], [], {}
        counts: dict[int, Tensor] = {}
        for group in self.ours.param_groups:
            leaves = []
            for p in group["params"]:
                leaf = torch.empty_like(p, dtype=torch.float32)
                leaf.data.copy_(self.numbers(group, p)[0])
                leaf.requires_grad_()
                if hasattr(leaf, "grad_dtype"):
                    leaf.grad_dtype = None
                leaf.grad = p.grad
                state = self.ours.state.get(p, {})
                copies = {
                    k: v.clone()
                    for k, v in state.items()
                    if isinstance(v, Tensor) and k not in kept.EXTRAS
                }
                if "step" in copies:
                    copies["step"] = counts.setdefault(state["step"].data_ptr(), copies["step"])
                if "ema" in state:
                    copies["ema"] = state["ema"].clone()
                if copies:
                    states[leaf] = copies
                leaves.append(leaf)
                pairs.append((p, leaf))
            options = {k: group[k] for k in group if k not in ("params", "master_weights")}
            options.setdefault("state_dtype", torch.bfloat16)
            groups.append({**options, "params": leaves})
        other = self.case.ours(groups, max_grad_norm=self.ours.max_grad_norm)
        other.state.clear()
        other.state.update(states)
        with seam.python_steps(other) as by_python:
            other.step()
        return other, pairs, by_python

    def compare_bits(self, other, pairs, by_python) -> None:
        places = [
            (g, i)
            for g, group in enumerate(other.param_groups)
            for i in range(len(group["params"]))
        ]
        for (g, i), (p, leaf) in zip(places, pairs, strict=True):
            group = self.ours.param_groups[g]
            # One of them may take the Python rule alone, because of its memory.
            if p.grad is None or ((g, i) in by_python) != ((g, i) in self.by_python):
                continue
            state, keys = self.ours.state[p], self.table.slots_of(group)
            if not group.get("state_dtype") and any(state[k].dtype != p.dtype for k in keys):
                continue  # loaded, or swapped
            master = kept.join(p.detach(), state["master_remainder"])
            assert same_numbers(master, leaf.detach()), (self.case, self.stored)
            for key in keys:
                for name in (key, f"{key}_scale", "ema"):
                    assert (name in state) == (name in other.state[leaf]), name
                    if name in state:
                        assert same_numbers(state[name], other.state[leaf][name]), name


def place_of(tensor: Tensor) -> int | None:
    """Where its storage begins; None if it has none."""
    if tensor.layout is not torch.strided or tensor._is_zerotensor():
        return None
    return tensor.untyped_storage().data_ptr()


def with_memory(grad: Tensor) -> Tensor:
    """What can be read as bytes: neither a zero without memory nor negated when it is read."""
    if grad.layout is torch.strided and grad._is_zerotensor():
        return torch.zeros(grad.shape, dtype=grad.dtype)
    return grad.resolve_neg()
