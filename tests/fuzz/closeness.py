"""How far two results of one step may be apart."""

from __future__ import annotations

import torch
from cases import bits
from torch import Tensor

# Rounding errors of one step, in units of the last place, that an input may stand for.
ROUNDINGS = 16


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for the payload of NaNs."""
    (shape, dtype, _, raw), (of_shape, of_dtype, _, of_raw) = (
        bits(t.masked_fill(t.isnan(), 7.5)) for t in (a, b)
    )
    return (shape, dtype, raw) == (of_shape, of_dtype, of_raw)


def smallest(dtype: torch.dtype) -> float:
    """The smallest number above zero."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def spread_of(exact: Tensor, moved: list[Tensor]) -> Tensor:
    """How far the moved results are from the exact one, together; NaN or infinite where they are
    of another kind."""
    exact = real(exact)
    total = torch.zeros_like(exact)
    for result in map(real, moved):
        same = (result == exact) | (result.isnan() & exact.isnan())
        total += torch.where(same, torch.zeros_like(exact), (result - exact).abs())
    return total


def check_close(
    ours: Tensor, exact: Tensor, spread: Tensor, unit: float, where: str, at_random: bool = False
) -> None:
    assert ours.shape == exact.shape, where
    ours, exact = real(ours), real(exact)
    info, wide = torch.finfo(ours.dtype), torch.finfo(exact.dtype)
    size = torch.where(exact.isfinite(), exact.abs(), 0)
    bound = spread + ROUNDINGS / 2 * unit * size + 16 * smallest(exact.dtype)
    limit = size + bound >= info.max
    if info.eps > wide.eps:
        last_place = 1.0 if at_random else 0.5
        bound = bound + last_place * (info.eps * (size + bound) + smallest(ours.dtype))
    got = ours.to(exact.dtype)
    fine = (got - exact).abs() <= bound
    fine |= got == exact.to(ours.dtype).to(exact.dtype)
    fine |= got.isnan() & exact.isnan()
    fine |= limit & got.isinf() & (got.sign() == exact.sign())
    fine |= ~spread.isfinite()
    if not fine.all():
        at = (~fine).nonzero()[0]
        at = tuple(at.tolist())
        raise AssertionError(
            f"{where}: {int((~fine).sum())} of {fine.numel()} elements differ, at {at} "
            f"{got[at].item()!r} instead of {exact[at].item()!r} ± {bound[at].item():.3g}"
        )
