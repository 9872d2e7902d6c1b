"""NAdam alone keeps a second number of each parameter: whatever moves state has to move it."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import Case, assert_near, bits, draw, leaf, snapshot, step_through, train
from torch import nn

import fusedopt

CASE = Case("NAdam", {"lr": 0.1, "momentum_decay": 0.01, "weight_decay": 0.1})


def products(opt):
    return [state["mu_product"] for state in opt.state.values()]


def expected_product(steps, betas=(0.9, 0.999), decay=0.01):
    product = 1.0
    for step in range(1, steps + 1):
        product *= betas[0] * (1 - 0.5 * 0.96 ** (step * decay))
    return product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"state_dtype": "8bit"}, {"ema": 0.9}, {"max_grad_norm": 1.0}], ids=str
)
def test_the_product_of_all_steps(dtype, options, backend):
    values, grads = draw([(5,), (70, 71), ()], 20, dtype)
    _, opt = train(CASE.ours, values, grads, **options)
    for product in products(opt):
        assert product.shape == () and product.dtype == torch.float32
        torch.testing.assert_close(product.item(), expected_product(20), rtol=2e-6, atol=0)


def test_with_a_float64_default(backend):
    """torch then keeps the product in float64, and so does fusedopt."""
    values, grads = draw([(5,), (70, 71)], 5, torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        params, opt = train(CASE.ours, values, grads)
        expected, _ = train(CASE.stock, values, grads)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(product.dtype == torch.float64 for product in products(opt))
    for param, exact in zip(params, expected, strict=True):
        assert_near(param, exact)


def test_a_parameter_that_rests_keeps_its_product(backend):
    values, grads = draw([(5,), (70, 71)], 6)
    for at in (2, 3):
        grads[at][0] = None
    params, opt = train(CASE.ours, values, grads)
    exact, _ = train(CASE.exact, [v.double() for v in values], grads)
    counts = [(s["step"].item(), round(s["mu_product"].item(), 6)) for s in opt.state.values()]
    assert counts == [(n, round(expected_product(n), 6)) for n in (4, 6)]
    for param, other in zip(params, exact, strict=True):
        assert_near(param, other)


@pytest.mark.parametrize("to", ["fusedopt", "torch"])
def test_conversion_and_checkpoints(to, backend):
    values, grads = draw([(5,), (70, 71)], 6)
    whole, _ = train(CASE.exact, [v.double() for v in values], grads)
    build, other = (CASE.stock, CASE.ours) if to == "fusedopt" else (CASE.ours, CASE.stock)
    convert = fusedopt.from_torch if to == "fusedopt" else fusedopt.to_torch
    params, opt = train(build, values, grads[:3])
    saved, before = copy.deepcopy(opt.state_dict()), [bits(p) for p in products(opt)]
    loaded = other(twins := [leaf(p) for p in params])
    loaded.load_state_dict(saved)
    assert convert(opt) is opt
    assert [bits(p) for p in products(opt)] == [bits(p) for p in products(loaded)] == before
    step_through(opt, params, grads[3:])
    step_through(loaded, twins, grads[3:])
    for param, twin, exact in zip(params, twins, whole, strict=True):
        assert_near(param, exact)
        assert_near(twin, exact)


def test_what_torch_has_rounded_goes_on(backend):
    """torch's load_state_dict casts the product to the dtype of the parameter."""
    values, grads = draw([(5,), (70, 71)], 4, torch.bfloat16)
    params, stock = train(CASE.stock, values, grads[:2])
    loaded = CASE.stock([leaf(p) for p in params])
    loaded.load_state_dict(copy.deepcopy(stock.state_dict()))
    assert products(loaded)[0].dtype == torch.bfloat16
    opt = CASE.ours(params)
    opt.load_state_dict(copy.deepcopy(loaded.state_dict()))
    step_through(opt, params, grads[2:])
    for product in products(opt):
        torch.testing.assert_close(product.item(), expected_product(4), rtol=3e-2, atol=0)


def test_in_the_backward(backend):
    values, inputs = torch.randn(70, 71), torch.randn(3, 71)
    results = []
    for build in (
        lambda p: fusedopt.attach([p], fusedopt.NAdam, **CASE.options),
        lambda p: CASE.ours([p]),
    ):
        param = leaf(values)
        opt = build(param)
        for _ in range(3):
            (inputs @ param.T).square().sum().backward()
            if param.grad is not None:
                opt.step()
                opt.zero_grad()
        results.append((bits(param), *map(bits, opt.state[param].values())))
    assert results[0] == results[1]


