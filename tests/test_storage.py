"""How values are stored: state in other dtypes and in 8 bits, masters, stochastic rounding and the
average of the weights; each alone, together, and with everything else that a step does.

What is stored is compared, bit for bit where that is defined, with this file's own idea of the
formats and with the same rule on float32 parameters and float32 state.
"""

from __future__ import annotations

import copy
import ctypes
import io
import math
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import seam
import torch
from cases import (
    LAYOUTS,
    RICHEST,
    RICHEST_OF,
    Case,
    assert_near,
    bits,
    draw,
    every_case,
    every_name,
    gradient_like,
    leaf,
    richest,
    snapshot,
    step_through,
    train,
)
from conftest import SEED, skip_or_fail
from seam import formats
from torch import nn

import fusedopt

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
INF, NAN = math.inf, math.nan
# A case for each number and meaning of state tensors, which is to say for each loop.
LOOPS = [
    *RICHEST,
    Case("SGD", {"lr": 0.1}),
    Case("AdamW", {"lr": 0.1}),
    Case("RMSprop", {"lr": 0.05}),
    Case("RMSprop", {"lr": 0.05, "momentum": 0.9}),
    Case("RMSprop", {"lr": 0.05, "centered": True, "alpha": 0.9}),
]
every_loop = pytest.mark.parametrize("case", LOOPS, ids=str)

# Tensors below 4,096 elements have no codes. The last scales of these are of 64, 1 and 3 elements.
SIZES = [(), (5,), (0, 3), (4096,), (4097,), (67, 65)]
UNSIGNED = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
SLOTS = ("exp_avg", "grad_avg", "momentum_buffer", *UNSIGNED)

# The ways to store, and the dtypes of parameters that they are tried with.
WAYS = {
    "float32 state": ({"state_dtype": F32}, (BF16, F16)),
    "bfloat16 state": ({"state_dtype": BF16}, (F32, BF16, F16)),
    "float16 state": ({"state_dtype": F16}, (F32, BF16, F16)),
    "8bit": ({"state_dtype": "8bit"}, (F32, F16)),
    "split": ({"master_weights": "split"}, (BF16,)),
    "split, float32 state": ({"master_weights": "split", "state_dtype": F32}, (BF16,)),
    "split, 8bit, ema": ({"master_weights": "split", "state_dtype": "8bit", "ema": 0.9}, (BF16,)),
    "master": ({"master_weights": "fp32"}, (BF16, F16)),
    "master, float32 state, ema": (
        {"master_weights": "fp32", "state_dtype": F32, "ema": 0.999},
        (F16,),
    ),
    "stochastic": ({"rounding": "stochastic"}, (BF16,)),
    "stochastic, 8bit, ema": (
        {"rounding": "stochastic", "state_dtype": "8bit", "ema": 0.5},
        (BF16,),
    ),
    "ema": ({"ema": 0.9}, (F32, BF16)),
}
every_way = pytest.mark.parametrize(
    ("way", "dtype"),
    [(way, dtype) for way, (_, dtypes) in WAYS.items() for dtype in dtypes],
    ids=lambda v: str(v).removeprefix("torch."),
)
# One way for each kind of thing that is stored; all of them with a dtype of parameters.
KINDS = [
    ("8bit", F32),
    ("split, 8bit, ema", BF16),
    ("master, float32 state, ema", F16),
    ("stochastic, 8bit, ema", BF16),
    ("bfloat16 state", F32),
]
every_kind = pytest.mark.parametrize(
    ("way", "dtype"), KINDS, ids=[f"{way}, {dtype}".replace("torch.", "") for way, dtype in KINDS]
)


# The formats ----------------------------------------------------------------------------------


def flat(tensor):
    return tensor.detach().reshape(-1).clone(memory_format=torch.contiguous_format)


def assert_bits(ours, expected, what=""):
    """The same dtype, shape and bits; strides do not matter, and a NaN is a NaN."""
    assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape), what
    ours, expected = flat(ours), flat(expected)
    if ours.is_floating_point():
        ours, expected = (t.masked_fill(t.isnan(), NAN) for t in (ours, expected))
    if bits(ours) != bits(expected):
        size = ours.element_size()
        differ = [t.view(torch.uint8).view(-1, size) for t in (ours, expected)]
        at = (differ[0] != differ[1]).any(1).nonzero()[:5, 0]
        pytest.fail(f"{what} at {at.tolist()}: {ours[at]}, expected {expected[at]}")


