"""Random programs, and random single steps, in lockstep with torch's for-loop.

``make fuzz N=5000`` runs 5,000 programs and a million single steps; without it a test run does 500
and 1,000. Inputs are fresh in every run: ``FUSEDOPT_TEST_SEED`` in the header repeats one, and a
failing program is printed in its shortest form, with the line that reproduces it.

The twin is torch's class with ``foreach=False`` in the dtype that fusedopt computes in (float32 for
the half types), and starts every step from the numbers that fusedopt starts it from. What they may
differ by follows from how far the twin's own result moves if its inputs are moved by a few
roundings, and from rounding once to the dtype that a tensor is stored in.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
from typing import Any

import pytest
import torch
from cases import GRAD_LAYOUTS, LAYOUTS, NAMES, Case, bits, snapshot
from conftest import SEED, require_kernels, require_native
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

import fusedopt
from fusedopt import storage

ASKED = os.environ.get("FUSEDOPT_FUZZ")
PROGRAMS = int(ASKED or 500)
SINGLE_STEPS = 200 * PROGRAMS if ASKED else 1000

HALF = (torch.bfloat16, torch.float16)
REAL = (torch.float32, torch.float64, *HALF)
COMPLEX = (torch.complex64, torch.complex128)
SPECIAL = (0.0, -0.0, 1e-42, -1e-38, 1e-20, 6e4, -1e15, 3e38, float("inf"), -float("inf"))
SPECIAL = (*SPECIAL, float("nan"))
# Rounding errors of one step, in units of the last place, that an input may stand for.
ROUNDINGS = 16


def opmath(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF else dtype


# Random choices -------------------------------------------------------------------------------


def random_case(rng: random.Random) -> Case:
    name = rng.choice(NAMES)
    chosen: dict[str, Any] = {
        "lr": rng.choice((0.1, 0.01, 1e-3, torch.tensor(0.05))),
        "weight_decay": rng.choice((0.0, 0.0, 0.1)),
        "maximize": rng.choice((False, False, True)),
    }
    if rng.random() < 0.2:
        chosen["l1"] = rng.choice((0.02, 0.3))
    if name == "SGD":
        chosen["momentum"] = rng.choice((0.0, 0.9, 0.3))
        chosen["nesterov"] = chosen["momentum"] > 0 and rng.random() < 0.5
        chosen["dampening"] = 0.0 if chosen["nesterov"] else rng.choice((0.0, 0.4))
    elif name in ("Adam", "AdamW"):
        chosen["betas"] = (rng.choice((0.9, 0.5, 0.3, 0.0)), rng.choice((0.999, 0.9, 0.5)))
        chosen["eps"] = rng.choice((1e-8, 1e-3, 1e-30))
        chosen["amsgrad"] = rng.random() < 0.4
        if name == "Adam":
            chosen["decoupled_weight_decay"] = rng.random() < 0.3
        if chosen.get("decoupled_weight_decay"):
            chosen.pop("l1", None)  # the oracle adds the penalty to the gradient
    elif name == "RMSprop":
        chosen["alpha"] = rng.choice((0.99, 0.9, 0.5))
        chosen["eps"] = rng.choice((1e-8, 1e-3))
        chosen["centered"] = rng.random() < 0.4
        chosen["momentum"] = rng.choice((0.0, 0.9))
        if "l1" not in chosen and rng.random() < 0.2:
            chosen |= {"eps_inside_sqrt": True, "eps": 1e-3}
    else:
        chosen["lr_decay"] = rng.choice((0.0, 0.1))
        chosen["initial_accumulator_value"] = rng.choice((0.0, 0.125))
    return Case(name, chosen)


def random_storage(rng: random.Random) -> dict[str, Any]:
    """Options beyond torch's; none of them half of the time."""
    if rng.random() < 0.5:
        return {}
    chosen: dict[str, Any] = {}
    if rng.random() < 0.6:
        dtypes = (torch.float32, torch.float32, *HALF, "8bit")
        chosen["state_dtype"] = rng.choice(dtypes)
    kind = rng.choice((None, "split", "fp32", "stochastic"))
    if kind == "stochastic":
        chosen["rounding"] = kind
    elif kind:
        chosen["master_weights"] = kind
    if rng.random() < 0.3:
        chosen["ema"] = rng.choice((0.0, 0.9, 0.99))
    return chosen


def random_shape(rng: random.Random) -> tuple[int, ...]:
    kind = rng.random()
    if kind < 0.7:
        return tuple(rng.randint(0, 5) for _ in range(4))
    return rng.choice(((), (1,), (7,), (33, 3), (4099,), (2, 3, 16, 47)))