def test_a_skipped_step_does_not_advance_it(backend):
    model = nn.Linear(4, 3)
    opt = CASE.ours(model.parameters(), amp_fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for overflow in (False, True, False):
        opt.zero_grad()
        scaler.scale(model(torch.ones(2, 4)).sum()).backward()
        if overflow:
            model.weight.grad[0, 0] = torch.inf
        scaler.step(opt)
        scaler.update()
    for product in products(opt):
        torch.testing.assert_close(product.item(), expected_product(2), rtol=1e-6, atol=0)


def test_gradients_through_some_steps(backend):
    """Those of the equations, with the product as a number that autograd goes around."""
    start, slopes = torch.rand(6, dtype=torch.float64), torch.rand(3, 6, dtype=torch.float64) + 0.5
    results = []
    for ours in (True, False):
        inputs = [t.clone().requires_grad_() for t in (start, slopes)]
        p, grads = inputs[0].clone(), inputs[1].clone()
        if ours:
            opt = CASE.ours([p], differentiable=True, weight_decay=0.0)
            opt.state[p] = {
                "step": torch.tensor(0.0),
                "mu_product": torch.ones((), dtype=torch.float64),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
            for slope in grads:
                p.grad = slope
                opt.step()
        else:
            p = equations(p, grads)
        results.append([p.detach(), *torch.autograd.grad(p.square().sum(), inputs)])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-11, atol=1e-11)


def equations(p, grads, lr=0.1, betas=(0.9, 0.999), decay=0.01, eps=1e-8):
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        mu, mu_next = (betas[0] * (1 - 0.5 * 0.96 ** (s * decay)) for s in (t, t + 1))
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        product = expected_product(t)
        direction = (1 - mu) * g / (1 - product) + mu_next * m / (1 - product * mu_next)
        p = p - lr * direction / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return p


DAMAGE = {
    "a matrix": torch.ones(2, 2),
    "text": "half",
    "an integer": torch.tensor(1),
    "missing": None,
    "on meta": torch.empty((), device="meta"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("live", [True, False], ids=["live", "loaded"])
def test_a_damaged_product(damage, live, backend):
    values, grads = draw([(5,), (70, 71)], 2)
    params, opt = train(CASE.ours, values, grads)
    saved = copy.deepcopy(opt.state_dict())
    if damage == "an integer" and not live:
        pytest.skip("is a number, which it is made again")
    if live:
        opt.state[params[1]]["mu_product"] = DAMAGE[damage]
        before = snapshot(opt)
        with pytest.raises((TypeError, ValueError, RuntimeError), match="mu_product"):
            opt.step()
    else:
        saved["state"][1]["mu_product"] = DAMAGE[damage]
        before = snapshot(opt)
        with pytest.raises((TypeError, ValueError, RuntimeError), match="mu_product"):
            opt.load_state_dict(saved)
    assert snapshot(opt) == before


def test_a_product_of_one_has_no_step(backend):
    """1 / (1 - mu_product): torch divides by zero, too."""
    values, grads = draw([(5,)], 2)
    params, opt = train(CASE.ours, values, grads[:1])
    opt.state[params[0]]["mu_product"].fill_(1.0)
    opt.param_groups[0].update(betas=(2.0, 0.999), momentum_decay=0.0)
    params[0].grad = grads[1][0]
    before = snapshot(opt)
    with pytest.raises(ZeroDivisionError, match="mu_product = 1 makes 1 - mu_product zero"):
        opt.step()
    assert snapshot(opt) == before


@pytest.mark.parametrize("kept", [0.5, torch.tensor(1)], ids=str)
def test_numbers_are_loaded_as_tensors(kept, backend):
    """Before torch 2.0, NAdam kept a float."""
    values, grads = draw([(5,)], 2)
    params, opt = train(CASE.ours, values, grads[:1])
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["mu_product"] = kept
    opt.load_state_dict(saved)
    (product,) = products(opt)
    assert product.dtype == torch.float32 and product.item() == float(kept)
    step_through(opt, params, grads[1:])
