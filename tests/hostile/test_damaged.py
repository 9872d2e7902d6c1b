"""State dicts, files and live state, damaged at random.

``make fuzz N=5000`` tries 25,000 of each instead of some hundreds.
"""

from __future__ import annotations

import copy
import io
import os
import random
import zipfile
from typing import Any

import torch
from cases import RICHEST, leaf
from conftest import SEED, require_kernels
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import fusedopt
from hostile import NATIVE, agree, refused, trained
from hostile.damage import damage

EXAMPLES = 5 * int(os.environ.get("FUSEDOPT_FUZZ") or 60)
randoms = st.builds(random.Random, st.integers(0, 2**32))
many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
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

BACKENDS = {
    "python": lambda: None,
    "native": lambda: NATIVE,
    "kernels": require_kernels,
}


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