def in_memory(tensor):
    """The elements of a tensor without gaps in the order of memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def int_bits(value):
    return value.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def from_bits(pattern, dtype):
    """Numbers of 16 or 32 bits from integers without a sign."""
    signed = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    half = 1 << (8 * dtype.itemsize - 1)
    return torch.where(pattern >= half, pattern - 2 * half, pattern).to(signed).view(dtype)


def nearest_away(master):
    """bfloat16, ties away from zero."""
    high = (int_bits(master) + 0x8000) >> 16 & 0xFFFF
    return from_bits(high.where(~master.isnan(), 0x7FC0), BF16).view(master.shape)


def joined(param, remainder):
    high = flat(param).view(torch.int16).to(torch.int64) << 16
    return from_bits((high + flat(remainder).to(torch.int64)) & 0xFFFFFFFF, F32).view(param.shape)


def philox(key, step, blocks):
    """Philox4x32-10 with the counter (block, step), lower halves first; four words for each."""
    low, word = np.uint64(0xFFFFFFFF), np.uint64(32)
    blocks = np.asarray(blocks, dtype=np.uint64)
    c0, c1 = blocks & low, blocks >> word
    c2, c3 = (np.full_like(blocks, part) for part in (step & 0xFFFFFFFF, step >> 32))
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (second >> word) ^ c1 ^ np.uint64(k0), second & low
        c2, c3 = (first >> word) ^ c3 ^ np.uint64(k1), first & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], 1).astype("<u4")


def noise(key, step, count):
    """16 random bits for each element of a tensor."""
    words = philox(key, step, np.arange((count + 7) // 8))
    return torch.from_numpy(words.view("<u2").reshape(-1)[:count].astype(np.int64))


def rounded_at_random(value, rounding_state):
    """bfloat16 of values in the order of memory."""
    pattern = int_bits(value)
    drawn = pattern + noise(*rounding_state.tolist(), len(value))
    high = torch.where(value.isfinite(), drawn, pattern) >> 16
    return from_bits((high & 0xFFFF).where(~value.isnan(), 0x7FC0), BF16)


def in_blocks(values):
    return nn.functional.pad(values, (0, -len(values) % 64)).view(-1, 64)


def decoded(codes, scale):
    """What codes in the order of memory stand for."""
    root = in_blocks(codes.double()) / (127 if codes.dtype == torch.int8 else 255)
    share = root * root.abs() if codes.dtype == torch.int8 else root**4
    return (share * scale.double()[:, None]).view(-1)[: len(codes)]


def assert_codes(codes, scale, value, random=None):
    """That these are the codes of float32 values, all in the order of memory; ``random`` bits are
    for the unsigned ones."""
    blocks, found = in_blocks(value), in_blocks(codes.long())
    assert_bits(scale, blocks.abs().amax(1) if len(value) else value, "scales")
    usable = (scale > 0) & scale.isfinite()
    share = (blocks.double() / scale.double()[:, None]).where(usable[:, None], 0).abs()
    slack = 2e-4  # what float32 may be off by
    if random is None:
        assert codes.dtype == torch.int8
        assert ((found.abs() - 127 * share.sqrt()).abs() <= 0.5 + slack).all()
        assert (found.sign() * blocks.nan_to_num() >= 0).all()
        return
    assert codes.dtype == torch.uint8
    exact, drawn = 255 * share**0.25, in_blocks(random) * 2.0**-16
    near = exact.round()
    low, high = ((exact + drawn + d).floor() for d in (-slack, slack))
    right = (found == low) | (found == high)
    right |= ((exact - near).abs() < 2.0**-11) & (found == near)
    right |= (exact < 1) & (found == 1) & (blocks > 0)
    assert right.all()
    assert torch.equal(found > 0, blocks > 0)


def is_code(value):
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int8, torch.uint8)


def numbers(state):
    """The state tensors of a rule as float32 numbers."""
    found = {}
    for key in (key for key in state if key in SLOTS):
        found[key] = torch.empty_like(state[key], dtype=F32)
        if is_code(state[key]):
            # With the last bit of the module, as what follows from it is compared bit for bit;
            # decoded() is what it is compared with.
            codes = in_memory(state[key])
            in_memory(found[key]).copy_(formats.decode(codes, state[f"{key}_scale"]))
        else:
            found[key].copy_(state[key])
    return found


def value_of(param, state):
    """The parameter as the rule sees it."""
    if "master_remainder" in state:
        return joined(param, state["master_remainder"])
    value = param.detach().float()
    if "master" in state:  # unless somebody else wrote the parameter
        value = state["master"].where(state["master"].to(param.dtype) == param, value)
    return value


def twin_of(case, opt, params, place=None):
    """The same parameters and state in float32, of an optimizer without options of storage."""
    twins, states = [], [opt.state.get(p, {}) for p in params]
    for p, state in zip(params, states, strict=True):
        twins.append(torch.empty_like(p, dtype=F32).copy_(value_of(p, state)))
        twins[-1] = (place(twins[-1])[0] if place else twins[-1]).requires_grad_()
    twin = case.ours(twins)
    for q, state in zip(twins, states, strict=True):
        count = {"step": state["step"].clone()} if "step" in state else {}
        if count or numbers(state):
            twin.state[q] = count | numbers(state)
    return twins, twin


def dtype_of(case, key, param, group):
    """In which a state tensor must be."""
    declared = group.get("state_dtype")
    if declared != "8bit":
        return declared or param.dtype
    # The difference of two averages leaves no room for the error of codes.
    is_part = case.options.get("centered") and key != "momentum_buffer"
    if param.numel() < 4096 or is_part:
        return F32
    return torch.uint8 if key in UNSIGNED else torch.int8


def assert_stored(case, group, param, state, number, found, before):
    """That parameter and state hold what the rule found, each in its way."""
    new = number.detach()
    kept = group.get("master_weights")
    if kept == "split":
        assert_bits(joined(param, state["master_remainder"]), new, "master")
        assert_bits(param, nearest_away(new), "parameter")
    elif group.get("rounding"):
        count = torch.tensor([0, 1])
        drawn_from = before.get("rounding_state", state["rounding_state"] - count)
        assert_bits(state["rounding_state"], drawn_from + count, "rounding_state")
        dense = torch.empty_like(param, dtype=F32).copy_(new)
        expected = torch.empty_like(dense, dtype=BF16)
        in_memory(expected).copy_(rounded_at_random(in_memory(dense), drawn_from))
        assert_bits(param, expected, "parameter")
    else:
        assert_bits(param, new.to(param.dtype), "parameter")
        if kept:
            assert_bits(state["master"], new, "master")
    assert [k for k in state if k in SLOTS] == [k for k in found if k in SLOTS]
    for slot, key in enumerate(k for k in found if k in SLOTS):
        stored, value = state[key], found[key]
        assert stored.dtype == dtype_of(case, key, param, group), key
        if not is_code(stored):
            assert_bits(stored, value.to(stored.dtype), key)
            continue
        dense = in_memory(torch.empty_like(stored, dtype=F32).copy_(value))
        bits_of_codes = noise(0x66757365646F7074 + slot, int(state.get("step", 0)), len(dense))
        random = bits_of_codes if stored.dtype == torch.uint8 else None
        assert_codes(in_memory(stored), state[f"{key}_scale"], dense, random)
    if group.get("ema") is not None:
        average = before.get("ema", before["param"].float())
        weight = torch.tensor(1 - group["ema"], dtype=F32)
        assert_bits(state["ema"], average + weight * (new - average), "ema")


def step_and_check(case, opt, params, grads, place=None):
    """One step of which all that it stores is checked."""
    twins, twin = twin_of(case, opt, params, place)
    before = [
        {k: v.clone() for k, v in opt.state.get(p, {}).items()} | {"param": p.detach().clone()}
        for p in params
    ]
    for p, q, g in zip(params, twins, grads, strict=True):
        p.grad = g
        q.grad = None if g is None else g.float()
    opt.step()
    twin.step()
    for p, q, old in zip(params, twins, before, strict=True):
        if p.grad is None:
            assert_bits(p, old["param"])
        else:
            state = opt.state.get(p, {})
            assert_stored(case, opt.param_groups[0], p, state, q, twin.state.get(q, {}), old)


@every_loop
@every_way
def test_a_step_is_the_rule_on_numbers(case, way, dtype, backend):
    """Load, compute in float32, store: for every rule and every way to store."""
    values, grads = draw(SIZES, 3, dtype)
    params = [leaf(v) for v in values]
    opt = case.ours(params, **WAYS[way][0])
    grads[0][1] = grads[1][4] = None
    for now in grads:
        step_and_check(case, opt, params, now)


@every_loop
@pytest.mark.parametrize("wide", [F32, BF16, F16], ids=str)
def test_state_dtype_against_float64(case, wide, backend):
    """Steps of torch's own loop in float64, whose parameters and state are rounded after each."""
    for dtype in (F32, BF16, F16):
        values, grads = draw([(33,), (4, 7)], 3, dtype)
        params, exact = [leaf(v) for v in values], [leaf(v, F64) for v in values]
        opt, oracle = case.ours(params, state_dtype=wide), case.exact(exact)
        for now in grads:
            step_through(opt, params, [now])
            step_through(oracle, exact, [now])
            for p, q in zip(params, exact, strict=True):
                kept = {k: v for k, v in opt.state.get(p, {}).items() if k != "step"}
                assert all(v.dtype == wide for v in kept.values())
                for ours, theirs in [(p, q), *((v, oracle.state[q][k]) for k, v in kept.items())]:
                    rounding = torch.finfo(ours.dtype).eps / 2 * theirs.detach().abs()
                    slack = 1e-5 + 1e-4 * theirs.detach().abs()
                    assert ((ours - theirs).detach().abs() <= rounding * 1.001 + slack).all()
                    theirs.data.copy_(ours.detach())


@richest
@every_kind
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(case, way, dtype, layout, backend):
    """Codes and random bits go by the order of memory; what lies between elements stays."""
    place = LAYOUTS[layout]
    values, grads = draw([(7, 33, 5, 4), (3, 1, 2, 2)], 2, dtype)
    placed = [place(v) for v in values]
    params = [p.requires_grad_() for p, _ in placed]
    around = [part for _, parts in placed for part in parts]
    before = [bits(part) for part in around]
    opt = case.ours(params, **WAYS[way][0])
    for now in grads:
        step_and_check(case, opt, params, now, place)
    assert [bits(part) for part in around] == before
    for p in params:
        for key in (k for k in opt.state[p] if k in SLOTS or k in ("master_remainder", "ema")):
            assert opt.state[p][key].stride() == torch.empty_like(p).stride(), key


@richest
@every_kind
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced"])
def test_gradients_in_another_layout(case, way, dtype, layout, backend):
    """Also in the first step, where SGD's momentum buffer is the gradient."""
    values, grads = draw([(7, 33, 5, 4)], 2, dtype)
    for of_param, of_grad in ((layout, "contiguous"), ("contiguous", layout)):
        if of_param == "sliced":
            continue
        param = LAYOUTS[of_param](values[0])[0].requires_grad_()
        opt = case.ours([param], **WAYS[way][0])
        for (grad,) in grads:
            step_and_check(case, opt, [param], [LAYOUTS[of_grad](grad)[0]])


@richest
@every_kind
def test_another_memory_format_in_the_middle(case, way, dtype, backend):
    """Values stay, up to a rounding of codes, whose scales are of other neighbours now."""
    values, grads = draw([(7, 33, 5, 4)], 4, dtype)
    loud = torch.logspace(-2, 0, 7)[:, None, None, None]
    grads = [[(g * loud).to(dtype) for g in now] for now in grads]
    (param,), opt = train(case.ours, values, grads[:2], **WAYS[way][0])
    param.data = param.data.contiguous(memory_format=torch.channels_last)
    (twin,), unrounded = twin_of(case, opt, [param])
    step_through(unrounded, [twin], grads[2:3])
    step_through(opt, [param], grads[2:3])
    for key, value in numbers(opt.state[param]).items():
        expected = unrounded.state[twin][key]
        coarse = 0.03 if is_code(opt.state[param][key]) else torch.finfo(BF16).eps / 2
        assert ((value - expected).abs() <= coarse * expected.abs().max()).all(), key
        if is_code(opt.state[param][key]):
            assert opt.state[param][key].stride() == param.stride()
    step_and_check(case, opt, [param], grads[3])


@richest
def test_codes_of_the_same_order_in_memory_are_kept(case, backend):
    """Strides where the size is 1 mean nothing."""
    (param,), opt = train(case.ours, *draw([(64, 65, 1, 1)], 2), state_dtype="8bit")
    before = {k: bits(flat(v)) for k, v in opt.state[param].items() if is_code(v)}
    assert before or case.options.get("centered")
    param.data = param.data.as_strided(param.shape, (65, 1, 65, 65))
    with seam.failing_before_the_update(opt, ZeroDivisionError):
        with pytest.raises(ZeroDivisionError):
            opt.step()
    assert {k: bits(flat(v)) for k, v in opt.state[param].items() if is_code(v)} == before


