"""Options that were changed, after construction, to a number that has no meaning at this step: an
error before anything is written where torch's for-loop raises, or would write NaN at once."""

from __future__ import annotations

import math

import pytest
import torch
from cases import NAMES, TABLES, Case, draw, leaf, snapshot, step_through

ADAMS = ("Adam", "AdamW")
COUPLED = [name for name, table in TABLES.items() if not table.is_decoupled]
TOO_MUCH = 1e39  # of float32
# name, what it is constructed with, what is changed, at which step, the error, what it speaks of
UNDEFINED = [
    *[
        (name, {}, {"betas": betas}, step, error, said)
        for name in ADAMS
        for step in (1, 4)
        for betas, error, said in [
            ((1.0, 0.999), ZeroDivisionError, r"betas\[0\] = 1 "),
            ((0.9, 1.0), ZeroDivisionError, r"betas\[1\] = 1 "),
            ((0.9, 1.0 + 1e-9), RuntimeError, r"betas\[1\] = 1 .*negative"),
            ((0.9, 3.0), RuntimeError, r"betas\[1\] = 3 .*negative"),
            ((torch.tensor(1.0), torch.tensor(0.9)), ZeroDivisionError, r"betas\[0\] = 1 "),
            ((0.9, torch.tensor(1.0)), ZeroDivisionError, r"betas\[1\] = 1 "),
        ]
    ],
    *[(name, {}, {"betas": (-1.0, 0.9)}, 2, ZeroDivisionError, r"betas\[0\]") for name in ADAMS],
    *[(name, {}, {"betas": (1e200, 0.9)}, 2, OverflowError, r"betas\[0\]") for name in ADAMS],
    *[
        (name, {"lr": torch.tensor(1e-3)}, {"betas": (1.0, 0.9)}, 1, ZeroDivisionError, "betas")
        for name in ADAMS
    ],
    ("Adam", {"amsgrad": True}, {"betas": (0.9, 1.0)}, 3, ZeroDivisionError, "betas"),
    ("Adagrad", {}, {"lr_decay": -1.0}, 2, ZeroDivisionError, "lr_decay"),
    ("Adagrad", {}, {"lr_decay": -0.5}, 3, ZeroDivisionError, "lr_decay"),
    *[
        (name, {}, {"lr": lr}, step, RuntimeError, "lr")
        for name in NAMES
        for step in (1, 3)
        for lr in (TOO_MUCH, -TOO_MUCH, 1e300)
    ],
    *[(name, {}, {"weight_decay": TOO_MUCH}, 2, RuntimeError, "weight_decay") for name in COUPLED],
    *[(name, {"l1": 0.1}, {"l1": TOO_MUCH}, 2, RuntimeError, "l1") for name in COUPLED],
    ("AdamW", {"l1": 0.1}, {"l1": 1e300}, 2, RuntimeError, r"lr \* l1"),
    ("SGD", {"momentum": 0.9}, {"dampening": TOO_MUCH}, 2, RuntimeError, "dampening"),
    ("RMSprop", {}, {"alpha": TOO_MUCH}, 2, RuntimeError, "alpha"),
]
# Where torch's for-loop steps, whatever that is worth.
DEFINED = [
    *[(name, {}, {"betas": betas}, 3) for name in ADAMS for betas in [(2.0, 0.9), (-0.5, 0.9)]],
    ("Adagrad", {}, {"lr_decay": -1.0}, 4),
    ("SGD", {"momentum": 0.9}, {"dampening": 2.0}, 1),
    *[(name, {}, {"lr": math.inf}, 2) for name in NAMES],
]


def prepared(build, step, dtype=torch.float32, drawn=None):
    """An optimizer before this step."""
    values, grads = drawn or draw([(5,), (3, 70)], step, dtype)
    params = [leaf(v) for v in values]
    opt = build(params)
    step_through(opt, params, grads[:-1])
    for p, grad in zip(params, grads[-1], strict=True):
        p.grad = grad
    return params, opt


@pytest.mark.parametrize(
    ("name", "options", "changes", "step", "error", "said"), UNDEFINED, ids=str
)
def test_nothing_is_written(name, options, changes, step, error, said, backend):
    params, opt = prepared(Case(name, options).ours, step)
    before, kept = snapshot(opt), [p.detach().clone() for p in params]
    opt.param_groups[0].update(changes)
    with pytest.raises(error, match=rf"fusedopt\.{name}, param group 0, .*{said}"):
        opt.step()
    opt.param_groups[0].update({key: opt.defaults[key] for key in changes})
    assert snapshot(opt) == before
    assert all(torch.equal(p, was) for p, was in zip(params, kept, strict=True))
    opt.step()
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize(
    ("name", "changes", "error"),
    [
        ("AdamW", {"betas": (torch.tensor(1.0), 0.9)}, ZeroDivisionError),
        ("Adagrad", {"lr_decay": -1.0}, ZeroDivisionError),
        ("RMSprop", {"lr": TOO_MUCH}, RuntimeError),
    ],
)
def test_differentiable(name, changes, error, backend):
    p, grad = torch.ones(3), torch.ones(3)
    opt = Case(name, {"differentiable": True}).ours([p])
    p.grad = grad
    opt.step()
    kept = p.clone()
    opt.param_groups[0].update(changes)
    with pytest.raises(error, match=rf"fusedopt\.{name}, param group 0"):
        opt.step()
    assert torch.equal(p, kept)


@pytest.mark.parametrize(("name", "options", "changes", "step"), DEFINED, ids=str)
def test_what_torch_can_do(name, options, changes, step, backend):
    drawn = draw([(5,), (3, 70)], step)
    results = []
    for build in (Case(name, options).ours, Case(name, options).stock):
        params, opt = prepared(build, step, drawn=drawn)
        opt.param_groups[0].update(changes)
        opt.step()
        results.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_float64_can_hold_more(dtype, backend):
    params, opt = prepared(Case("SGD", {}).ours, 2, dtype)
    opt.param_groups[0]["lr"] = TOO_MUCH
    opt.step()
    assert all(p.isfinite().all() and p.abs().max() > 1e30 for p in params)


def test_without_a_gradient_there_is_no_error(backend):
    """As in torch: nothing is computed."""
    params, opt = prepared(Case("Adam", {}).ours, 2)
    opt.param_groups[0]["betas"] = (1.0, 0.9)
    opt.zero_grad()
    opt.step()
    assert all(p.isfinite().all() for p in params)
