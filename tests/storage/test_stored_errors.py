"""Options that do not exist, and stored values that are damaged."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import (
    RICHEST_OF,
    draw,
    every_name,
    leaf,
    richest,
    snapshot,
    step_through,
    train,
)
from stored import (
    BF16,
    F16,
    F32,
    F64,
    INF,
    NAN,
    UNSIGNED,
    assert_bits,
    is_code,
)

import fusedopt

WRONG = [
    ({"state_dtype": "4bit"}, "state_dtype"),
    ({"state_dtype": F64}, "state_dtype"),
    ({"state_dtype": torch.int8}, "state_dtype"),
    ({"state_dtype": "float32"}, "state_dtype"),
    ({"state_dtype": 8}, "state_dtype"),
    ({"master_weights": "bf16"}, "master_weights"),
    ({"master_weights": True}, "master_weights"),
    ({"master_weights": F32}, "master_weights"),
    ({"rounding": "nearest"}, "rounding"),
    ({"rounding": True}, "rounding"),
    ({"ema": 1.0}, "ema"),
    ({"ema": -0.1}, "ema"),
    ({"ema": NAN}, "ema"),
    ({"ema": INF}, "ema"),
    ({"ema": "0.9"}, "ema"),
    ({"ema": True}, "ema"),
    ({"ema": False}, "ema"),
    ({"ema": torch.tensor(0.9)}, "ema"),
    ({"master_weights": "split", "rounding": "stochastic"}, "rounding"),
    ({"master_weights": "fp32", "rounding": "stochastic"}, "rounding"),
    ({"differentiable": True, "ema": 0.5}, "differentiable"),
    ({"differentiable": True, "master_weights": "split", "state_dtype": F32}, "differentiable"),
    ({"differentiable": True, "rounding": "stochastic"}, "differentiable"),
]


@every_name
def test_wrong_options_of_a_class(name):
    for options, word in WRONG:
        with pytest.raises(ValueError, match=word):
            getattr(fusedopt, name)([leaf(torch.ones(3))], **options)


@every_name
@pytest.mark.parametrize("steps", [0, 2], ids=["at the first step", "later"])
def test_wrong_options_of_a_group(name, steps, backend):
    """An error of the step, or of loading them, and nothing has changed."""
    cls = getattr(fusedopt, name)
    values, grads = draw([(5,), (4099,)], steps + 1, BF16)
    params = [leaf(v) for v in values]
    opt = cls([{"params": [p]} for p in params], lr=0.01)
    step_through(opt, params, grads[:steps])
    group = opt.param_groups[1]
    good = dict(group)
    for options, word in WRONG:
        group.update(options)
        before = snapshot(opt)
        with pytest.raises(ValueError, match=f"param group 1.*{word}"):
            step_through(opt, params, grads[steps:])
        assert snapshot(opt)[:3] == before[:3]
        fresh = cls([{"params": [leaf(v)]} for v in values], lr=0.01)
        empty = snapshot(fresh)
        with pytest.raises(ValueError, match=f"param group 1.*{word}"):
            fresh.load_state_dict(opt.state_dict())
        assert snapshot(fresh) == empty
        group.clear()
        group.update(good)
    step_through(opt, params, grads[steps:])
    plain, _ = train(cls, values, grads, lr=0.01)
    for p, q in zip(params, plain, strict=True):
        assert_bits(p, q)


@richest
@pytest.mark.parametrize(
    "options", [{"master_weights": "split"}, {"rounding": "stochastic"}], ids=str
)
def test_float16_needs_whole_masters(case, options, backend):
    params = [leaf(torch.ones(5, dtype=dtype)) for dtype in (BF16, F16)]
    opt = case.ours(params, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    before = snapshot(opt)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"parameter 1.*float16.*fp32|parameter 1.*fp32"):
            opt.step()
        assert snapshot(opt) == before
    params[1].grad = None
    opt.step()
    assert snapshot(opt) != before


DAMAGE = {
    # key of the state, what becomes of it
    "codes of the wrong sign": ("signed", lambda v: v.to(torch.uint8)),
    "unsigned codes of the wrong sign": ("unsigned", lambda v: v.to(torch.int8)),
    "codes of another shape": ("signed", lambda v: v[:4096]),
    "codes of int16": ("signed", lambda v: v.short()),
    "codes of bool": ("unsigned", lambda v: v.bool()),
    "codes with gaps": ("signed", lambda v: v.repeat_interleave(2)[::2]),
    "expanded codes": ("unsigned", lambda v: v[:1].expand(len(v))),
    "codes in a list": ("signed", torch.Tensor.tolist),
    "meta codes": ("signed", lambda v: v.to("meta")),
    "no scale": ("scale", None),
    "a scale too few": ("scale", lambda v: v[:-1]),
    "a scale too many": ("scale", lambda v: torch.cat([v, v[:1]])),
    "a scale for each element": ("scale", lambda v: v.repeat_interleave(64)),
    "scales in another shape": ("scale", lambda v: v[None]),
    "scales of float64": ("scale", lambda v: v.double()),
    "scales of bfloat16": ("scale", lambda v: v.bfloat16()),
    "scales in a list": ("scale", torch.Tensor.tolist),
    "meta scales": ("scale", lambda v: v.to("meta")),
    "a remainder of int32": ("master_remainder", lambda v: v.int()),
    "a remainder of bfloat16": ("master_remainder", lambda v: v.view(BF16)),
    "a remainder of another shape": ("master_remainder", lambda v: v[:-1]),
    "an expanded remainder": ("master_remainder", lambda v: v[:1].expand(len(v))),
    "a remainder in a list": ("master_remainder", torch.Tensor.tolist),
    "a master of bfloat16": ("master", lambda v: v.bfloat16()),
    "a master of float64": ("master", lambda v: v.double()),
    "a master of another shape": ("master", lambda v: v[None]),
    "a meta master": ("master", lambda v: v.to("meta")),
    "a sparse master": ("master", lambda v: v.to_sparse()),
    "rounding_state of float64": ("rounding_state", lambda v: v.double()),
    "rounding_state of int32": ("rounding_state", lambda v: v.int()),
    "a seed without a count": ("rounding_state", lambda v: v[:1]),
    "a rounding_state too long": ("rounding_state", lambda v: v.repeat(2)),
    "rounding_state in a list": ("rounding_state", torch.Tensor.tolist),
    "an average of int64": ("ema", lambda v: v.long()),
    "an average of another shape": ("ema", lambda v: v[:7]),
    "an expanded average": ("ema", lambda v: v[:1].expand(len(v))),
    "a complex average": ("ema", lambda v: v + 0j),
    "a sparse average": ("ema", lambda v: v.to_sparse()),
    "an average that is a number": ("ema", lambda v: 1.0),
}


@pytest.mark.parametrize(
    "case", [RICHEST_OF["SGD"], RICHEST_OF["Adam"]], ids=lambda case: case.name
)
@pytest.mark.parametrize("damage", DAMAGE)
def test_hostile_state(case, damage, backend):
    """Loaded or put there by hand: a clear error, and nothing has changed."""
    role, change = DAMAGE[damage]
    options = {"state_dtype": "8bit", "ema": 0.9}
    if role == "rounding_state":
        options["rounding"] = "stochastic"
    elif role.startswith("master"):
        options["master_weights"] = "fp32" if role == "master" else "split"
    values, grads = draw([(33,), (4097,)], 4, BF16)
    params, opt = train(case.ours, values, grads[:2], **options)
    state = opt.state[params[1]]
    codes = [k for k, v in state.items() if is_code(v) and (k in UNSIGNED) == (role == "unsigned")]
    if role == "scale":
        role = [k for k in state if k.endswith("_scale")][-1]
    elif role in ("signed", "unsigned"):
        if not codes:
            pytest.skip("this rule has none")
        role = codes[0]
    saved = copy.deepcopy(opt.state_dict())
    wrong = None if change is None else change(state[role])
    saved["state"][1][role] = wrong
    if change is None:
        del saved["state"][1][role]
    fresh_params, fresh = train(case.ours, values, grads[:1], **options)
    before = snapshot(fresh)
    with pytest.raises((TypeError, ValueError), match="parameter 1"):
        fresh.load_state_dict(saved)
    assert snapshot(fresh) == before
    good = state[role]
    if change is None:
        del state[role]
    else:
        state[role] = wrong
    before = snapshot(opt)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match="parameter 1"):
            step_through(opt, params, grads[2:3])
        assert snapshot(opt) == before
    state[role] = good
    step_through(opt, params, grads[2:])


def test_an_entry_that_is_called_like_one_of_ours(backend):
    """Without the option it is the program's own."""
    (p,), opt = train(fusedopt.Adam, *draw([(5,)], 1))
    own = {"ema": "x", "master": 3.0, "rounding_state": 4, "master_remainder": None}
    opt.state[p].update(own)
    q = leaf(p)
    fresh = fusedopt.Adam([q])
    fresh.load_state_dict(opt.state_dict())
    step_through(fresh, [q], [[torch.ones(5)]])
    assert {key: fresh.state[q][key] for key in own} == own