# The dtype of state ---------------------------------------------------------------------------


@richest
@pytest.mark.parametrize("dtype", [F64, torch.complex64], ids=str)
@pytest.mark.parametrize("declared", [BF16, "8bit"], ids=str)
def test_state_of_float64_and_complex_parameters_is_theirs(case, dtype, declared, backend):
    values, grads = draw([(5000,)], 3, dtype)
    plain = train(case.ours, values, grads)[1]
    (param,), opt = train(case.ours, values, grads, state_dtype=declared)
    assert snapshot(opt)[:2] == snapshot(plain)[:2]
    assert all(v.dtype == dtype for k, v in opt.state[param].items() if k != "step")


def copies_of(opt, build):
    """Optimizers that went through everything that copies and saves."""

    def through_a_file(what, weights_only):
        file = io.BytesIO()
        torch.save(what, file)
        file.seek(0)
        return torch.load(file, weights_only=weights_only)

    for saved in (
        opt.state_dict(),
        copy.deepcopy(opt.state_dict()),
        through_a_file(opt.state_dict(), True),
    ):
        fresh = build([leaf(p) for group in opt.param_groups for p in group["params"]])
        fresh.load_state_dict(copy.deepcopy(saved))
        yield fresh
    yield copy.deepcopy(opt)
    yield pickle.loads(pickle.dumps(opt))
    yield through_a_file(opt, False)


@richest
@every_kind
def test_checkpoints_and_copies_go_on_with_the_same_bits(case, way, dtype, backend):
    """Loaded into an optimizer without the options, too: they are in the checkpoint."""
    options = WAYS[way][0]
    values, grads = draw([(5,), (67, 65), ()], 4, dtype)
    params, opt = train(case.ours, values, grads[:2], **options)
    stored = [{k: bits(v) for k, v in opt.state[p].items()} for p in params]
    twins = [*copies_of(opt, case.ours)]
    for twin in twins:
        ps = twin.param_groups[0]["params"]
        assert twin.param_groups[0].items() >= options.items()
        assert [{k: bits(v) for k, v in twin.state[p].items()} for p in ps] == stored
    step_through(opt, params, grads[2:])
    for twin in twins:
        step_through(twin, twin.param_groups[0]["params"], grads[2:])
        assert snapshot(twin)[:2] == snapshot(opt)[:2]


@richest
@pytest.mark.parametrize(
    ("dtype", "declared"), [(BF16, F32), (F32, BF16), (F16, "8bit"), (F32, "8bit")], ids=str
)
@pytest.mark.parametrize("at_once", [True, False], ids=["at_once", "one_by_one"])
def test_a_stock_checkpoint_is_converted(case, dtype, declared, at_once, backend):
    values, grads = draw([(5,), (67, 65)], 4, dtype)
    (_, _), stock = train(case.stock, values, grads[:2])
    params = [leaf(p) for p in stock.param_groups[0]["params"]]
    opt = case.ours(params, state_dtype=declared)
    opt.load_state_dict(stock.state_dict())
    assert opt.param_groups[0]["state_dtype"] == declared
    twins, twin = twin_of(case, opt, params)
    first, second = grads[2]
    now = [[first, second]] if at_once else [[first, None], [None, second]]
    step_through(opt, params, now)
    step_through(twin, twins, now)
    for p, q in zip(params, twins, strict=True):
        for key, value in numbers(opt.state[p]).items():
            assert opt.state[p][key].dtype == dtype_of(case, key, p, opt.param_groups[0]), key
            coarse = 0.03 if is_code(opt.state[p][key]) else 0.01
            expected = twin.state[q][key]
            assert ((value - expected).abs() <= coarse * expected.abs().max()).all(), key
    step_and_check(case, opt, params, grads[3])


@richest
def test_groups_that_differ(case, backend):
    """In one step; a stock checkpoint does not make them alike."""
    dtypes = (BF16, F16, F32, BF16, BF16)
    options = [
        {"state_dtype": "8bit", "master_weights": "split"},
        {"state_dtype": F32, "ema": 0.5},
        {"ema": 0.9},
        {"rounding": "stochastic", "state_dtype": None},
        {"state_dtype": BF16},
    ]
    values, grads = draw([(67, 65)] * 5, 3)
    values = [v.to(d) for v, d in zip(values, dtypes, strict=True)]
    grads = [[g.to(d) for g, d in zip(now, dtypes, strict=True)] for now in grads]

    def build(params):
        groups = [{"params": [p], **more} for p, more in zip(params, options, strict=True)]
        return case.ours(groups, state_dtype=F16)

    torch.manual_seed(1)
    params, opt = train(build, values, grads)
    for at, more in enumerate(options):
        torch.manual_seed(1)
        (alone,), other = train(
            case.ours,
            values[at : at + 1],
            [now[at : at + 1] for now in grads],
            **{"state_dtype": F16, **more},
        )
        assert_bits(params[at], alone)
        for key, value in other.state[alone].items():
            assert_bits(opt.state[params[at]][key], value, key)
    _, stock = train(
        lambda ps: case.stock([{"params": [p]} for p in ps]), [v.float() for v in values], grads
    )
    opt.load_state_dict(stock.state_dict())
    for group, more in zip(opt.param_groups, options, strict=True):
        for name, value in {"state_dtype": F16, **more}.items():
            assert group[name] == value


@richest
@every_kind
def test_options_switched_on_and_off_by_hand(case, way, dtype, backend):
    """In the group, between steps. What is off leaves its state alone and is not updated."""
    options = WAYS[way][0]
    values, grads = draw([(5,), (67, 65)], 7, dtype)
    params, opt = train(case.ours, values, grads[:1])
    group = opt.param_groups[0]
    group.update(options)
    step_through(opt, params, grads[1:2])
    for p in params:
        kept = {k: v.dtype for k, v in opt.state[p].items() if k in SLOTS}
        assert kept == {k: dtype_of(case, k, p, options) for k in kept}
    step_and_check(case, opt, params, grads[2])
    for name in options:
        group[name] = None
    left = {k: bits(v) for k, v in opt.state[params[1]].items() if k in formats.EXTRAS}
    step_through(opt, params, grads[3:4])
    assert left == {k: bits(v) for k, v in opt.state[params[1]].items() if k in formats.EXTRAS}
    for name in options:
        del group[name]
    step_through(opt, params, grads[4:5])
    group.update(options)
    for now in grads[5:]:
        step_and_check(case, opt, params, now)


@every_name
def test_small_tensors_have_no_codes(name, backend):
    case = Case(name, {"momentum": 0.5} if name == "SGD" else {})
    params, opt = train(
        case.ours, *draw([(4095,), (4096,), (63, 65), (64, 64)], 1), state_dtype="8bit"
    )
    for p in params:
        kept = {k: v for k, v in opt.state[p].items() if k in SLOTS}
        assert kept and all(is_code(v) == (p.numel() >= 4096) for v in kept.values())
        assert [k for k in opt.state[p] if k.endswith("_scale")] == [
            f"{k}_scale" for k in kept if p.numel() >= 4096
        ]


