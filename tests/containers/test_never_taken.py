"""What the kernels never take."""

from __future__ import annotations

from collections import OrderedDict, UserDict

import pytest
import torch
from cases import assert_near, leaf, richest_and_stateless
from torch import Tensor

from containers import step_both

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@richest_and_stateless
@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"ema": 0.9}], ids=str)
def test_float8_gradients(case, dtype, options, backend):
    """As gradients of the values that they have."""
    params = [leaf(torch.ones(6)) for _ in range(2)]
    opts = [case.ours(params[:1], **options), case.ours(params[1:], **options)]
    grad_dtypes = hasattr(params[0], "grad_dtype")
    for at in range(4):
        grad = torch.randn(6).to(dtype)
        for p, g in zip(params, (grad, grad.float()), strict=True):
            if grad_dtypes:
                p.grad = None
                p.grad_dtype = None
            p.grad = g if at != 2 else grad.float()
        for opt in opts:
            opt.step()
    assert_near(*params)
    for key, value in opts[0].state.get(params[0], {}).items():
        if isinstance(value, Tensor):
            assert_near(value, opts[1].state[params[1]][key], key)


@richest_and_stateless
def test_the_message_about_threads_is_for_threads(case, backend):
    """All at once: unusual containers with unusual tensors."""
    params = [leaf(torch.randn(4)), torch.randn(4, 4)[:, ::2].requires_grad_()]
    params += [torch.randn(3, dtype=torch.complex64).requires_grad_(), leaf(torch.randn(3))]
    twins = [leaf(p) for p in params]
    opts = [case.ours(params), case.stock(twins)]
    opts[0].state = OrderedDict(opts[0].state)
    opts[0].param_groups = tuple(map(UserDict, opts[0].param_groups))
    opts[0].param_groups[0]["params"] = tuple(params)
    for _ in range(4):
        step_both(opts, [params, twins])
        opts[0].state.move_to_end([*opts[0].state][0]) if opts[0].state else None
    for p, q in zip(params, twins, strict=True):
        assert_near(p, q)
