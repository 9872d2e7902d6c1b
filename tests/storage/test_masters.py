"""Masters: training in float32, of which the parameter is the upper half or a copy."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import (
    SCALARS,
    bits,
    draw,
    every_case,
    gradient_like,
    leaf,
    richest,
    step_through,
    train,
)
from seam import formats
from stored import (
    BF16,
    F16,
    F32,
    F64,
    INF,
    NAN,
    SLOTS,
    assert_bits,
    nearest_away,
    special_numbers,
    value_of,
)
from torch import nn

import fusedopt

# Bit for bit the same as without options, which torch would compute.
pytestmark = pytest.mark.usefixtures("only_by_the_rule")


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


def test_every_float32_is_a_master(library):
    """All 2^32 of them: parameter and remainder give back every one that is no NaN, every NaN stays
    one and is seen as one, and no bfloat16 is nearer to the master than the parameter."""
    part = 2**28
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wrong = pool.map(lambda at: library.wrong_masters(at, at + part), range(0, 2**32, part))
        assert sum(wrong) == 0


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
        k: v.clone().double() for k, v in opt.state[param].items() if k in SLOTS or k in SCALARS
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