# Masters --------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize(
    ("kind", "dtype"), [("split", BF16), ("fp32", BF16), ("fp32", F16)], ids=str
)
def test_masters_are_training_in_float32(case, kind, dtype, backend):
    """Bit for bit, the moments too; the weight of the forward is the master rounded."""
    values, grads = draw([(), (33,), (0,), (17, 65), (4097,)], 5, dtype)
    grads[2][1] = None
    wide = [[None if g is None else g.float() for g in now] for now in grads]
    copies, plain = train(case.ours, [v.float() for v in values], wide)
    params = [leaf(v) for v in values]
    opt = case.ours(params, master_weights=kind, state_dtype=F32)
    for now in grads:
        step_through(opt, params, [now])
    for p, q in zip(params, copies, strict=True):
        state = opt.state[p]
        rounded = nearest_away(q.detach()) if kind == "split" else q.detach().to(dtype)
        assert_bits(value_of(p, state), q.detach())
        assert_bits(p, rounded)
        for key, value in plain.state.get(q, {}).items():
            assert_bits(state[key], value, key)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """tests/native/storage.cpp over csrc/storage/, as functions."""
    compiler = shutil.which("g++")
    if compiler is None:
        skip_or_fail("no g++")
    target = tmp_path_factory.mktemp("native") / "storage.so"
    source = Path(__file__).parent / "native" / "storage.cpp"
    fast = ["-O3", "-march=native", "-fno-trapping-math", "-Wno-unknown-pragmas"]
    done = subprocess.run(
        [compiler, "-std=c++17", *fast, "-shared", "-fPIC", str(source), "-o", str(target)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    module = ctypes.CDLL(str(target))
    word = ctypes.c_uint64
    module.wrong_masters.argtypes, module.wrong_masters.restype = [word, word], word
    module.philox_words.argtypes = [word, word, word, ctypes.c_void_p]
    pointer = ctypes.c_void_p
    module.split_masters.argtypes = [pointer, ctypes.c_int64, pointer, pointer]
    module.join_masters.argtypes = [pointer, pointer, ctypes.c_int64, pointer]
    return module


def test_every_float32_is_a_master(library):
    """All 2^32 of them: parameter and remainder give back every one that is no NaN, every NaN stays
    one and is seen as one, and no bfloat16 is nearer to the master than the parameter."""
    part = 2**28
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wrong = pool.map(lambda at: library.wrong_masters(at, at + part), range(0, 2**32, part))
        assert sum(wrong) == 0


def special_numbers():
    """float32 of every exponent and around every rounding, and any bits at all."""
    edges = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    high = torch.arange(2**16)
    if SEED % 2:  # half of them, which half changes
        high = high.flip(0)
    pattern = (high[::2, None] * 2**16 + edges).reshape(-1)
    return from_bits(torch.cat([pattern, torch.randint(2**32, (300_000,))]), F32)


def test_the_python_masters_are_those_of_the_module(library):
    masters = special_numbers()
    params, remainders = (torch.empty(len(masters), dtype=torch.int16) for _ in range(2))
    count = len(masters)
    library.split_masters(masters.data_ptr(), count, params.data_ptr(), remainders.data_ptr())
    param, remainder = formats.split(masters)
    assert bits(param) == bits(params.view(BF16)) and bits(remainder) == bits(remainders)
    assert bits(param) == bits(nearest_away(masters))
    # Any pair: also those that no master has, because the parameter is somebody else's.
    remainders = remainders[torch.randperm(count)]
    found = torch.empty(count)
    library.join_masters(params.data_ptr(), remainders.data_ptr(), count, found.data_ptr())
    assert bits(formats.join(params.view(BF16), remainders)) == bits(found)
    assert torch.equal(found.isnan(), params.view(BF16).isnan())


def test_masters_of_all_kinds_are_loaded_and_stored(backend):
    """By a step that changes nothing, and so gives back what it was given."""
    masters = special_numbers()
    param, remainder = formats.split(masters)
    p = leaf(param)
    opt = fusedopt.SGD([p], lr=0.0, master_weights="split", ema=0.0)
    p.grad = torch.ones_like(p)
    opt.step()
    opt.state[p]["master_remainder"].copy_(remainder)
    opt.step()
    assert bits(p) == bits(param)
    assert bits(opt.state[p]["master_remainder"]) == bits(remainder)
    finite = masters.isfinite()
    p = leaf(torch.zeros(int(finite.sum()), dtype=F16))
    opt = fusedopt.SGD([p], lr=0.0, master_weights="fp32")
    p.grad = torch.ones_like(p)
    opt.step()
    opt.state[p]["master"].copy_(masters[finite])
    p.data.copy_(masters[finite])
    opt.step()
    assert_bits(opt.state[p]["master"], masters[finite])
    assert_bits(p, masters[finite].to(F16))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("split", BF16), ("fp32", BF16), ("fp32", F16)], ids=str
)
@pytest.mark.parametrize("change", ["copy_", "zero_", "load_state_dict", "one element"])
@richest
def test_a_parameter_that_somebody_else_wrote(case, kind, dtype, change, backend):
    """It counts from then on; with a split master up to the half unit that the remainder is."""
    model = nn.Linear(33, 5, bias=False).to(dtype)
    param = model.weight
    opt = case.ours([param], master_weights=kind, state_dtype=F32)
    for _ in range(3):
        param.grad = gradient_like(param)
        opt.step()
    master, before = value_of(param, opt.state[param]).clone(), param.detach().clone()
    other = torch.randn(5, 33).to(dtype)
    if change == "copy_":
        param.data.copy_(other)
    elif change == "zero_":
        param.data.zero_()
    elif change == "one element":
        param.data[2, 3] = 7
    else:
        model.load_state_dict({"weight": other})
    changed = param.detach() != before
    expected = param.detach().float().where(changed, master)
    exact = leaf(expected, F64)
    oracle = case.exact([exact])
    oracle.state[exact] = {
        k: v.clone().double() for k, v in opt.state[param].items() if k in SLOTS or k == "step"
    }
    param.grad = gradient_like(param)
    exact.grad = param.grad.double()
    opt.step()
    oracle.step()
    found = value_of(param, opt.state[param])
    unit = torch.finfo(BF16).eps / 2 * expected.abs() * (changed if kind == "split" else 0)
    assert ((found - exact).abs() <= unit + 1e-5 + 1e-5 * exact.abs()).all()


def test_parameters_that_are_set_to_special_values(backend):
    """A remainder of the past makes none of them another one."""
    special = torch.tensor(
        [0.0, -0.0, INF, -INF, NAN, 1.0, 2.0, 2.0**-126, 1e-40, 3.3e38]
    ).bfloat16()
    for _ in range(4):
        p = leaf(torch.randn(len(special) * 16).bfloat16())
        opt = fusedopt.SGD([p], lr=0.01, master_weights="split")
        step_through(opt, [p], [[torch.randn_like(p)] for _ in range(3)])
        p.data.copy_(special.repeat(16))
        p.grad = torch.ones_like(p)
        opt.param_groups[0]["lr"] = 0.0
        opt.step()
        assert_bits(p, special.repeat(16))


