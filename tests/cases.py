"""The optimizer cases, the layouts, and the runner that the tests cross them with."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizers import Table
from torch import Tensor, nn

import fusedopt

TABLES = {
    table.name: table
    for path in sorted((Path(__file__).parent / "optimizers").glob("[a-z]*.py"))
    for table in (importlib.import_module(f"optimizers.{path.stem}").TABLE,)
}
NAMES = tuple(TABLES)
# Those of classes that torch has too.
TORCH_NAMES = tuple(name for name, table in TABLES.items() if table.published is None)
# State that is a number of each parameter.
SCALARS = ("step", "mu_product")
# Options that torch.optim does not have; the oracle adds them by hand.
EXTRAS = ("l1", *(option for table in TABLES.values() for option in table.extras))


@dataclass(frozen=True, eq=False)
class Case:
    name: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])

    @property
    def table(self) -> Table:
        return TABLES[self.name]

    def ours(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        return getattr(fusedopt, self.name)(params, **{**copy.deepcopy(self.options), **more})

    def stock(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        """torch's for-loop, with the options that it lacks added around or inside it."""
        options = {k: v for k, v in copy.deepcopy(self.options).items() if k not in EXTRAS}
        cls = self.table.oracle(self.options) or self.table.stock
        opt = cls(params, **{"foreach": False, **options, **more})
        if l1 := self.options.get("l1"):
            add_l1(opt, l1, self.table.is_decoupled)
        return opt

    def exact(self, params: Any) -> torch.optim.Optimizer:
        """The for-loop for float64 runs. torch would compute with a float32 lr in float32."""
        numbers = {
            key: tuple(map(float, value)) if key == "betas" else float(value)
            for key, value in self.options.items()
            if key == "betas" or isinstance(value, Tensor)
        }
        return Case(self.name, {**self.options, **numbers}).stock(params)


CASES = [Case(name, options) for name, table in TABLES.items() for options in table.cases]
# torch has no complex rule to compare the extra options with.
COMPLEX_CASES = [case for case in CASES if not set(case.options) & set(EXTRAS)]
# The case of each class that keeps the most state, and those of all kinds of classes.
RICHEST_OF = {name: Case(name, table.richest) for name, table in TABLES.items()}
RICHEST = [case for case in RICHEST_OF.values() if case.table.like is None]
COUNTING = [case for case in RICHEST if case.table.counts_steps]
# A case for each rule, and for each number and meaning of state tensors: for each loop.
LOOPS = [
    *RICHEST_OF.values(),
    Case("SGD", {"lr": 0.1}),
    Case("AdamW", {"lr": 0.1}),
    Case("RMSprop", {"lr": 0.05}),
    Case("RMSprop", {"lr": 0.05, "momentum": 0.9}),
    Case("RMSprop", {"lr": 0.05, "centered": True, "alpha": 0.9}),
]
# One for each class that can do without any state.
STATELESS = [
    Case(name, {"lr": 0.1})
    for name, table in TABLES.items()
    if not table.counts_steps and not table.slots_of({})
]
SPARSE = [name for name, table in TABLES.items() if table.takes_sparse]


def those_with(option: str) -> list[str]:
    """The classes of which torch's has this option."""
    return [
        name
        for name, table in TABLES.items()
        if option in inspect.signature(table.stock).parameters
    ]


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

every_torch_name = pytest.mark.parametrize("name", TORCH_NAMES)
every_name = pytest.mark.parametrize("name", NAMES)
every_sparse = pytest.mark.parametrize("name", SPARSE)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_loop = pytest.mark.parametrize("case", LOOPS, ids=str)
# Every case in float32, and every loop in the other dtypes: what an option does is in the rule.
every_case_or_dtype = pytest.mark.parametrize(
    ("case", "dtype"),
    [*product(CASES, [torch.float32]), *product(LOOPS, DTYPES[1:])],
    ids=str,
)
richest = pytest.mark.parametrize("case", RICHEST, ids=lambda case: case.name)
richest_of_every_class = pytest.mark.parametrize("case", RICHEST_OF.values(), ids=str)
richest_by_options = pytest.mark.parametrize("case", RICHEST, ids=str)
richest_and_stateless = pytest.mark.parametrize("case", [*RICHEST, *STATELESS], ids=str)
counting = pytest.mark.parametrize("case", COUNTING, ids=lambda case: case.name)
# Every kind of class natively, and one on the other backends, for tests of what neither changes.
each_class_or_backend = pytest.mark.parametrize(
    ("backend", "case"),
    [
        *(("native", case) for case in RICHEST),
        *((backend, RICHEST_OF["AdamW"]) for backend in ("python", "kernels")),
    ],
    indirect=["backend"],
    ids=lambda value: getattr(value, "name", None),
)

