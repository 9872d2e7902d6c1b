"""A step with stored values is the same rule on float32 numbers, in any layout."""

from __future__ import annotations

import pytest
import seam
import torch
from cases import (
    LAYOUTS,
    SCALARS,
    bits,
    draw,
    every_loop,
    leaf,
    richest,
    step_through,
    train,
)
from stored import (
    BF16,
    F16,
    F32,
    F64,
    SIZES,
    SLOTS,
    WAYS,
    every_kind,
    every_way,
    flat,
    is_code,
    numbers,
    step_and_check,
    twin_of,
)

# Bit for bit the same as without options, which torch would compute.
pytestmark = pytest.mark.usefixtures("only_by_the_rule")
# The kernels have the bits of the native step: test_stored_together.py.
cpu_backends = pytest.mark.parametrize("backend", ["python", "native"], indirect=True)


@cpu_backends
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
                kept = {k: v for k, v in opt.state.get(p, {}).items() if k not in SCALARS}
                assert all(v.dtype == wide for v in kept.values())
                for ours, theirs in [(p, q), *((v, oracle.state[q][k]) for k, v in kept.items())]:
                    rounding = torch.finfo(ours.dtype).eps / 2 * theirs.detach().abs()
                    slack = 1e-5 + 1e-4 * theirs.detach().abs()
                    assert ((ours - theirs).detach().abs() <= rounding * 1.001 + slack).all()
                    theirs.data.copy_(ours.detach())


@cpu_backends
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