def test_masters_of_other_dtypes_are_not_there(backend):
    for dtype in (F32, F64):
        for kind in ("split", "fp32"):
            (p,), opt = train(fusedopt.Adam, *draw([(5,)], 2, dtype), master_weights=kind)
            assert set(opt.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
    (p,), opt = train(fusedopt.Adam, *draw([(5,)], 2), rounding="stochastic")
    assert set(opt.state[p]) == {"step", "exp_avg", "exp_avg_sq"}


# Stochastic rounding --------------------------------------------------------------------------

# Random123's known answers for philox4x32 with 10 rounds: four words of the counter, two of the
# key, four of the result.
KNOWN = [
    f"{4 * '00000000 '}{2 * '00000000 '}6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    f"{4 * 'ffffffff '}{2 * 'ffffffff '}408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
]


@pytest.mark.parametrize("known", KNOWN)
def test_philox(known, library):
    """The lower half of the counter is the block, the upper the step, the lowest word first."""
    c0, c1, c2, c3, k0, k1, *expected = (int(word, 16) for word in known.split())
    key, step, block = k0 + (k1 << 32), c2 + (c3 << 32), c0 + (c1 << 32)
    words = (ctypes.c_uint32 * 4)()
    library.philox_words(key, step, block, words)
    assert list(words) == expected
    assert philox(key, step, [block])[0].tolist() == expected


def test_the_python_philox_is_that_of_the_module(library):
    for count in (0, 1, 7, 8, 9, 1001):
        key, step = (int(torch.randint(2**62, ())) for _ in range(2))
        words = (ctypes.c_uint32 * 4)()
        expected = []
        for block in range((count + 7) // 8):
            library.philox_words(key, step, block, words)
            expected += [half for word in words for half in (word & 0xFFFF, word >> 16)]
        assert formats.random_bits(key, step, count).tolist() == expected[:count]
        assert noise(key, step, count).tolist() == expected[:count]


def test_rounding_of_special_values(backend):
    """What is infinite or NaN stays; what is beyond the largest may become infinite; denormals are
    rounded like all others. Over chunks and blocks."""
    usual, small = [0.0, -0.0, 1.0, -2.0], [1e-40, -1e-42, 1.1754943e-38]
    special = torch.tensor([*usual, *small, INF, -INF, NAN, 3.3895e38, -3.3895e38])
    values = special.repeat_interleave(9000)[torch.randperm(9000 * len(special))].bfloat16()
    grads = torch.randn(len(values)).bfloat16()
    p = leaf(values)
    opt = fusedopt.SGD([p], lr=0.37, rounding="stochastic")
    p.grad = grads
    for at, lr in enumerate((0.37, 0.0, 0.37)):
        before = p.detach().clone()
        opt.param_groups[0]["lr"] = lr
        opt.step()
        seed, count = opt.state[p]["rounding_state"].tolist()
        assert count == at + 1 and 0 <= seed < 2**62
        exact = before.float() - torch.tensor(lr) * grads.float()
        assert_bits(p, rounded_at_random(exact, torch.tensor([seed, at])))
        assert torch.equal(p.isnan(), values.isnan())
        if lr == 0.0:  # what needs no rounding is not rounded
            assert ((p == before) | p.isnan()).all()


def test_rounding_is_unbiased(backend):
    """Up as often as the share of the gap that the value is above the lower neighbour."""
    lower = torch.tensor([1.0, -1.0, 1.5, -37.0, 2.0**-130, 255.0])
    shares = torch.tensor([0x0400, 0x4000, 0x7FFF, 0x8000, 0xC001, 0xFC00])
    grid, times, rounds = torch.cartesian_prod(torch.arange(6), torch.arange(6)), 2500, 4
    low, share = (column.repeat_interleave(times) for column in grid.unbind(1))
    low, share = lower[low], shares[share]
    exact, high = (from_bits(int_bits(low) + more, F32) for more in (share, 0x10000))
    ups = torch.zeros(len(grid), dtype=F64)
    for _ in range(rounds):
        p = leaf(low.bfloat16())
        # A float32 momentum moves the parameter to any value.
        opt = fusedopt.SGD([p], lr=1.0, momentum=1.0, rounding="stochastic", state_dtype=F32)
        opt.state[p]["momentum_buffer"] = low - exact
        step_through(opt, [p], [[torch.zeros_like(p)]])
        assert ((p == low) | (p == high)).all()
        ups += (p == high).view(-1, times).sum(1)
    chance, count = shares[grid[:, 1]].double() / 2**16, rounds * times
    assert ((ups - count * chance).abs() <= 6 * (count * chance * (1 - chance)).sqrt()).all()


def test_small_steps_are_not_lost(backend):
    """To nearest, a thousandth of 1 never leaves it."""
    runs = {}
    for rounding in (None, "stochastic"):
        p = leaf(torch.ones(20_000, dtype=BF16))
        opt = fusedopt.SGD([p], lr=1e-3, rounding=rounding)
        p.grad = torch.ones_like(p)
        for _ in range(40):
            opt.step()
        runs[rounding] = p.detach().double().mean().item()
    assert runs[None] == 1.0
    # Steps are up or down by 2^-8 at most: the mean of so many is within 6 of its deviations.
    assert abs(runs["stochastic"] - 0.96) < 6 * 2**-8 * math.sqrt(40 * 0.25 / 20_000)


@richest
def test_rounding_is_reproducible(case, backend):
    """By the seed of torch; every tensor has random bits of its own."""
    values, grads = draw([(300,), (300,), (17, 9)], 3, BF16)
    values[1], grads = values[0].clone(), [[now[0], now[0], now[2]] for now in grads]

    def run(number):
        torch.manual_seed(number)
        return train(case.ours, values, grads, rounding="stochastic")

    params, opt = run(3)
    assert snapshot(opt) == snapshot(run(3)[1])
    assert bits(params[0]) != bits(run(4)[0][0]) and bits(params[0]) != bits(params[1])
    seeds = {opt.state[p]["rounding_state"][0].item() for p in params}
    assert len(seeds) == 3


@richest
def test_rounding_does_not_depend_on_the_order_of_parameters(case, backend):
    values, grads = draw([(300,), (33,), (17, 9), (5000,)], 4, BF16)
    params, opt = train(case.ours, values, grads[:2], rounding="stochastic", state_dtype="8bit")
    other = copy.deepcopy(opt)
    moved = other.param_groups[0]["params"]
    step_through(opt, params, grads[2:])
    order = [2, 0, 3, 1]
    there = list(moved)
    moved[:] = [there[i] for i in order]
    step_through(other, [there[i] for i in order], [[now[i] for i in order] for now in grads[2:]])
    for p, q in zip(params, there, strict=True):
        assert_bits(p, q)
        for key, value in opt.state[p].items():
            assert_bits(other.state[q][key], value, key)


# 8 bits ---------------------------------------------------------------------------------------


def coded(values, dtype):
    """Codes and scales of float32 values: of SGD's momentum after one step, or of Adagrad's sum,
    the squares of the values. By hand, so that small tensors have them, too."""
    p = leaf(torch.zeros_like(values))
    opt, key = fusedopt.SGD([p], lr=0.0, momentum=0.5), "momentum_buffer"
    if dtype == torch.uint8:
        opt, key = fusedopt.Adagrad([p], lr=0.0), "sum"
    opt.state[p][key] = torch.zeros_like(values, dtype=dtype)
    opt.state[p][f"{key}_scale"] = torch.zeros(math.ceil(values.numel() / 64))
    step_through(opt, [p], [[values]])
    assert opt.state[p][key].dtype == dtype
    return opt.state[p][key], opt.state[p][f"{key}_scale"]


def hard_values(count):
    """Blocks of every size of numbers, of zeros, with something that is not finite, and between."""
    values = torch.randn(count)
    blocks = in_blocks(values)
    kind = torch.randint(12, (len(blocks), 1))
    blocks = blocks * 10.0 ** torch.randint(-18, 18, (len(blocks), 1))
    blocks = torch.where(kind == 0, 0.0, blocks)
    one = torch.randint(64, (len(blocks), 1)) == torch.arange(64)
    for at, what in enumerate((INF, NAN, -INF, 3e38, 1e-44, -0.0)):
        blocks = torch.where((kind == at + 1) & one, what, blocks)
    blocks = torch.where(kind == 7, blocks.sign() * 1e-42, blocks)  # denormal, all of it
    blocks = torch.where(kind == 8, torch.where(one, 1.0, 0.0), blocks)
    blocks = torch.where(kind == 9, 1.0, blocks)
    spread = 10.0 ** -torch.linspace(0, 12, 64)
    blocks = torch.where(kind == 10, blocks.sign() * spread, blocks)
    return blocks.view(-1)[:count].clone()


COUNTS = [1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 4095, 4096, 4097, 4160, 40_001]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_codes_are_the_same_everywhere(dtype, kernels):
    for count in COUNTS:
        values = hard_values(count)
        found = []
        for module in (fusedopt.backend.native, kernels, None):
            with mock.patch.object(fusedopt.backend, "native", module):
                found.append(coded(values, dtype))
        for codes, scale in found[1:]:
            assert_bits(codes, found[0][0], f"{count} codes")
            assert_bits(scale, found[0][1], f"{count} scales")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_codes_are_near(dtype, backend):
    for count in COUNTS:
        values = hard_values(count)
        codes, scale = coded(values, dtype)
        stored = values if dtype == torch.int8 else values * values
        random = None if dtype == torch.int8 else noise(0x66757365646F7074, 1, count)
        assert_codes(codes, scale, stored, random)
        found, exact = decoded(codes, scale), stored.double()
        fine = (scale > 1e-30) & scale.isfinite()
        fine = fine.repeat_interleave(64)[:count]
        largest = scale.double().repeat_interleave(64)[:count]
        power = 0.5 if dtype == torch.int8 else 0.25
        step = 0.5 / 127 if dtype == torch.int8 else 1 / 255
        error = (found / largest).abs() ** power - (exact / largest).abs() ** power
        assert (error[fine].abs() <= step * 1.001).all()
        assert (found * exact >= 0)[fine].all()
        # The module's own decoding, which may differ in the last bits.
        again = formats.decode(codes, scale).double()
        assert ((again - found).abs()[fine] <= 1e-6 * found.abs()[fine] + 1e-45).all()
        assert (again[~fine & ~largest.isfinite()].isfinite() == 0).all()


def test_a_second_moment_never_becomes_zero(backend):
    values = 10.0 ** torch.empty(5000).uniform_(-9, 0)
    codes, scale = coded(values, torch.uint8)
    assert (formats.decode(codes, scale) > 0).all()
    for name in ("Adam", "RMSprop"):  # and the steps are no larger for it
        p = leaf(torch.zeros(4096))
        opt = getattr(fusedopt, name)([p], lr=0.1, state_dtype="8bit")
        for _ in range(3):
            before = p.detach().clone()
            p.grad = 10.0 ** torch.empty(4096).uniform_(-9, 0)
            opt.step()
        assert ((p - before).abs() <= 1.5).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_codes_of_a_value_that_does_not_change_stay(dtype, backend):
    """All codes at all sizes of scales. A step with the momentum 1 and a gradient of 0 changes no
    buffer, and one with a gradient of 0 no sum."""
    p = leaf(torch.zeros(80 * 64))
    opt, key = fusedopt.SGD([p], lr=0.0, momentum=1.0), "momentum_buffer"
    codes = torch.arange(-127, 129).repeat(20).view(80, 64)
    if dtype == torch.uint8:
        opt, key = fusedopt.Adagrad([p], lr=0.0), "sum"
        codes = codes + 127
    codes[:, 5] = torch.iinfo(dtype).max
    codes = codes.clamp(max=torch.iinfo(dtype).max).to(dtype).view(-1)
    scales = 2.0 ** torch.empty(80).uniform_(-80, 100)
    opt.state[p] |= {key: codes.clone(), f"{key}_scale": scales.clone()}
    p.grad = torch.zeros_like(p)
    for _ in range(150):
        opt.step()
    assert_bits(opt.state[p][key], codes)
    assert_bits(opt.state[p][f"{key}_scale"], scales)


@pytest.mark.parametrize("size", [0.0, 1.5])
def test_small_changes_of_second_moments_arrive_on_average(size, backend):
    """With the decay of 0.999 a step changes less than half a code: to nearest, nothing would move.
    The mean of many is that without codes, up to 1.5 of a change for each code that there is below
    it, as codes are evenly spaced in the fourth root and not in the value."""
    first = torch.empty(64 * 200).uniform_(0.5, 1.0)
    ends = []
    for more in ({"state_dtype": "8bit"}, {}):
        p = leaf(torch.zeros_like(first))
        opt = fusedopt.RMSprop([p], lr=0.0, alpha=0.0, **more)
        step_through(opt, [p], [[first]])
        start = numbers(opt.state[p])["square_avg"].mean()
        opt.param_groups[0]["alpha"] = 0.999
        step_through(opt, [p], [[first * size]] * 100)
        ends.append(numbers(opt.state[p])["square_avg"].mean() / start - 1)
    assert abs(ends[1]) > 0.09
    assert abs(ends[0] - ends[1]) < 0.005


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_bytes_of_a_parameter(name, backend):
    (p,), opt = train(
        getattr(fusedopt, name),
        *draw([(512, 129)], 2, BF16),
        master_weights="split",
        state_dtype="8bit",
    )
    tensors = [p, p.grad, *(v for v in opt.state[p].values() if v.ndim)]
    assert {v.dtype for v in tensors} == {BF16, torch.int16, torch.int8, torch.uint8, F32}
    assert sum(t.untyped_storage().nbytes() for t in tensors) / p.numel() <= 8.3


def test_centered_variances_are_not_negative(backend):
    """The mean of gradients is almost all of their mean square."""
    p = leaf(torch.zeros(4096))
    opt = fusedopt.RMSprop([p], lr=1e-3, centered=True, momentum=0.5, state_dtype="8bit")
    opt.state[p] = {
        "step": torch.tensor(1000.0),
        "square_avg": torch.full((4096,), 1.0001),
        "grad_avg": torch.ones(4096),
        "momentum_buffer": torch.zeros(4096),
    }
    for _ in range(5):
        p.grad = 1 + 0.01 * torch.randn(4096)
        opt.step()
    assert p.isfinite().all()
    assert is_code(opt.state[p]["momentum_buffer"]) and not is_code(opt.state[p]["grad_avg"])


# The average ----------------------------------------------------------------------------------


@every_loop
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16, torch.complex64], ids=str)
def test_ema_against_an_oracle(case, dtype, backend):
    """In float64, of the parameters that were there after each step."""
    values, grads = draw([(33,), (2, 3), (), (0,), (4,)], 5, dtype)
    grads[2][1] = grads[0][2] = None
    for now in grads:
        now[4] = None
    half = dtype.itemsize == 2
    more = {"master_weights": "fp32"} if half else {}
    params = [leaf(v) for v in values]
    opt = case.ours([{"params": params[:2]}, {"params": params[2:], "ema": 0.5}], ema=0.9, **more)
    wide = torch.complex128 if dtype.is_complex else F64
    averages = [v.to(wide) for v in values]
    for now in grads:
        step_through(opt, params, [now])
        for i, (p, g) in enumerate(zip(params, now, strict=True)):
            if g is not None:
                seen = opt.state[p]["master"] if half else p.detach()
                averages[i] += (0.1 if i < 2 else 0.5) * (seen.to(wide) - averages[i])
    for i, (ours, p) in enumerate(zip(opt.ema_parameters(), params, strict=True)):
        assert ours.dtype == (F32 if half else dtype) if i != 4 else ours is p
        if i == 4:
            assert p not in opt.state or "ema" not in opt.state[p]
            continue
        assert_near(ours, averages[i], dtype=torch.float32 if half else dtype)