# (rtol, atol) against an exact run of a few steps on values around 1.
TOLERANCE = {
    torch.float64: (1e-10, 1e-12),
    torch.float32: (1e-4, 1e-5),
    torch.bfloat16: (6e-2, 3e-2),
    torch.float16: (1e-2, 4e-3),
    torch.complex64: (1e-4, 1e-5),
    torch.complex128: (1e-10, 1e-12),
}


def add_l1(opt: torch.optim.Optimizer, l1: float, is_decoupled: bool) -> None:
    """The penalty by hand: in the gradient, or decoupled as p -= lr * l1 * sign(p)."""
    signs: dict[Tensor, Tensor] = {}

    def before(*_: Any) -> None:
        for group in opt.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                signs[p] = p.detach().sign()
                if not is_decoupled:
                    p.grad = p.grad + (-l1 if group["maximize"] else l1) * signs[p]

    @torch.no_grad()
    def after(*_: Any) -> None:
        for group in opt.param_groups:
            for p in group["params"]:
                if p.grad is not None and is_decoupled:
                    p.sub_(group["lr"] * l1 * signs[p])

    opt.register_step_pre_hook(before)
    opt.register_step_post_hook(after)


# Running --------------------------------------------------------------------------------------


def leaf(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A parameter with these values and strides, in memory of its own."""
    copied = torch.empty_like(values, dtype=dtype).copy_(values.detach())
    return copied.requires_grad_()


def gradient_like(values: Tensor, scale: float = 3.0) -> Tensor:
    """A random gradient, no part of which is so small that it cancels with a penalty: what is left
    would be rounding errors, which the adaptive rules blow up to full-sized steps."""
    if values.is_complex():
        parts = torch.view_as_real(values)
        return torch.view_as_complex(gradient_like(parts, scale))
    g = torch.randn_like(values, dtype=torch.float64)
    return (scale * (g + g.sign())).to(values.dtype)


def draw(shapes: Any, steps: int, dtype: torch.dtype = torch.float32) -> tuple[list, list]:
    """Random parameters, and gradients for a number of steps."""
    scale = random.uniform(1, 5)
    values = [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]
    return values, [[gradient_like(v, scale) for v in values] for _ in range(steps)]


def step_through(opt: torch.optim.Optimizer, params: list[Tensor], grads: list) -> None:
    """Steps once for each entry of ``grads``: one gradient, or None, per parameter."""
    for now in grads:
        for param, grad in zip(params, now, strict=True):
            param.grad = None if grad is None else grad.to(param.dtype, copy=True)
        opt.step()


def train(build: Any, values: list, grads: list, dtype: torch.dtype | None = None, **more: Any):
    """Builds an optimizer over leaves with these values and steps it through the gradients."""
    params = [leaf(v, dtype or v.dtype) for v in values]
    opt = build(params, **more)
    step_through(opt, params, grads)
    return params, opt


def states(opt: torch.optim.Optimizer, params: list[Tensor]) -> list[dict[str, Any]]:
    return [dict(opt.state.get(p, {})) for p in params]


# Comparing ------------------------------------------------------------------------------------


def bits(t: Tensor) -> tuple:
    """A snapshot of a tensor that compares equal only if every bit is the same."""
    data = t.detach().resolve_conj().cpu()
    if data.is_sparse:
        data = data.coalesce()
        return (tuple(t.shape), t.dtype, bits(data.indices()), bits(data.values()))
    data = data.clone(memory_format=torch.contiguous_format).reshape(-1)
    raw = data.view(torch.uint8).numpy().tobytes() if t.numel() else b""
    return (tuple(t.shape), t.dtype, t.stride(), raw)


def snapshot(opt: torch.optim.Optimizer) -> tuple:
    """Everything that step() and load_state_dict() may write, bit for bit."""

    def freeze(value: Any) -> Any:
        if isinstance(value, Tensor):
            return bits(value) if value.device.type != "meta" else (id(value), value.shape)
        return value

    params = [p for group in opt.param_groups for p in group["params"]]
    return (
        [freeze(p) for p in params],
        [
            {k: freeze(v) for k, v in state.items()} if isinstance(state, dict) else state
            for state in (opt.state.get(p) for p in params)
        ],
        len(opt.state),
        [{k: freeze(v) for k, v in g.items() if k != "params"} for g in opt.param_groups],
    )


def assert_near(ours: Tensor, exact: Tensor, what: Any = "", dtype: Any = None) -> None:
    """Same shape, and the same values within what a few steps in this dtype may differ by."""
    assert isinstance(ours, Tensor) and ours.shape == exact.shape, what
    rtol, atol = TOLERANCE[dtype or ours.dtype]
    wide = exact.dtype if exact.dtype in (torch.float64, torch.complex128) else torch.float64
    wide = torch.complex128 if ours.is_complex() else wide
    here, there = ours.detach().to(wide), exact.detach().to(wide)
    margin = getattr(exact, "sign_margin", None)
    if margin is not None:  # of Lion's oracle
        is_decided = margin >= 4 * torch.finfo(dtype or ours.dtype).eps
        is_decided = is_decided.all(-1) if ours.is_complex() else is_decided
        assert is_decided.numel() < 100 or is_decided.double().mean() > 0.8, what
        here, there = torch.where(is_decided, here, 0), torch.where(is_decided, there, 0)
    torch.testing.assert_close(
        here,
        there,
        rtol=rtol,
        atol=atol,
        equal_nan=True,
        msg=lambda m: f"{what}: {m}",
    )


def assert_trained_alike(
    ours: torch.optim.Optimizer,
    params: list[Tensor],
    stock: torch.optim.Optimizer,
    exact: list[Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Parameters and state agree. Low-precision moments of stock lag behind, so only for
    float32 and float64 does comparing with the oracle say something about state."""
    for i, (p, q) in enumerate(zip(params, exact, strict=True)):
        assert_near(p, q, f"parameter {i}", dtype)
        here, there = ours.state.get(p, {}), stock.state.get(q, {})
        for key in here:
            if isinstance(here[key], Tensor) and here[key].layout is torch.strided:
                kind = here[key].dtype if key == "step" else dtype
                if key == "mu_product":  # whose dtype torch's load_state_dict changes
                    kind = torch.float32
                assert_near(here[key], there[key], f"state {key} of parameter {i}", kind)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return bits(a) == bits(b)


# GradScaler -----------------------------------------------------------------------------------


class Amp:
    """A model in training with a GradScaler of its own or of another, by steps that are spelled:
    u unscale_ first, c unscale_ and clip, a accumulate over two backwards, o overflow, . nothing
    of that."""

    def __init__(self, build: Any, scaler: Any = None, device: str = "cpu", **more: Any):
        self.device = device
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        with torch.no_grad():
            for i, p in enumerate(self.model.parameters()):
                p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape) + 0.1 * i)
        self.params = [*self.model.to(device).parameters()]
        self.opt = build([{"params": self.params[:1]}, {"params": self.params[1:]}], **more)
        self.scaler = scaler or torch.amp.GradScaler(device, init_scale=256.0, growth_interval=3)
        self.log = []

    def step(self, kind: str, at: int) -> None:
        self.opt.zero_grad()
        for more in range(2 if "a" in kind else 1):
            inputs = torch.linspace(0, 2, 8, device=self.device).view(2, 4)
            loss = self.model(inputs + at + more).square().sum()
            self.scaler.scale(loss).backward()
        if "o" in kind:
            self.params[2].grad[0, at % 3] = (math.inf, -math.inf, math.nan)[at % 3]
        if "u" in kind or "c" in kind:
            self.scaler.unscale_(self.opt)
        if "c" in kind:
            nn.utils.clip_grad_norm_(self.params, 1.5)
        before, fresh = snapshot(self.opt), not any(states(self.opt, self.params))
        grads = [bits(p.grad) for p in self.params]
        self.scaler.step(self.opt)
        assert not hasattr(self.opt, "found_inf") and not hasattr(self.opt, "grad_scale")
        if getattr(self.opt, "amp_fused", False):
            assert [bits(p.grad) for p in self.params] == grads
        if "o" in kind:
            if fresh:  # there may be state now, but no step was counted
                assert snapshot(self.opt)[0] == before[0]
                assert not any(s.get("step", 0) for s in states(self.opt, self.params))
            else:
                assert snapshot(self.opt) == before

    def run(self, kinds: str) -> Amp:
        for at, kind in enumerate(kinds.split()):
            self.step(kind, at)
            self.scaler.update()
            self.log.append((kind, self.scaler.get_scale(), self.scaler.state_dict()))
        return self


