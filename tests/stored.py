"""What the tests of storage share: options that store values in another way, and what then must be
stored, by an idea of the formats of their own that is compared bit for bit."""

from __future__ import annotations

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from cases import SCALARS, TABLES, bits, leaf
from conftest import SEED
from seam import formats
from torch import nn

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
INF, NAN = math.inf, math.nan
# Tensors below 4,096 elements have no codes. The last scales of these are of 64, 1 and 3 elements.
SIZES = [(), (5,), (0, 3), (4096,), (4097,), (67, 65)]
UNSIGNED = {key for table in TABLES.values() for key in table.unsigned}
SLOTS = {key for table in TABLES.values() for key in table.slots}

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
        count = {key: state[key].clone() for key in SCALARS if key in state}
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


def special_numbers():
    """float32 of every exponent and around every rounding, and any bits at all."""
    edges = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    high = torch.arange(2**16)
    if SEED % 2:  # half of them, which half changes
        high = high.flip(0)
    pattern = (high[::2, None] * 2**16 + edges).reshape(-1)
    return from_bits(torch.cat([pattern, torch.randint(2**32, (300_000,))]), F32)


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
