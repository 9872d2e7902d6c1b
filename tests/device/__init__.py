"""A driver of the tests' own in the place of CUDA's, and what is to be right whatever it does."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import seam
import torch
from conftest import stand_in
from test_native import script

import fusedopt

ADAM = "fusedopt_AdamUpdate_float_false"


def in_a_new_process(kernels):
    """What a process that starts now knows: only what is in the cache."""
    seam.use_driver(kernels, stand_in().path)


def adam(capturable=False, **options):
    params = [torch.randn(n).requires_grad_() for n in (5, 100, 0)]
    for p in params:
        p.grad = torch.randn(len(p))
    return fusedopt.Adam(params, capturable=capturable, **options)


def assert_right(opt):
    """It steps as stock does."""
    (group,) = opt.param_groups
    twins = [p.detach().clone().requires_grad_() for p in group["params"]]
    for twin, p in zip(twins, group["params"], strict=True):
        twin.grad = p.grad.clone()
    stock = torch.optim.Adam(twins, lr=group["lr"])
    for _ in range(3):
        opt.step()
        stock.step()
    for twin, p in zip(twins, group["params"], strict=True):
        torch.testing.assert_close(p, twin)


def launches_of(run):
    """With those of trials, which the module does not count."""
    before = stand_in().calls("cuLaunchKernel")
    run()
    return stand_in().calls("cuLaunchKernel") - before


def compilations():
    return stand_in().calls("nvrtcCompileProgram")


def cached(kind=""):
    return sorted(
        path
        for path in Path(os.environ["FUSEDOPT_CACHE_DIR"]).iterdir()
        if ("-verdict-" in path.name) == (kind == "verdict")
    )


def alone(code, folder):
    return script(code, FUSEDOPT_CACHE_DIR=str(folder))


def assert_left_out(kernels, match):
    """The steps are right without a launch, and one warning says why."""
    opt = adam()
    with pytest.warns(RuntimeWarning, match=match) as caught:
        assert launches_of(lambda: assert_right(opt)) == 0
    assert len(caught) == 1, [str(warning.message) for warning in caught]


def assert_refused(kernels, match):
    """The steps are right; a warning for the kernel says what and why."""
    opt = adam()
    with pytest.warns(RuntimeWarning, match=match) as caught:
        assert_right(opt)
    assert len(caught) == 1 and f"{ADAM} is not used on cuda:0" in str(caught[0].message)


def image():
    text = ctypes.c_char_p()
    size = stand_in().library.stand_in_image(ctypes.byref(text))
    return ctypes.string_at(text, size)