def in_layout(
    layouts: dict[str, Any], rng: random.Random, values: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The values in a random layout, and the memory around them."""
    names = sorted(layouts) if values.dim() == 4 else ["contiguous"]
    if values.is_complex() and "odd_bytes" in names:
        names.remove("odd_bytes")  # torch's own copy_ crashes there
    return layouts[rng.choice(names)](values)


def random_values(rng: random.Random, shape: Any, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(31))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, dtype=wide, generator=generator).to(dtype)


def random_gradient(rng: random.Random, shape: Any, dtype: torch.dtype) -> Tensor:
    kind = rng.choice(("ordinary", "ordinary", "large", "zero", "tiny", "huge", "special"))
    values = random_values(rng, shape, dtype)
    if kind == "special":
        generator = torch.Generator().manual_seed(rng.getrandbits(31))
        table = torch.tensor([*SPECIAL, *[1.0] * 8], dtype=torch.float64).to(dtype)
        picked = table[torch.randint(len(table), tuple(shape), generator=generator)]
        return torch.where(picked == 1, values, picked)
    scale = {"ordinary": 1, "large": 1e4, "zero": 0, "tiny": 1e-23, "huge": 3e38}[kind]
    return (values.to(torch.complex128 if dtype.is_complex else torch.float64) * scale).to(dtype)


# The two optimizers ---------------------------------------------------------------------------


class Lockstep:
    """fusedopt's optimizer, and torch's beside it."""

    def __init__(self, rng: random.Random, case: Case, stored: dict[str, Any]):
        self.case, self.stored = case, stored
        self.around: list[tuple[Tensor, tuple]] = []
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
        return param.detach().requires_grad_(), twin.requires_grad_()

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

    # What the state says --------------------------------------------------------------------

    def numbers(self, group: dict[str, Any], param: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The parameter and the state of torch's rule that the next step starts from."""
        state = self.ours.state.get(param, {})
        dtype = opmath(param.dtype)
        value = param.detach().to(dtype, copy=True)
        master = storage.extras(group, param)[0]
        if master == "master_remainder" and master in state:
            value = storage.join(param.detach(), state[master])
        elif master == "master" and master in state:
            rounded = state[master].to(param.dtype)
            value = torch.where(rounded == param.detach(), state[master], value)
        rule = {}
        for key, slot in state.items():
            if key == "step":
                rule[key] = slot.clone()
            elif key in self.ours._all_slots and slot is not None:
                if storage.is_code(slot):
                    slot = storage.decode(slot, state[f"{key}_scale"])
                rule[key] = slot.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return value.contiguous(), rule

    @torch.no_grad()
    def follow(self) -> None:
        """Gives the twin the numbers of ours."""
        for group, p, q in self.pairs():
            value, state = self.numbers(group, p)
            q.copy_(value)
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
            if self.ours._has_step:
                state.setdefault("step", torch.tensor(0.0))
            for slot, key in enumerate(self.ours._slots(group)):
                if key not in state and self.case.name != "SGD":
                    initial = self.ours.defaults.get("initial_accumulator_value", 0.0)
                    initial = complex(initial, initial) if q.is_complex() else initial
                    state[key] = torch.full_like(q.detach(), initial)
                elif held.get(key) is not None and not self.ours._is_stored(group, p, key):
                    dtype = self.ours._state_dtype(group, p, key) or held[key].dtype
                    value = torch.empty_like(p, dtype=state[key].dtype).copy_(state[key]).detach()
                    if dtype.is_floating_point:
                        value = value.to(dtype)
                    else:
                        value = storage.decode(*storage.encode(value, dtype, 0, slot))
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
            top = torch.finfo(stored).max / 8
            grad = torch.where(grad.abs() > top, grad.sgn() * top, grad)
        if self.takes_sparse(group, p) and rng.random() < 0.2:
            grad = grad.nan_to_num(0).double().clamp(-1e30, 1e30).to(dtype).to_sparse()
        else:
            grad, _ = in_layout(GRAD_LAYOUTS, rng, grad)
        p.grad = None
        if hasattr(p, "grad_dtype"):  # torch 2.10 has it not, and takes any dtype
            p.grad_dtype = None
        p.grad = grad

    def takes_sparse(self, group: dict[str, Any], p: Tensor) -> bool:
        return (
            self.case.name in ("SGD", "Adagrad")
            and p.dim() > 0
            and p.dtype in (torch.float32, torch.float64)
            and not (self.stored or group.get("l1") or group["weight_decay"])
            and not group.get("momentum")
        )

    @torch.no_grad()
    def give_gradients(self) -> None:
        """The twin's gradients: those of ours, clipped by torch."""
        pairs = [(p, q) for _, p, q in self.pairs()]
        for p, q in pairs:
            if p.grad is None or p.grad.is_sparse:
                q.grad = None if p.grad is None else p.grad.to(q.dtype)
            else:
                q.grad = p.grad.to(q.dtype, copy=True, memory_format=torch.contiguous_format)
        max_norm = self.ours.max_grad_norm
        present = [p for p, _ in pairs if p.grad is not None]
        if max_norm is None or not present:
            return
        wide = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in present]
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
        groups, runs, states = [], [], {}
        for group in self.twin.param_groups:
            options = {k: v for k, v in group.items() if k != "params"}
            same: list[Tensor] = []
            faster: list[Tensor] = []
            for q in group["params"]:
                if q.grad is None:
                    continue
                unit = self.rounding(group, q)
                state = self.twin.state.get(q, {})
                for name in ("lr", "param", "grad", *(key for key in state if key != "step")):
                    moved = {"param": q.detach(), "grad": q.grad, **state}
                    if name != "lr":
                        # The norm that clips has the accuracy of float32.
                        clipped = name == "grad" and self.ours.max_grad_norm is not None
                        move = ROUNDINGS * (max(unit, 2.0**-23) if clipped else unit)
                        moved[name] = moved[name] * (1 + move)
                    if name in self.ours._all_slots:
                        moved[name] += 8 * smallest(q.dtype)
                    leaf = moved.pop("param").clone().requires_grad_()
                    leaf.grad = moved.pop("grad").clone()
                    if moved:
                        states[leaf] = {k: v.clone() for k, v in moved.items()}
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

    def step(self, closure: bool = False) -> None:
        """Steps both, and compares all that they wrote."""
        self.follow()
        self.complete()
        self.give_gradients()
        updated = [(g, p, q) for g, p, q in self.pairs() if p.grad is not None]
        untouched = [(p, bits(p)) for p in self.params if p.grad is None]
        grads = [(p.grad, bits(p.grad)) for _, p, _ in updated]
        averages = {p: self.average(g, p) for g, p, _ in updated}
        copied = self.copied() if self.stored.get("master_weights") == "split" else None
        witness, runs = self.witnesses() if updated else (None, [])
        result = self.ours.step(lambda: 3.5) if closure else self.ours.step()
        assert result == (3.5 if closure else None)
        self.twin.step()
        if witness:
            witness.step()
        for p, before in untouched:
            assert bits(p) == before, "a parameter without a gradient"
        for grad, before in grads:
            assert bits(grad) == before, "a gradient was written"
        if self.ours.max_grad_norm is not None and updated:
            torch.testing.assert_close(
                self.ours.grad_norm, self.norm.double(), rtol=1e-5, atol=1e-18, equal_nan=True
            )
        for group, p, q in updated:
            mine = [(leaf, unit) for target, leaf, unit in runs if target is q]
            self.compare(group, p, q, mine, witness, averages[p])
        if copied:
            self.compare_bits(*copied)

    def compare(self, group, p, q, runs, witness, average) -> None:
        state, other = self.ours.state.get(p, {}), self.twin.state.get(q, {})
        extras = storage.extras(group, p)
        where = f"{self.case}, {self.stored}, parameter {tuple(p.shape)}, {p.dtype}"
        known = {k for k, v in state.items() if v is not None} & {"step", *self.ours._all_slots}
        if not group.get("eps_inside_sqrt"):  # that oracle keeps what it does not need
            assert known == {k for k, v in other.items() if v is not None}, where
        unit = max(unit for _, unit in runs)
        moved = [leaf.detach() for leaf, _ in runs]
        spread = spread_of(q.detach(), moved)
        value = p.detach()
        if extras[0]:
            value, _ = self.numbers(group, p)
            if extras[0] == "master":
                value = state["master"]
                check_close(p.detach(), value, torch.zeros_like(value), unit, f"{where} of master")
        check_close(value, q.detach(), spread, unit, where, bool(extras[1]))
        if average is not None:
            weight = 1 - group["ema"]
            expected = average + weight * (q.detach() - average)
            size = real(average).abs() + real(q.detach()).abs()
            off = weight * spread + ROUNDINGS * unit * size
            check_close(state["ema"], expected, off, unit, f"{where}: ema")
        for slot, key in enumerate(self.ours._slots(group)):
            if key not in other:
                continue
            at = f"{where}: {key}"
            moved = [witness.state[leaf][key] for leaf, _ in runs]
            spread = spread_of(other[key], moved)
            if storage.is_code(state[key]):
                self.compare_codes(state, key, other, p, slot, at)
            else:
                check_close(state[key], other[key], spread, unit, at)
        if "step" in other:
            assert float(state["step"]) == float(other["step"]), where

    def compare_codes(self, state, key, other, p, slot, where) -> None:
        dense = torch.empty_like(state[key], dtype=torch.float32).copy_(other[key])
        step = float(other["step"]) if "step" in other else 0
        codes, scales = storage.encode(dense, state[key].dtype, step, slot)
        ok = scales.isfinite()
        torch.testing.assert_close(
            state[f"{key}_scale"][ok], scales[ok], rtol=1e-4, atol=1e-37, msg=where
        )
        flat = [storage._in_memory(t).int() for t in (state[key], codes)]
        near = (flat[0] - flat[1]).abs() <= 1
        blocks = ok.repeat_interleave(storage.SCALE_ELEMENTS)[: len(near)]
        assert (near | ~blocks).all(), where

    def average(self, group: dict[str, Any], p: Tensor) -> Tensor | None:
        """The average before the step, which starts as the parameter."""
        if group.get("ema") is None:
            return None
        kept = self.ours.state.get(p, {}).get("ema")
        # A new average starts as the parameter that is seen, not as its master.
        return (p.detach() if kept is None else kept).to(opmath(p.dtype), copy=True).contiguous()

    # Exact masters --------------------------------------------------------------------------

    def copied(self) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        """The same optimizer over float32 copies of the masters."""
        pairs, groups, states = [], [], {}
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
                kept = {
                    k: v.clone()
                    for k, v in state.items()
                    if isinstance(v, Tensor) and k not in storage.EXTRAS
                }
                if "ema" in state:
                    kept["ema"] = state["ema"].clone()
                if kept:
                    states[leaf] = kept
                leaves.append(leaf)
                pairs.append((p, leaf))
            options = {k: v for k, v in group.items() if k not in ("params", "master_weights")}
            options.setdefault("state_dtype", torch.bfloat16)
            groups.append({**options, "params": leaves})
        other = self.case.ours(groups, max_grad_norm=self.ours.max_grad_norm)
        other.state.clear()
        other.state.update(states)
        record_python_steps(other)
        record_python_steps(self.ours)
        other.step()
        return other, pairs

    def compare_bits(self, other, pairs) -> None:
        by_python = [vars(opt).pop("_python_step").seen for opt in (self.ours, other)]
        places = [
            (g, i)
            for g, group in enumerate(other.param_groups)
            for i in range(len(group["params"]))
        ]
        for (g, i), (p, leaf) in zip(places, pairs, strict=True):
            group = self.ours.param_groups[g]
            # One of them may take the Python rule alone, because of its memory.
            if p.grad is None or len({(g, i) in seen for seen in by_python}) > 1:
                continue
            state, keys = self.ours.state[p], self.ours._slots(group)
            if not group.get("state_dtype") and any(state[k].dtype != p.dtype for k in keys):
                continue  # loaded, or swapped
            master = storage.join(p.detach(), state["master_remainder"])
            assert same_numbers(master, leaf.detach()), (self.case, self.stored)
            for key in keys:
                for name in (key, f"{key}_scale", "ema"):
                    assert (name in state) == (name in other.state[leaf]), name
                    if name in state:
                        assert same_numbers(state[name], other.state[leaf][name]), name