@richest
@every_kind
def test_swapping_in_and_out(case, way, dtype, backend):
    """Parameters hold their averages, and then every bit is what it was; training goes on as if
    nothing had been."""
    options = {**WAYS[way][0], "ema": 0.7}
    values, grads = draw([(33,), (67, 65), ()], 4, dtype)
    for now in grads:
        now[2] = None
    params, opt = train(case.ours, values, grads[:2], **options)
    twin = copy.deepcopy(opt)
    before = snapshot(opt)
    with opt.swap_ema():
        for p, average in zip(params, opt.ema_parameters(), strict=True):
            assert_bits(p, average.to(dtype))
        assert bits(params[0]) != before[0][0]
        with pytest.raises(RuntimeError, match="swap_ema"):
            step_through(opt, params, grads[2:3])
    assert snapshot(opt) == before
    with pytest.raises(ZeroDivisionError), opt.swap_ema():
        raise ZeroDivisionError
    assert snapshot(opt) == before
    step_through(opt, params, grads[2:])
    step_through(twin, twin.param_groups[0]["params"], grads[2:])
    assert snapshot(opt)[:2] == snapshot(twin)[:2]


def test_nested_swaps(backend):
    (p,), opt = train(fusedopt.SGD, *draw([(33,)], 2), lr=1.0, ema=0.5)
    before = snapshot(opt)
    with opt.swap_ema():
        inside = snapshot(opt)
        with pytest.raises(ZeroDivisionError), opt.swap_ema():
            assert snapshot(opt) == inside
            raise ZeroDivisionError
        assert snapshot(opt) == inside
        with pytest.raises(RuntimeError, match="swap_ema"):
            opt.step()
    assert snapshot(opt) == before
    opt.step()
    assert snapshot(opt) != before


def test_averages_of_some_groups(backend):
    values, grads = draw([(3,), (4,), (5,)], 2)
    params = [leaf(v) for v in values]
    opt = fusedopt.Adam([{"params": params[:1]}, {"params": params[1:], "ema": 0.5}])
    step_through(opt, params, grads)
    opt.state[params[0]]["ema"] = torch.arange(3)  # a program's own
    first, *others = opt.ema_parameters()
    assert first is params[0]
    assert all(o is opt.state[p]["ema"] for o, p in zip(others, params[1:], strict=True))
    before = snapshot(opt)
    with opt.swap_ema():
        assert snapshot(opt)[0][0] == before[0][0] and snapshot(opt)[0][1:] != before[0][1:]
    assert snapshot(opt) == before
    plain = fusedopt.Adam(params)
    with pytest.raises(ValueError, match="ema="):
        next(plain.ema_parameters())
    with pytest.raises(ValueError, match="ema="), plain.swap_ema():
        pass


@richest
def test_a_decay_that_changes(case, backend):
    values, grads = draw([(33,)], 4)
    (p,), opt = [leaf(v) for v in values], None
    opt = case.ours([p], ema=0.0)
    average = values[0].double()
    for decay, now in zip((0.0, 0.5, 0.9, 0.1), grads, strict=True):
        opt.param_groups[0]["ema"] = decay
        step_through(opt, [p], [now])
        average += (1 - decay) * (p.detach().double() - average)
    assert_near(next(iter(opt.ema_parameters())), average)


# Together -------------------------------------------------------------------------------------


def outcome(opt):
    """What a step wrote; a NaN is a NaN."""
    return [
        {"param": p, **opt.state.get(p, {})} for group in opt.param_groups for p in group["params"]
    ]


def assert_same_outcome(ours, expected):
    for i, (here, there) in enumerate(zip(outcome(ours), outcome(expected), strict=True)):
        assert here.keys() == there.keys()
        for key in here:
            assert_bits(here[key], there[key], f"{key} of tensor {i}")


@every_loop
@every_way
def test_the_kernels_store_the_bits_of_the_cpu(case, way, dtype, kernels):
    """With clipping, a loss scale, a skipped step, late gradients; also counting on the device."""
    values, grads = draw([*SIZES, (16_385,)], 4, dtype)
    grads[0][4] = grads[0][6] = grads[1][1] = None
    ends = []
    for module, capturable in ((fusedopt.backend.native, False), (kernels, False), (kernels, True)):
        torch.manual_seed(SEED)
        with mock.patch.object(fusedopt.backend, "native", module):
            params = [leaf(v) for v in values]
            more = {"capturable": True} if capturable else {}
            opt = case.ours(params, max_grad_norm=40.0, amp_fused=True, **more, **WAYS[way][0])
            opt.grad_scale = torch.tensor(2.0)
            for at, now in enumerate(grads):
                opt.found_inf = torch.tensor(float(at == 2))
                step_through(opt, params, [now])
        ends.append(opt)
    assert_same_outcome(ends[1], ends[0])
    assert_same_outcome(ends[2], ends[0])


