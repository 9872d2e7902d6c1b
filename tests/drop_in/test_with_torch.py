"""With the rest of torch: scalers, schedulers, differentiable steps, modes."""

from __future__ import annotations

import pytest
import torch
from cases import (
    CASES,
    NAMES,
    RICHEST_OF,
    TABLES,
    Case,
    assert_near,
    assert_trained_alike,
    bits,
    draw,
    every_name,
    leaf,
    richest,
    richest_by_options,
    snapshot,
    step_through,
    train,
)
from torch import nn
from torch.optim import lr_scheduler

import fusedopt


@richest
def test_grad_scaler(case, backend):
    """Scales, skips the step with an overflow, and goes on as stock does."""
    runs = []
    for build in (case.ours, case.stock):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        opt = build(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        for at in range(5):
            opt.zero_grad()
            loss = model(torch.ones(2, 4) + at).square().sum()
            scaler.scale(loss).backward()
            if at == 2:
                model.weight.grad[0, 0] = float("inf")
                before = snapshot(opt)
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            scaler.step(opt)
            scaler.update()
            if at == 2:
                assert snapshot(opt) == before
        runs.append((scaler.get_scale(), opt, [*model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert_trained_alike(*runs[0][1:], *runs[1][1:])


SCHEDULERS = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, step_size_up=3),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (epoch + 1)),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [5]
    ),
}


@richest
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=list(SCHEDULERS))
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_schedulers(case, scheduler, lr, backend):
    case = Case(case.name, {**case.options, "lr": lr})
    values, grads = draw([(33,), (2, 3)], 20)
    runs, seen = [], []
    for build in (case.ours, case.stock):
        params = [leaf(v) for v in values]
        opt = build(params)
        try:
            schedule = scheduler(opt)
        except ValueError as error:
            assert "momentum" in str(error)  # Adagrad has none to cycle
            seen.append(str(error))
            continue
        log = []
        for now in grads:
            step_through(opt, params, [now])
            schedule.step()
            group = opt.param_groups[0]
            log.append([float(group["lr"]), group.get("betas"), group.get("momentum")])
        runs.append((opt, params))
        seen.append(log)
    assert seen[0] == seen[1]
    if runs:
        assert_trained_alike(*runs[0], *runs[1])


NUMERIC = [
    case
    for case in CASES
    if not any(isinstance(v, (torch.Tensor, tuple)) for v in case.options.values())
]


def _one_step(build, p, grad, *state):
    """The tensors after a step that starts in a given state."""
    p = p.clone()
    opt = build([p], differentiable=True)
    p.grad = grad.clone()
    table = TABLES[type(opt).__name__]
    names = [*table.slots]
    if state:
        opt.state[p] = {k: v.clone() for k, v in zip(names, state, strict=True)}
        if table.counts_steps:
            opt.state[p]["step"] = torch.tensor(3.0)
    opt.step()
    return (p, *(opt.state[p][name] for name in names[: len(state)]))


@richest_by_options
def test_differentiable_step_has_the_gradients_of_stock(case, backend):
    """With respect to the parameter, the gradient and each state tensor."""
    start = [torch.rand(6, dtype=torch.float64) for _ in range(2 + len(case.table.slots))]
    results = []
    for build in (case.ours, case.stock):
        inputs = [t.clone().requires_grad_() for t in start]
        outputs = _one_step(build, *inputs)
        loss = sum((i + 1) * out.square().sum() for i, out in enumerate(outputs))
        results.append(torch.autograd.grad(loss, inputs))
    for ours, stock in zip(*results, strict=True):
        assert_near(ours, stock, dtype=torch.float32)


def test_differentiable_first_step_of_momentum(backend):
    """Stock's first momentum buffer is a constant; so is ours."""
    start = [torch.rand(6, dtype=torch.float64) for _ in range(2)]
    results = []
    for build in (RICHEST_OF["SGD"].ours, RICHEST_OF["SGD"].stock):
        inputs = [t.clone().requires_grad_() for t in start]
        (p,) = _one_step(build, *inputs)
        results.append(torch.autograd.grad(p.square().sum(), inputs))
    for ours, stock in zip(*results, strict=True):
        assert_near(ours, stock, dtype=torch.float32)


@pytest.mark.parametrize("case", [c for c in NUMERIC if "momentum" not in c.options], ids=str)
def test_differentiable_through_two_steps(case, backend):
    """Against finite differences. Stock cannot do this for every option."""

    def train(x, slopes, lr):
        p = x.clone()
        opt = case.ours([p], differentiable=True, lr=lr)
        for slope in slopes:
            p.grad = slope.clone()
            opt.step()
        return p

    x = torch.rand(3, dtype=torch.float64) + 1
    slopes = torch.rand(2, 3, dtype=torch.float64) + 2
    inputs = [x, slopes, torch.tensor(0.1, dtype=torch.float64)]
    assert torch.autograd.gradcheck(train, [t.requires_grad_() for t in inputs], atol=1e-4)


@every_name
def test_inference_and_no_grad_modes(name, backend):
    cls = getattr(fusedopt, name)
    values, grads = draw([(5,)], 3)
    expected, _ = train(cls, values, grads, lr=0.1)
    params = [leaf(v) for v in values]
    opt = cls(params, lr=0.1)
    for now, mode in zip(grads, (torch.no_grad, torch.enable_grad, torch.no_grad), strict=True):
        with mode():
            step_through(opt, params, [now])
    assert bits(params[0]) == bits(expected[0])
    assert params[0].requires_grad and params[0].is_leaf


def test_a_model_learns(backend):
    torch.manual_seed(0)
    inputs, weights = torch.randn(64, 5), torch.randn(5, 1)
    for name in NAMES:
        model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))
        # Adadelta's steps have a size of their own, of which lr is a factor.
        opt = getattr(fusedopt, name)(model.parameters(), lr=5.0 if name == "Adadelta" else 0.02)
        losses = []
        for _ in range(60):
            opt.zero_grad()
            loss = (model(inputs) - inputs @ weights).square().mean()
            loss.backward()
            opt.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0], name


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_group_without_parameters(case, place, backend):
    values, grads = draw([(3,), (4, 5)], 3)
    params = [leaf(v) for v in values]
    groups = [{"params": params}]
    groups.insert(place, {"params": []})
    opt = case.ours(groups)
    step_through(opt, params, grads)
    exact, oracle = train(case.stock, values, grads)
    assert_trained_alike(opt, params, oracle, exact)
