"""Extreme hyperparameters and gradients of any size: the number of float64, or torch's own."""

from __future__ import annotations

import pytest
import torch
from cases import TABLES, TOLERANCE, Case, leaf
from torch import Tensor

SCALES = (0.0, 1e-45, 1e-38, 1e-30, 1e-20, 1e-8, 1.0, 1e8, 1e18, 1e30, 1e38)
STEPS = 4

CASES = [Case(name, options) for name, table in TABLES.items() for options in table.extremes]


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def near(values: Tensor, exact: Tensor, peak: Tensor) -> Tensor:
    """Where values agree with float64's, within what rounding makes at the peak of the way there,
    or are not finite because the way left the range of their dtype."""
    rtol, _ = TOLERANCE[values.dtype]
    limits = torch.finfo(values.dtype)
    close = (values - exact).abs() <= rtol * peak + limits.smallest_normal
    return torch.where(peak > limits.max, ~values.isfinite() | close, close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_wherever_torch_is_and_finite_wherever_torch_is(backend, case, dtype):
    scales = torch.tensor(SCALES, dtype=torch.float64)[:, None].expand(-1, 19)
    values = torch.randn(scales.shape).to(dtype)
    params = leaf(values), leaf(values), leaf(values.double())
    ours, stock, exact = params
    optimizers = case.ours([ours]), case.stock([stock]), case.exact([exact])
    peak = values.double().abs()
    for _ in range(STEPS):
        grad = (scales * torch.randn(scales.shape)).to(dtype)
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.to(param.dtype)
            try:
                optimizer.step()
            except RuntimeError as error:  # torch's for-loop has options in the dtype
                assert param is stock and "c10::Half without overflow" in str(error)
                stock.data.fill_(torch.nan)
        peak = torch.maximum(peak, exact.detach().abs())
    ours, stock, exact = (param.detach() for param in params)
    right = near(ours, exact, peak) | (ours == stock)
    right |= ~near(stock, exact, peak) & (ours.isfinite() | ~stock.isfinite())
    wrong = torch.stack([scales, ours.double(), stock.double(), exact])[:, ~right].T
    assert not len(wrong), f"scale of the gradient, ours, torch's, float64's: {wrong[:5].tolist()}"


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"alpha": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_one_overflow_does_not_poison_centered_rmsprop(dtype, options, backend):
    """Where squares leave the range, v is infinite and the parameter stays, as in torch."""
    case = Case("RMSprop", {"centered": True, **options})
    huge = torch.finfo(dtype).max ** 0.8
    ours = leaf(torch.randn(300, dtype=dtype))
    stock = leaf(ours)
    values = ours.detach().clone()
    optimizers = case.ours([ours]), case.stock([stock])
    for scale in (huge, 1.0, huge, 0.0, 1e-3):
        grad = scale * torch.randn(300, dtype=dtype)
        for param, optimizer in zip((ours, stock), optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
    assert torch.equal(stock, values)
    assert torch.equal(ours, values)


def test_a_centered_variance_that_is_negative_stays_so(backend):
    """State that no gradients made."""
    p = leaf(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = Case("RMSprop", {"centered": True}).ours([p])
    optimizer.step()
    optimizer.state[p]["grad_avg"].fill_(2.0)
    optimizer.step()
    assert p.isnan().all()


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 0.5, "momentum": 0.9}, {"eps": 1e-3, "eps_inside_sqrt": True}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_centered_rmsprop_with_gradients_of_any_size(options, dtype, backend):
    """Not of the half types, in which v is rounded to zero before the square of a is."""
    test_right_wherever_torch_is_and_finite_wherever_torch_is(
        backend, Case("RMSprop", {"centered": True, **options}), dtype
    )