@richest
@every_kind
def test_no_step_takes_the_python_rule(case, way, dtype, kernels):
    """Of dense parameters: all of them go in the one call."""
    for module in (fusedopt.backend.native, kernels):
        with mock.patch.object(fusedopt.backend, "native", module):
            values, grads = draw(SIZES, 3, dtype)
            params = [leaf(v) for v in values]
            opt = case.ours(params, **WAYS[way][0])
            with seam.no_python_steps(opt):
                step_through(opt, params, grads)
            assert seam.has_plan(opt)
            launches = kernels.num_launches()
            opt.step()
            # One for what is stored as it is, and one for the rest.
            assert kernels.num_launches() - launches <= 2 * (module is kernels)


@every_case
@pytest.mark.parametrize(("kind", "dtype"), [("split", BF16), ("fp32", F16)], ids=str)
def test_clipping(case, kind, dtype, backend):
    """With masters it is that of a float32 copy, bit for bit."""
    values, grads = draw([(33,), (67, 65)], 3, dtype)
    wide = [[g.float() for g in now] for now in grads]
    copies, plain = train(case.ours, [v.float() for v in values], wide, max_grad_norm=50.0)
    options = {"master_weights": kind, "state_dtype": F32}
    params, opt = train(case.ours, values, grads, max_grad_norm=50.0, **options)
    assert plain.grad_norm > 50
    assert bits(opt.grad_norm) == bits(plain.grad_norm)
    for p, q in zip(params, copies, strict=True):
        assert_bits(value_of(p, opt.state.get(p, {})), q.detach())


@richest
@every_kind
def test_a_skipped_step_moves_nothing(case, way, dtype, backend):
    """No codes, masters, averages, and no random bits are used up."""
    values, grads = draw([(5,), (67, 65)], 4, dtype)
    params = [leaf(v) for v in values]
    opt = case.ours(params, amp_fused=True, **WAYS[way][0])
    opt.found_inf = torch.tensor(1.0)
    first = [bits(p) for p in params]
    step_through(opt, params, grads[:1])
    assert [bits(p) for p in params] == first
    for now in grads:
        opt.found_inf = torch.tensor(0.0)
        step_through(opt, params, [now])
        before = snapshot(opt)
        opt.found_inf = torch.tensor(1.0)
        opt.grad_scale = torch.tensor(4.0)
        step_through(opt, params, [[g * INF for g in now]])
        assert snapshot(opt) == before
        opt.grad_scale = None
    if "stochastic" not in way:
        _, plain = train(case.ours, values, grads, **WAYS[way][0])
        assert_same_outcome(opt, plain)


@richest
@pytest.mark.parametrize(
    ("way", "dtype", "fused"),
    [*((way, dtype, True) for way, dtype in KINDS), ("split, 8bit, ema", BF16, False)],
    ids=str,
)
def test_grad_scaler(case, way, dtype, fused, backend):
    """A scale that is a power of two changes no bit, except of float16 gradients, for whose sake
    there are scales."""
    runs = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2), None):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(65, 67), nn.Tanh(), nn.Linear(67, 2)).to(dtype)
        more = {"amp_fused": fused} if scaler else {}
        opt = case.ours(model.parameters(), **more, **WAYS[way][0])
        torch.manual_seed(5)
        for at in range(5):
            opt.zero_grad()
            loss = model(torch.randn(4, 65).to(dtype)).float().square().mean()
            if scaler is None:
                loss.backward()
                if at != 2:
                    opt.step()
                continue
            scaler.scale(loss).backward()
            if at == 2:
                model[0].weight.grad[0, 0] = INF
            scaler.step(opt)
            scaler.update()
        runs.append(opt)
    if dtype != F16:
        assert_same_outcome(*runs)
    for p, q in zip(*(opt.param_groups[0]["params"] for opt in runs), strict=True):
        assert_near(p, q)


@richest
@every_kind
def test_attached_to_the_backward(case, way, dtype, backend):
    """As an ordinary step after it."""
    runs = []
    for attach in (False, True):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(65, 67), nn.Tanh(), nn.Linear(67, 2)).to(dtype)
        build = getattr(fusedopt, case.name)
        options = {**copy.deepcopy(case.options), **WAYS[way][0]}
        if attach:
            opt = fusedopt.attach(model, build, **options)
        else:
            opt = build(model.parameters(), **options)
        for at in range(3):
            torch.manual_seed(at)
            model(torch.randn(4, 65).to(dtype)).float().square().mean().backward()
            opt.step()
            opt.zero_grad()
        runs.append(opt)
    if "stochastic" in way:  # seeds are drawn in the order of the backward
        counts = [opt.state[p]["rounding_state"][1] for p in model.parameters()]
        assert counts == [3] * len(counts)
    else:
        assert_same_outcome(runs[1], runs[0])


def test_a_backward_within_a_swap(backend):
    model = nn.Linear(3, 3)
    opt = fusedopt.attach(model, fusedopt.SGD, lr=0.1, ema=0.5)
    model(torch.ones(1, 3)).sum().backward()
    before = snapshot(opt)
    with opt.swap_ema(), pytest.raises(RuntimeError, match="swap_ema"):
        model(torch.ones(1, 3)).sum().backward()
    assert snapshot(opt) == before


@every_name
def test_options_that_torch_does_not_have(name, backend):
    for way, dtype in KINDS:
        _, opt = train(getattr(fusedopt, name), *draw([(5,)], 1, dtype), **WAYS[way][0])
        before = snapshot(opt)
        with pytest.raises(ValueError) as caught:
            fusedopt.to_torch(opt)
        assert all(option in str(caught.value) for option in WAYS[way][0])
        assert snapshot(opt) == before and type(opt) is getattr(fusedopt, name)
    values, grads = draw([(67, 65)], 3)
    (p,), stock = train(getattr(torch.optim, name), values, grads[:1])
    opt = fusedopt.from_torch(stock)
    opt.param_groups[0].update(ema=0.5, state_dtype="8bit")
    step_through(opt, [p], grads[1:])
    assert "ema" in opt.state[p]


