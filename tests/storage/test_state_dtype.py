"""State in other dtypes: of which parameters, in checkpoints and copies, switched on and off."""

from __future__ import annotations

import pytest
import torch
from cases import (
    SCALARS,
    Case,
    bits,
    draw,
    every_name,
    leaf,
    richest,
    snapshot,
    step_through,
    train,
)
from seam import formats
from stored import (
    BF16,
    F16,
    F32,
    F64,
    SLOTS,
    WAYS,
    assert_bits,
    copies_of,
    dtype_of,
    every_kind,
    is_code,
    numbers,
    step_and_check,
    twin_of,
)

# Bit for bit the same as without options, which torch would compute.
pytestmark = pytest.mark.usefixtures("only_by_the_rule")


@richest
@pytest.mark.parametrize("dtype", [F64, torch.complex64], ids=str)
@pytest.mark.parametrize("declared", [BF16, "8bit"], ids=str)
def test_state_of_float64_and_complex_parameters_is_theirs(case, dtype, declared, backend):
    values, grads = draw([(5000,)], 3, dtype)
    plain = train(case.ours, values, grads)[1]
    (param,), opt = train(case.ours, values, grads, state_dtype=declared)
    assert snapshot(opt)[:2] == snapshot(plain)[:2]
    assert all(v.dtype == dtype for k, v in opt.state[param].items() if k not in SCALARS)


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
