"""State dicts, files and live state that somebody damaged: an error that changes nothing, or a step
that every backend and torch agree on. Never a crash.

``make fuzz N=5000`` tries 25,000 of each instead of some hundreds.
"""

from __future__ import annotations

import copy
import io
import math
import os
import random
import zipfile
from typing import Any

import pytest
import torch
from cases import RICHEST, RICHEST_OF, Case, counting, leaf, richest, snapshot
from conftest import SEED, require_kernels, require_native
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import fusedopt

EXAMPLES = 5 * int(os.environ.get("FUSEDOPT_FUZZ") or 60)
randoms = st.builds(random.Random, st.integers(0, 2**32))
many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
# What a bad value may raise. A missing option is a KeyError, as in torch; numbers that no
# constructor takes may divide by zero or overflow in Python, as in torch.
REFUSALS = (TypeError, ValueError, RuntimeError, KeyError, ArithmeticError)
STORED: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"state_dtype": torch.float32},
    {"state_dtype": "8bit"},
    {"master_weights": "split", "state_dtype": torch.float32},
    {"master_weights": "fp32", "ema": 0.9},
    {"rounding": "stochastic"},
    {"ema": 0.9, "l1": 0.01},
)


def trained(case: Case, stored: dict[str, Any], number: int) -> tuple[list[Tensor], Any]:
    """Two steps of an optimizer with two groups, and the gradients of a third."""
    generator = torch.Generator().manual_seed(number)
    dtype = torch.bfloat16 if set(stored) & {"master_weights", "rounding"} else torch.float32
    shapes = [(5,), (4099,), (2, 3)] if stored.get("state_dtype") == "8bit" else [(5,), (), (2, 3)]
    params = [leaf(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    opt = case.ours([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], **stored)
    for step in range(3):
        for p in params:
            p.grad = (torch.randn(p.shape, generator=generator) + 3).to(dtype)
        if step < 2:
            opt.step()
    return params, opt


# Damage ---------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 3, 2**24, 2**63, 10**400, 0.5, -0.5, 1e308),
    *(math.nan, math.inf, -math.inf, 1j, "x", "8bit", "1.0", b"x", (), [], {}, (0.9,), [0.9, 0.99]),
    *([[1]], {"a": 1}, {0: {}}, torch.float32, torch.int8, torch.device("cpu"), print),
)


def hostile_tensor(rng: random.Random, like: Tensor | None) -> Any:
    like = torch.ones(2, 3) if like is None or like.layout is not torch.strided else like.detach()
    shape = rng.choice([like.shape, like.shape, (), (1,), (0,), (3,), (2, 3), (3, 2), (1, 2, 3)])
    dtypes = (*[torch.float32] * 3, torch.float64, torch.bfloat16, torch.float16, torch.int64)
    dtypes += (torch.int8, torch.uint8, torch.int16, torch.bool, torch.complex64, like.dtype)
    value = torch.full(shape, rng.choice((0, 1, 1, 3, 100)), dtype=rng.choice(dtypes))
    if value.is_floating_point() or value.is_complex():
        value = value * rng.choice((1, 1, -1, math.nan, math.inf, 1e30))
    kind = rng.random()
    if kind < 0.1:
        return value.to("meta")
    if kind < 0.2:
        return value.to_sparse() if value.dim() else value
    if kind < 0.3:
        return value.new_ones(()).expand(like.shape)
    if kind < 0.35:
        return torch.nn.Parameter(value) if value.is_floating_point() else value
    if kind < 0.4 and value.dim():
        return torch.stack([value, value], -1)[..., 0]
    if kind < 0.45 and value.dtype != torch.bool:
        return value.numpy() if value.dtype != torch.bfloat16 else value.tolist()
    return value


def replacement(rng: random.Random, old: Any) -> Any:
    if rng.random() < (0.7 if isinstance(old, Tensor) else 0.3):
        return hostile_tensor(rng, old if isinstance(old, Tensor) else None)
    return copy.deepcopy(rng.choice(VALUES))


def places(node: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """Every entry of every dict and list, as (container, key)."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    found = [(node, key) for key in keys]
    for key in keys:
        if isinstance(node[key], (dict, list)) and depth < 4:
            found += places(node[key], depth + 1)
    return found


def damage(rng: random.Random, node: Any) -> None:
    """One random change, at any depth."""
    if not (found := places(node)):
        return
    container, key = rng.choice(found)
    kind = rng.random()
    if kind < 0.2:
        del container[key]
    elif kind < 0.3 and isinstance(container, dict):
        names = ("step", "exp_avg", "sum", "momentum_buffer", "exp_avg_sq_scale", "master", "ema")
        names += ("master_remainder", "rounding_state", "note", 7, None)
        container[rng.choice(names)] = replacement(rng, None)
    elif kind < 0.4 and isinstance(container, list):
        container.append(copy.copy(container[key]))
    else:
        container[key] = replacement(rng, container[key])


# Outcomes -------------------------------------------------------------------------------------


def refused(action: Any, opt: Any) -> str | None:
    """The error of an action, which then has changed nothing; None if there is none."""
    before = snapshot(opt)
    try:
        action()
    except REFUSALS as error:
        assert len(str(error)) > 10, repr(error)
        assert same(snapshot(opt), before), f"{error!r}, but something has changed"
        return f"{type(error).__name__}: {error}"
    return None


def same(a: Any, b: Any) -> bool:
    """Equality of snapshots with NaNs and arrays in them."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or repr(a) == repr(b)


def numbers(opt: Any) -> list[Tensor]:
    return [p.detach().double() for group in opt.param_groups for p in group["params"]]


def agree(one: Any, other: Any, tolerance: float = 1e-3) -> None:
    """Where both are numbers: with hostile options 0/0 may be a rounding away."""
    for a, b in zip(numbers(one), numbers(other), strict=True):
        both = a.isfinite() & b.isfinite() & (a.abs() < 1e3)
        torch.testing.assert_close(a[both], b[both], rtol=tolerance, atol=tolerance)


BACKENDS = {
    "python": lambda: None,
    "native": lambda: NATIVE,
    "kernels": require_kernels,
}
NATIVE = fusedopt.backend.native


@pytest.fixture(autouse=True)
def keep_backend():
    require_native()
    yield
    fusedopt.backend.native = NATIVE


def has_odd_options(opt: Any) -> bool:
    kinds = (bool, int, float, str, type(None), torch.dtype)
    options = [v for group in opt.param_groups for k, v in group.items() if k != "params"]
    parts = [part for v in options for part in (v if isinstance(v, tuple) else (v,))]
    return not all(isinstance(part, kinds) for part in parts)


def on_every_backend(rng: random.Random, damaged: Any) -> None:
    """What ``damaged(random, params, opt)`` leads to, by backend; the damage is the same."""
    case, stored = rng.choice(RICHEST), rng.choice(STORED)
    number = rng.getrandbits(31)
    outcomes = {}
    for name, choose in BACKENDS.items():
        fusedopt.backend.native = choose()
        params, opt = trained(case, stored, number)
        outcomes[name] = (damaged(random.Random(number), case, stored, params, opt), opt)
    errors = {name: error for name, (error, _) in outcomes.items()}
    # The two native backends and the Python rule take and refuse the same.
    python = errors["python"] or ""
    # The first is refused on a CPU only. With the others native goes on: it has infinities, and
    # takes whatever is one number, such as an array, or a tensor that is bool or sparse.
    if any(word in python for word in ("capturable", "ZeroDivision", "overflow", "Overflow")):
        return
    if python and has_odd_options(outcomes["native"][1]):
        return
    assert len({error is None for error in errors.values()}) == 1, errors
    if errors["python"] is None and stored.get("rounding") is None:
        tolerance = 0.05 if stored else 1e-3
        agree(outcomes["native"][1], outcomes["python"][1], tolerance)
        agree(outcomes["native"][1], outcomes["kernels"][1], 1e-6)


@seed(SEED)
@given(rng=randoms)
@many
def test_damaged_state_dicts(rng):
    """Refused by load_state_dict or by the next step; or torch, if it takes them, does the same."""

    def damaged(rng, case, stored, params, opt):
        saved = copy.deepcopy(opt.state_dict())
        for _ in range(rng.choice((1, 1, 2))):
            damage(rng, saved)
        twins = [leaf(p) for p in params]
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.clone()
        stock = case.stock([{"params": twins[:2]}, {"params": twins[2:], "lr": 0.02}])
        for_torch = copy.deepcopy(saved)
        error = refused(lambda: opt.load_state_dict(saved), opt)
        if error:
            opt.step()  # it goes on
            return error
        error = refused(opt.step, opt)
        # Options that are missing come from the defaults here, in torch they are off.
        groups = for_torch["param_groups"]
        if error is None and not stored and all(opt.defaults.keys() <= g.keys() for g in groups):
            try:
                stock.load_state_dict(for_torch)
                stock.step()
            except Exception:  # of any kind: torch looks at nothing before it computes
                return None
            agree(opt, stock)
        return error

    on_every_backend(rng, damaged)


@seed(SEED)
@given(rng=randoms)
@many
def test_damaged_state(rng):
    """By hand, between two steps: the plan of the last step is still there."""

    def damaged(rng, case, stored, params, opt):
        good = {p: dict(state) for p, state in opt.state.items()}
        groups = [dict(group) for group in opt.param_groups]
        keys = ("params", "foreach", "fused", "capturable", "differentiable")
        for _ in range(rng.choice((1, 1, 2))):
            if rng.random() < 0.7:
                damage(rng, opt.state[rng.choice(params)])
            else:
                group = rng.choice(opt.param_groups)
                shown = {key: value for key, value in group.items() if key not in keys}
                damage(rng, shown)
                for key in set(group) - set(shown) - set(keys):
                    del group[key]
                group.update(shown)
        error = refused(opt.step, opt)
        if error:
            for group, values in zip(opt.param_groups, groups, strict=True):
                group.clear()
                group.update(values)
            opt.state.clear()
            opt.state.update(good)
            opt.step()
        return error

    on_every_backend(rng, damaged)


@seed(SEED)
@given(rng=randoms)
@settings(many, max_examples=EXAMPLES // 3)
def test_damaged_files(rng):
    """Cut off, or with some bytes changed; also of a file whose checksums are right again."""
    case, stored = rng.choice(RICHEST), rng.choice(STORED)
    params, opt = trained(case, stored, rng.getrandbits(31))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    raw = bytearray(file.getvalue())
    if rng.random() < 0.3:
        del raw[rng.randrange(len(raw)) :]
    elif rng.random() < 0.5:
        for _ in range(rng.choice((1, 3, 100))):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    else:
        raw = with_other_pickle(rng, bytes(raw))
    try:
        saved = torch.load(io.BytesIO(bytes(raw)), weights_only=True)
    except Exception:  # torch's own: RuntimeError, UnpicklingError, EOFError, ...
        return
    if refused(lambda: opt.load_state_dict(saved), opt) is None:
        refused(opt.step, opt)
    else:
        opt.step()


def with_other_pickle(rng: random.Random, raw: bytes) -> bytes:
    """The same archive, with some bytes of the pickle changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            data = bytearray(source.read(name))
            if name.endswith("data.pkl"):
                for _ in range(rng.choice((1, 2))):
                    data[rng.randrange(len(data))] = rng.randrange(256)
            target.writestr(name, bytes(data))
    return out.getvalue()


# What these have found ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [math.inf, 2.0**53, 1e308])
@counting
def test_a_step_that_cannot_be_counted_on(case, count, backend):
    params, opt = trained(case, {}, SEED)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["step"] = torch.tensor(count, dtype=torch.float64)
    assert "'step'" in refused(lambda: opt.load_state_dict(saved), opt)
    opt.state[params[0]]["step"] = torch.tensor(count, dtype=torch.float64)
    assert "'step'" in refused(opt.step, opt)


@pytest.mark.parametrize("count", [10**400, 2**63])
def test_a_step_that_is_a_large_integer(count, backend):
    _, opt = trained(RICHEST_OF["Adam"], {}, SEED)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["step"] = count
    assert "'step'" in refused(lambda: opt.load_state_dict(saved), opt)


@richest
@pytest.mark.parametrize("entry", [1, None, "x", torch.ones(3)], ids=repr)
def test_state_of_nobody(case, entry, backend):
    _, opt = trained(case, {}, SEED)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"] = {"a": entry, **saved["state"]}
    assert "'a'" in refused(lambda: opt.load_state_dict(saved), opt)
    opt.step()


@richest
def test_state_of_a_program_before_that_of_parameters(case, backend):
    """torch takes the first entry for that of a parameter."""
    _, opt = trained(case, {}, SEED)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"] = {"a": {"note": 1}, **saved["state"]}
    opt.load_state_dict(saved)
    assert opt.state["a"] == {"note": 1}
    opt.step()
    del saved["state"][0], saved["state"][1], saved["state"][2]
    if refused(lambda: opt.load_state_dict(saved), opt) is None:
        opt.step()


@richest
def test_state_whose_name_is_none(case, backend):
    params, opt = trained(case, {}, SEED)
    for p in params:
        opt.state[p][None] = torch.full((7, 2), 7.0)
    opt.load_state_dict(opt.state_dict())
    assert refused(opt.step, opt) is None
    for p in params:
        assert (opt.state[p][None] == 7).all()


@richest
def test_options_of_one_element(case, backend):
    """Also for a 0-dim parameter."""
    params, opt = trained(case, {}, SEED)
    others, other = trained(case, {}, SEED)
    for key in {"lr", "eps", "weight_decay"} & opt.param_groups[0].keys():
        opt.param_groups[0][key] = torch.tensor([opt.param_groups[0][key]])
    assert refused(opt.step, opt) is None
    other.step()
    agree(opt, other, 1e-5)


def test_scales_that_are_sparse_or_share_memory(backend):
    params, opt = trained(RICHEST_OF["Adam"], {"state_dtype": "8bit"}, SEED)
    state = opt.state[params[1]]
    good = state["exp_avg_scale"]
    for bad in (good.to_sparse(), good[:1].expand(good.shape)):
        state["exp_avg_scale"] = bad
        assert "exp_avg_scale" in refused(opt.step, opt)
    state["exp_avg_scale"] = good
    opt.step()


@pytest.mark.parametrize("value", [None, "deleted"])
def test_an_option_of_fusedopt_that_is_gone_is_off(value, backend):
    params, opt = trained(RICHEST_OF["Adam"], {"l1": 0.01}, SEED)
    others, other = trained(RICHEST_OF["Adam"], {"l1": 0.01}, SEED)
    for group, expected in zip(opt.param_groups, other.param_groups, strict=True):
        expected["l1"] = 0.0
        group["l1"] = None
        if value:
            del group["l1"]
    assert refused(opt.step, opt) is None
    other.step()
    agree(opt, other, 1e-6)


@richest
def test_an_option_without_data(case, backend):
    """Before anything is written: in the second group, of a class that broadcasts it."""
    for shape in ((), (3,)):
        _, opt = trained(case, {}, SEED)
        for key in {"lr", "eps", "weight_decay"} & opt.param_groups[1].keys():
            good = opt.param_groups[1][key]
            opt.param_groups[1][key] = torch.ones(shape, device="meta")
            assert f"'{key}'" in refused(opt.step, opt)
            opt.param_groups[1][key] = good
        opt.step()


class Refusing(Tensor):
    """A tensor that nobody can write."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("add_", "addcdiv_", "copy_"):
            raise NotImplementedError("it cannot be written")
        return super().__torch_function__(func, types, args, kwargs or {})


@richest
def test_an_error_after_a_differentiable_group(case, backend):
    """What one group has written is taken back, whatever is recorded of it."""
    params = [leaf(torch.randn(5)), torch.randn(4).as_subclass(Refusing).requires_grad_()]
    opt = case.ours([{"params": [p]} for p in params])
    opt.param_groups[0]["differentiable"] = True
    params[0].grad = torch.randn(5)
    opt.step()
    before = [p.detach().clone() for p in (params[0], *opt.state[params[0]].values())]
    params[1].grad = torch.randn(4)
    with pytest.raises((RuntimeError, NotImplementedError), match="cannot be written"):
        opt.step()
    after = [params[0], *opt.state[params[0]].values()]
    for was, now in zip(before, after, strict=True):
        assert torch.equal(was, now.detach())