@richest
@every_kind
def test_an_export_for_stock_torch(case, way, dtype, backend):
    """It loads there, has what torch's own has and nothing else, and training goes on."""
    values, grads = draw([(5,), (67, 65), (3,)], 4, dtype)
    for now in grads:
        now[2] = None
    params, opt = train(case.ours, values, grads[:2], **WAYS[way][0])
    before = snapshot(opt)
    file = io.BytesIO()
    torch.save(opt.state_dict(stock=True), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert snapshot(opt) == before
    copies = [leaf(p) for p in params]
    stock = case.stock(copies)
    _, trained = train(case.stock, values, grads[:2])
    theirs = trained.state_dict()
    assert [g.keys() for g in saved["param_groups"]] == [g.keys() for g in theirs["param_groups"]]
    assert saved["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        assert saved["state"][key].keys() == state.keys()
        assert all(saved["state"][key][k].shape == v.shape for k, v in state.items())
        assert all(v.is_floating_point() for v in saved["state"][key].values())
    stock.load_state_dict(saved)
    for p, q in zip(params, copies, strict=True):
        for key, value in numbers(opt.state.get(p, {})).items():
            assert_bits(stock.state[q][key], value.to(dtype), key)
    step_through(stock, copies, grads[2:])
    assert bits(copies[1]) != bits(params[1])
    assert all(q.isfinite().all() for q in copies)
    stock_again = case.ours([leaf(p) for p in params])
    stock_again.load_state_dict(saved)
    step_through(stock_again, stock_again.param_groups[0]["params"], grads[2:])


def _replace(opt, state):
    for key, value in state.items():
        state[key] = value.clone()


def _swap_data(opt, state):
    for value in state.values():
        value.data = value.data.clone()


def _move_to_a_shared_buffer(opt, state):
    """Misaligned, next to each other."""
    for key, value in state.items():
        buffer = torch.zeros(value.numel() + 3, dtype=value.dtype)
        state[key] = buffer[1:-2].view(value.shape).copy_(value)


def _reorder(opt, state):
    for key in sorted(state):
        state[key] = state.pop(key)


@richest
@every_kind
@pytest.mark.parametrize(
    "change", [_replace, _swap_data, _move_to_a_shared_buffer, _reorder], ids=lambda f: f.__name__
)
def test_state_that_moves_between_steps(case, way, dtype, change, backend):
    values, grads = draw([(33,), (67, 65)], 4, dtype)
    params, opt = train(case.ours, values, grads[:2], **WAYS[way][0])
    twin = copy.deepcopy(opt)
    for p in params:
        change(opt, opt.state[p])
    step_through(opt, params, grads[2:])
    step_through(twin, twin.param_groups[0]["params"], grads[2:])
    for p, q in zip(params, twin.param_groups[0]["params"], strict=True):
        assert_bits(p, q)
        for key, value in twin.state[q].items():
            assert_bits(opt.state[p][key], value, key)


@richest
@every_kind
def test_autograd_hears_of_every_tensor_that_is_written(case, way, dtype, backend):
    params, opt = train(case.ours, *draw([(33,), (67, 65)], 2, dtype), **WAYS[way][0])
    versions = [{k: v._version for k, v in state.items()} for state in outcome(opt)]
    grads = [(bits(p.grad), p.grad._version) for p in params]
    opt.step()
    for before, state in zip(versions, outcome(opt), strict=True):
        assert all(value._version > before[key] for key, value in state.items())
    assert grads == [(bits(p.grad), p.grad._version) for p in params]


@pytest.mark.parametrize(
    "case", [RICHEST_OF["SGD"], RICHEST_OF["Adam"]], ids=lambda case: case.name
)
@every_kind
def test_flags_of_torch_change_nothing(case, way, dtype, backend):
    values, grads = draw([(5,), (67, 65)], 3, dtype)
    ends = []
    for flags in ({}, {"foreach": True}, {"foreach": False}, {"fused": True}):
        torch.manual_seed(1)
        ends.append(train(case.ours, values, grads, **flags, **WAYS[way][0])[1])
    for opt in ends[1:]:
        assert_same_outcome(opt, ends[0])


@richest
@every_kind
def test_groups_and_gradients_that_come_late(case, way, dtype, backend):
    """Each begins at its own first step."""
    options = WAYS[way][0]
    values, grads = draw([(33,), (67, 65), (4100,)], 4, dtype)
    params = [leaf(v) for v in values]
    opt = case.ours([{"params": params[:2]}], **options)
    for at, now in enumerate(grads):
        if at == 2:
            opt.add_param_group({"params": params[2:]})
        for p, g in zip(params, now, strict=True):
            p.grad = g.clone()
        params[1].grad = params[1].grad if at else None
        opt.step()
    assert opt.param_groups[1].keys() == opt.param_groups[0].keys()
    for i, late in ((1, 1), (2, 2)):
        if "rounding" in options:
            assert opt.state[params[i]]["rounding_state"][1] == 4 - late
            continue
        (alone,), other = train(
            case.ours, values[i : i + 1], [now[i : i + 1] for now in grads[late:]], **options
        )
        assert_bits(params[i], alone)
        for key, value in other.state[alone].items():
            assert_bits(opt.state[params[i]][key], value, key)


@pytest.mark.parametrize("way", ["split", "master", "stochastic", "ema"])
def test_a_late_first_gradient_under_sgd_without_momentum(way, backend):
    """The rule keeps no state, the way to store does."""
    values, grads = draw([(33,), (65,)], 4, BF16)
    for now in grads[:2]:
        now[1] = None
    case = Case("SGD", {"lr": 0.1})
    params = [leaf(v) for v in values]
    opt = case.ours(params, **WAYS[way][0])
    for now in grads:
        step_and_check(case, opt, params, now)
    assert len(opt.state[params[1]]) == 1


@every_name
def test_sparse_gradients_are_an_error(name, backend):
    for way, dtype in KINDS:
        p, q = leaf(torch.ones(6, 4, dtype=dtype)), leaf(torch.ones(9, dtype=dtype))
        opt = getattr(fusedopt, name)([q, p], lr=0.1, **WAYS[way][0])
        for dense in (True, False):
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
            if not dense:
                p.grad = torch.sparse_coo_tensor([[0, 3]], torch.ones(2, 4, dtype=dtype), (6, 4))
            before = snapshot(opt)
            if dense:
                opt.step()
                continue
            with pytest.raises(RuntimeError, match="sparse"):
                opt.step()
            assert snapshot(opt) == before


@richest
def test_several_dtypes_in_one_group(case, backend):
    dtypes = [F32, BF16, F64, BF16, torch.complex64, F32, BF16]
    values = [torch.randn(67, 65, dtype=torch.complex128).to(d) for d in dtypes]
    grads = [[gradient_like(v, scale=1.0) for v in values] for _ in range(3)]
    options = {"state_dtype": "8bit", "master_weights": "split", "ema": 0.9}
    params, opt = train(case.ours, values, grads, **options)
    for i, p in enumerate(params):
        (alone,), other = train(
            case.ours, values[i : i + 1], [now[i : i + 1] for now in grads], **options
        )
        assert_bits(p, alone)
        for key, value in other.state[alone].items():
            assert_bits(opt.state[p][key], value, key)


@richest
def test_duplicates_and_overlaps(case, backend):
    """A parameter listed twice is updated twice, and views of one memory one after the other."""
    values, grads = draw([(67, 65)], 2)
    with pytest.warns(UserWarning, match="duplicate"):
        p = leaf(values[0])
        opt = case.ours([p, p], ema=0.5, state_dtype="8bit")
    step_through(opt, [p], grads)
    if "step" in opt.state[p]:
        assert opt.state[p]["step"] == 4
    base = torch.randn(6000).bfloat16()
    params = [base[:4500].detach().requires_grad_(), base[1500:].detach().requires_grad_()]
    opt = case.ours(params, rounding="stochastic", state_dtype="8bit", ema=0.5)
    step_through(opt, params, [[torch.ones(4500).bfloat16()] * 2] * 2)
    assert all(opt.state[p]["rounding_state"][1] == 2 for p in params)
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize(
    ("number", "capturable"),
    [(n, False) for n in (312, 313, 314, 700)] + [(n, True) for n in (289, 290, 291, 700)],
)
def test_more_tensors_than_a_launch_takes(number, capturable, kernels):
    """Eleven pointers of each go with the launch, or twelve, which has 32 KB for them."""
    values, grads = draw([(3,)] * number, 2, BF16)
    options = {"master_weights": "split", "ema": 0.5, "state_dtype": F32}
    _, plain = train(fusedopt.Adam, values, grads, **options)
    with mock.patch.object(fusedopt.backend, "native", kernels):
        params, opt = train(fusedopt.Adam, values, grads[:1], capturable=capturable, **options)
        launches = kernels.num_launches()
        step_through(opt, params, grads[1:])
        taken = kernels.num_launches() - launches
    assert_same_outcome(opt, plain)
    assert taken == 3 if number == 700 else taken in (1, 2)


def test_ten_thousand_small_tensors(backend):
    number = 10_000 if backend != "python" else 1000
    base = torch.randn(number, 3).bfloat16()
    params = [row.clone().requires_grad_() for row in base]
    opt = fusedopt.SGD(params, lr=0.5, master_weights="split", ema=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        opt.step()
    masters = base.float() - 1.0
    assert_bits(torch.stack([p.detach() for p in params]), nearest_away(masters))
    averages = torch.stack(list(opt.ema_parameters()))
    torch.testing.assert_close(averages, base.float() - 0.625, rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", ["split, 8bit, ema", "stochastic, 8bit, ema"])
def test_threads_do_not_matter(way, native, step_threads):
    values, grads = draw([(200_001,), (7,), (70_000,)], 2, BF16)
    ends = []
    for threads in (1, 3):
        step_threads(threads)
        torch.manual_seed(7)
        ends.append(train(fusedopt.Adam, values, grads, **WAYS[way][0])[1])
    assert_same_outcome(*ends)


INSTRUCTION_SETS = """
import hashlib, torch, fusedopt
from cases import RICHEST, bits
torch.manual_seed({seed})
digest = hashlib.sha256()
for options, dtype in (
    ({{"master_weights": "split", "state_dtype": "8bit", "ema": 0.9}}, torch.bfloat16),
    ({{"rounding": "stochastic", "state_dtype": torch.float16}}, torch.bfloat16),
    ({{"master_weights": "fp32", "state_dtype": "8bit"}}, torch.float16),
):
    for case in RICHEST:
        params = [torch.randn(n).to(dtype).requires_grad_() for n in (5, 4099, 9001)]
        opt = case.ours(params, **options)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
            opt.step()
        for p in params:
            for value in (p, *opt.state[p].values()):
                digest.update(bits(value)[3])
print(digest.hexdigest())
"""


def test_instruction_sets_agree(native):
    supported = {"DEFAULT": 1, "AVX2": 2}.get(torch.backends.cpu.get_cpu_capability(), 3)
    paths = [str(Path(fusedopt.__file__).parents[1]), str(Path(__file__).parent)]
    code = INSTRUCTION_SETS.format(seed=SEED)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "FUSEDOPT_CPU_ISA": isa},
            stdout=subprocess.PIPE,
            text=True,
        )
        for isa in ("baseline", "avx2", "avx512")[: supported - 1]
    ]
    with redirect_stdout(io.StringIO()) as here:  # with the widest set
        exec(code, {})
    for process in running:
        assert process.communicate()[0] == here.getvalue()
    assert len(here.getvalue()) == 65


# Errors ---------------------------------------------------------------------------------------

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
