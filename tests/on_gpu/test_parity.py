"""Values of stock, and the bits of the CPU."""

from __future__ import annotations

import pytest
import torch
from cases import (
    GRAD_LAYOUTS,
    LAYOUTS,
    RICHEST,
    SCALARS,
    bits,
    draw,
    every_case,
    every_dtype,
    gradient_like,
    richest,
)

from on_gpu import (
    DEVICE,
    HOST,
    PLAIN,
    SHAPES,
    SIZES,
    assert_all_near,
    assert_near,
    assert_same_bits,
    num_launches,
    off_by,
    plain,
    put,
    train_on,
)

# Parity ---------------------------------------------------------------------------------------


@every_dtype
@every_case
def test_equals_stock(case, dtype):
    values, grads = draw(SHAPES, 4, dtype)
    grads[1][1] = grads[2][0] = None
    params, opt = train_on(DEVICE, case.ours, values, grads)
    exact, stock = train_on(DEVICE, case.exact, values, grads, torch.float64)
    assert_all_near(params, exact)
    for p, q in zip(params, exact, strict=True):
        assert opt.state.get(p, {}).keys() == stock.state.get(q, {}).keys()
        for key, value in opt.state.get(p, {}).items():
            assert value.device.type == ("cpu" if key in SCALARS else DEVICE)
            if dtype.itemsize > 2 or key in SCALARS:
                assert_near(value, stock.state[q][key], key, torch.float32)


def special_values(dtype):
    """Zeros, subnormals, infinities and NaN, each as a value with each as a gradient."""
    inf = float("inf")
    special = [0.0, -0.0, 1.0, -2.0, inf, -inf, float("nan"), 1e-40, -1e-42, 1e-7, 6e4, 3e38, 1e-20]
    grid = torch.cartesian_prod(*[torch.tensor(special, dtype=torch.float64).to(dtype)] * 2)
    return grid[:, 0].contiguous(), grid[:, 1].contiguous()


@every_dtype
@every_case
def test_has_the_bits_of_the_cpu(case, dtype):
    """Also where parameters or gradients are not aligned to 16 bytes."""
    sizes = SIZES * 3
    at = [(0, 0)] * len(SIZES) + [(1, 1)] * len(SIZES) + [(0, 3)] * len(SIZES) + [(0, 0)]
    values, grads = draw([(n,) for n in sizes], 3, dtype)
    value, grad = special_values(dtype)
    values.append(value)
    for now, shift in zip(grads, (0, 5, 1), strict=True):
        now.append(grad.roll(shift))
    params = [off_by(i, put(v)).requires_grad_() for v, (i, _) in zip(values, at, strict=True)]
    opt = case.ours(params)
    for now in grads:
        for p, g, (_, i) in zip(params, now, at, strict=True):
            p.grad = off_by(i, put(g))
        before = num_launches()
        opt.step()
        assert num_launches() > before
    others, other = train_on(HOST, case.ours, values, grads)
    assert_same_bits(opt, params, other, others)


@richest
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_state_of_half_parameters(case, dtype):
    """And float32, float64 and half parameters in one optimizer: the bits of the CPU."""
    kinds = [dtype, torch.float32, torch.float64, dtype, dtype]
    values, grads = draw([(2049,), (100,), (77,), (5, 7), (16_390,)], 4)
    values = [v.to(kind) for v, kind in zip(values, kinds, strict=True)]
    runs = []
    for device in (DEVICE, HOST):
        params, opt = train_on(device, case.ours, values, grads[:1])
        for p in params[:-1]:
            for key, value in opt.state[p].items():
                if value.dtype == dtype:
                    opt.state[p][key] = value.float()
        runs.append((opt, params))
    if not hasattr(params[1], "grad_dtype"):
        low = [None] * 5
    else:
        low = [None, dtype, None, torch.float32, None]  # gradients of another dtype
    for opt, params in runs:
        for now in grads[1:]:
            for p, g, kind in zip(params, now, low, strict=True):
                if kind:
                    p.grad_dtype = None
                p.grad = g.to(kind or p.dtype).to(p.device, copy=True)
            opt.step()
    assert_same_bits(*runs[0], *runs[1])


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_complex_and_sparse_take_the_python_rule(case):
    values, grads = draw([(9,), (2, 3)], 3, torch.complex64)
    params, _ = train_on(DEVICE, case.ours, values, grads)
    exact, _ = train_on(DEVICE, case.stock, values, grads)
    for p, q in zip(params, exact, strict=True):
        assert_near(torch.view_as_real(p.detach()), torch.view_as_real(q.detach()))
    if not case.table.takes_sparse:
        return
    rows = torch.sparse_coo_tensor([[0, 3, 0]], 1 + torch.rand(3, 2), (5, 2)).coalesce()
    values, grads = [torch.randn(5, 2), torch.randn(4)], [[rows, torch.randn(4)]] * 3
    params, _ = train_on(DEVICE, case.ours, values, grads)
    exact, _ = train_on(DEVICE, case.stock, values, grads)
    assert_all_near(params, exact)


@plain
def test_version_counters(case):
    params, opt = train_on(DEVICE, case.ours, *draw([(5,)], 1))
    (p,), grad = params, params[0].grad
    before = p._version, grad._version
    opt.step()
    assert p._version > before[0] and grad._version == before[1]


# Layouts --------------------------------------------------------------------------------------


# Nothing on a GPU has an address that its dtype does not divide.
PARAM_LAYOUTS = [name for name in LAYOUTS if name != "odd_bytes"]


@pytest.mark.parametrize("grad_layout", [name for name in GRAD_LAYOUTS if name != "odd_bytes"])
@pytest.mark.parametrize("layout", PARAM_LAYOUTS)
def test_layouts(layout, grad_layout):
    shape = (4, 3, 2, 5)
    for case in RICHEST:
        value, drawn = torch.randn(shape), [gradient_like(torch.randn(shape)) for _ in range(3)]
        if grad_layout == "expanded":
            drawn = [g[:1].expand(shape) for g in drawn]
        with torch.device(DEVICE):
            p, around = LAYOUTS[layout](put(value))
            grads = [GRAD_LAYOUTS[grad_layout](put(g)) for g in drawn]
        p.requires_grad_()
        strides, before = p.stride(), [bits(t) for t in around]
        opt = case.ours([p])
        for grad, near in grads:
            p.grad = grad
            unchanged = [bits(t) for t in (grad, *near)]
            opt.step()
            assert [bits(t) for t in (grad, *near)] == unchanged
        assert p.stride() == strides and [bits(t) for t in around] == before
        (exact,), _ = train_on(DEVICE, case.exact, [value], [[g] for g in drawn], torch.float64)
        assert_near(p, exact, case.name)