def record_python_steps(opt: Any) -> None:
    rule = opt._python_step

    def record(g, i, *rest):
        record.seen.add((g, i))
        rule(g, i, *rest)

    record.seen = set()
    opt._python_step = record


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for the payload of NaNs."""
    (shape, dtype, _, raw), (of_shape, of_dtype, _, of_raw) = (
        bits(t.masked_fill(t.isnan(), 7.5)) for t in (a, b)
    )
    return (shape, dtype, raw) == (of_shape, of_dtype, of_raw)


def smallest(dtype: torch.dtype) -> float:
    """The smallest number above zero."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def spread_of(exact: Tensor, moved: list[Tensor]) -> Tensor:
    """How far the moved results are from the exact one, together; NaN or infinite where they are
    of another kind."""
    exact = real(exact)
    total = torch.zeros_like(exact)
    for result in map(real, moved):
        same = (result == exact) | (result.isnan() & exact.isnan())
        total += torch.where(same, torch.zeros_like(exact), (result - exact).abs())
    return total


def check_close(
    ours: Tensor, exact: Tensor, spread: Tensor, unit: float, where: str, at_random: bool = False
) -> None:
    assert ours.shape == exact.shape, where
    ours, exact = real(ours), real(exact)
    info, wide = torch.finfo(ours.dtype), torch.finfo(exact.dtype)
    size = torch.where(exact.isfinite(), exact.abs(), 0)
    bound = spread + ROUNDINGS / 2 * unit * size + 16 * smallest(exact.dtype)
    limit = size + bound >= info.max
    if info.eps > wide.eps:
        last_place = 1.0 if at_random else 0.5
        bound = bound + last_place * (info.eps * (size + bound) + smallest(ours.dtype))
    got = ours.to(exact.dtype)
    fine = (got - exact).abs() <= bound
    fine |= got == exact.to(ours.dtype).to(exact.dtype)
    fine |= got.isnan() & exact.isnan()
    fine |= limit & got.isinf() & (got.sign() == exact.sign())
    fine |= ~spread.isfinite()
    if not fine.all():
        at = (~fine).nonzero()[0]
        at = tuple(at.tolist())
        raise AssertionError(
            f"{where}: {int((~fine).sum())} of {fine.numel()} elements differ, at {at} "
            f"{got[at].item()!r} instead of {exact[at].item()!r} ± {bound[at].item():.3g}"
        )