FLOWS = [
    ". . . . . .",
    "u u u . .",
    "c c . c",
    "o . . .",
    "o o a . c",
    ". o . u",
    ". . . . uo . co . ao a",
    "co uo c c",
]


# Layouts --------------------------------------------------------------------------------------
# Each takes values and returns a tensor in that layout and the memory around it, which no step
# may touch.


def _contiguous(v: Tensor) -> tuple[Tensor, list[Tensor]]:
    return v.clone(memory_format=torch.contiguous_format), []


def _channels_last(v: Tensor) -> tuple[Tensor, list[Tensor]]:
    return v.clone(memory_format=torch.channels_last), []


def _transposed(v: Tensor) -> tuple[Tensor, list[Tensor]]:
    return v.transpose(0, 3).contiguous().transpose(0, 3), []


def _sliced(v: Tensor) -> tuple[Tensor, list[Tensor]]:
    base = torch.full((*v.shape[:-1], 2 * v.shape[-1]), 7.0, dtype=v.dtype)
    base[..., ::2] = v
    return base[..., ::2], [base[..., 1::2]]


def _column_block(v: Tensor) -> tuple[Tensor, list[Tensor]]:
    base = torch.full((v.shape[0], v.shape[1] + 2, *v.shape[2:]), 7.0, dtype=v.dtype)
    base[:, 1:-1] = v
    return base[:, 1:-1], [base[:, :1], base[:, -1:]]


