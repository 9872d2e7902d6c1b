"""What multiplies gradients inside the step: max_grad_norm, GradScaler; and clip_grad_norm_."""

from __future__ import annotations

import torch

SHAPES = [(33,), (2, 3), (), (0,), (2049,)]
INF, NAN = float("inf"), float("nan")


def norm_of(grads):
    """In float64, over all elements at once."""
    dense = [g.to_dense().resolve_conj().reshape(-1) for g in grads if g is not None]
    wide = [torch.view_as_real(g.cdouble()).reshape(-1) if g.is_complex() else g for g in dense]
    return torch.cat([g.double() for g in wide]).norm()


def assert_norm(norm, grads, dtype=torch.float32):
    assert norm.dtype == torch.float64 and norm.shape == ()
    torch.testing.assert_close(
        norm, norm_of(grads), rtol=1e-12 if dtype.itemsize > 4 else 1e-5, atol=0
    )