# Backends -------------------------------------------------------------------------------------

BACKENDS = {
    "python": lambda: None,
    "native": lambda: NATIVE,
    "kernels": require_kernels,
}
NATIVE = fusedopt.backend.native


def choose_backend(rng: random.Random) -> None:
    fusedopt.backend.native = BACKENDS[rng.choice(("native", "native", "kernels", "python"))]()


@pytest.fixture(autouse=True)
def keep_backend():
    yield
    fusedopt.backend.native = NATIVE


# Programs -------------------------------------------------------------------------------------

# Not st.randoms: it prefers small numbers, and most parameters would have no gradient.
randoms = st.builds(random.Random, st.integers(0, 2**32))
SCHEDULERS = (
    lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
)


@seed(SEED)
class Programs(RuleBasedStateMachine):
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
        present = [p for p in self.run.params if p.grad is not None and not p.grad.is_sparse]
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
        kept = [p for p in self.run.params if ours.state.get(p)]
        if not kept:
            return
        p = rng.choice(kept)
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
            slots = [k for k in ours._all_slots if state.get(k) is not None]
            key = rng.choice([k for k in slots if not storage.is_code(state[k])] or ["note"])
            value = state.get(key)
            if not isinstance(value, Tensor):
                state[key] = "of the program"
                return
            if value.layout is not torch.strided:
                return
            if rng.random() < 0.3 and not value.is_complex():
                value = value.to(rng.choice(REAL))
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
            "maximize": (True, False),
            "amsgrad": (True, False),
            "centered": (True, False),
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
        saved = torch.load(file, weights_only=True)
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
                assert same_numbers(run.twin.state[q][key], value), key
        for group, other in zip(run.ours.param_groups, run.twin.param_groups, strict=True):
            for name in run.twin.defaults:
                assert str(group[name]) == str(other[name]), name