def _offset_1(v: Tensor) -> tuple[Tensor, list[Tensor]]:
    base = torch.full((v.numel() + 4,), 7.0, dtype=v.dtype)
    base[1:-3] = v.reshape(-1)
    return base[1:-3].view(v.shape), [base[:1], base[-3:]]


def _odd_bytes(v: Tensor) -> tuple[Tensor, list[Tensor]]:
    if not v.numel():
        return _contiguous(v)
    size = v.numel() * v.element_size()
    buffer = bytearray(b"\x07" * (size + 4))
    around = torch.frombuffer(buffer, dtype=torch.uint8)
    inside = torch.frombuffer(buffer, dtype=v.dtype, offset=1, count=v.numel())
    inside.copy_(v.reshape(-1))
    return inside.view(v.shape), [around[:1], around[-3:]]


def _odd_strides_where_size_1(v: Tensor) -> tuple[Tensor, list[Tensor]]:
    v = v.contiguous().clone()
    strides = [12345 if n == 1 else s for n, s in zip(v.shape, v.stride(), strict=True)]
    return v.as_strided(v.shape, strides), []


def _expanded(v: Tensor) -> tuple[Tensor, list[Tensor]]:
    return v[:1].clone().expand_as(v), []


LAYOUTS = {
    "contiguous": _contiguous,
    "channels_last": _channels_last,
    "transposed": _transposed,
    "sliced": _sliced,
    "column_block": _column_block,
    "offset_1": _offset_1,
    "odd_bytes": _odd_bytes,
    "odd_strides_where_size_1": _odd_strides_where_size_1,
}
GRAD_LAYOUTS = {**LAYOUTS, "expanded": _expanded}