def test_programs():
    require_native()
    run_state_machine_as_test(
        Programs,
        settings=settings(
            max_examples=PROGRAMS,
            stateful_step_count=12,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


# Single steps ---------------------------------------------------------------------------------


def single_step(number: int) -> None:
    """One step, from nothing or from a state that nobody has trained."""
    rng = random.Random(number)
    choose_backend(rng)
    run = Lockstep(rng, random_case(rng), random_storage(rng))
    if rng.random() < 0.3:
        run.ours.max_grad_norm = rng.choice((0.1, 1.0, 100.0))
    if rng.random() < 0.7:
        for p in run.params:
            p.grad = torch.ones_like(p)
        run.ours.step()
        for p in run.params:
            for key, value in run.ours.state.get(p, {}).items():
                if key == "step":
                    value.fill_(rng.choice((0, 1, 2, 30, 1000, 10**6)))
                elif key in run.ours._all_slots and not storage.is_code(value):
                    fresh = random_values(rng, p.shape, value.dtype)
                    if key in run.ours._unsigned_slots:
                        fresh = (fresh.abs() if not fresh.is_complex() else fresh) + 1
                    value.copy_(fresh)
    run.set_gradients(rng)
    run.step()
    for memory, before in run.around:
        assert bits(memory) == before, "memory beside a parameter was written"


def test_single_steps():
    require_native()
    for number in range(SEED, SEED + SINGLE_STEPS):
        try:
            single_step(number)
        except Exception as error:
            raise AssertionError(f"single_step({number})") from error
