"""Drivers, compilers and GPUs older or newer than today's."""

from __future__ import annotations

import pytest
import torch
from conftest import stand_in

import fusedopt
from device import adam, assert_refused, assert_right, image, in_a_new_process, launches_of


@pytest.mark.parametrize("versions", [{"driver_version": 12000}, {"nvrtc_version": 12000}], ids=str)
def test_small_tables_where_large_ones_are_unknown(versions, driver, kernels):
    params = [torch.randn(3).requires_grad_() for _ in range(490)]
    opt = fusedopt.SGD(params, lr=0.1)
    for p in params:
        p.grad = torch.randn(3)
    opt.step()
    assert launches_of(opt.step) == 1
    driver.set(**versions)
    in_a_new_process(kernels)
    opt.step()
    assert launches_of(opt.step) == 4  # a table has 4,000 bytes, a tensor takes 32 of them
    assert b"FUSEDOPT_ARGUMENT_BYTES=4096" in image()


def test_a_gpu_that_nvrtc_does_not_know(driver, kernels):
    """The driver translates what NVRTC makes for the newest that it knows."""
    driver.set(major=12)
    in_a_new_process(kernels)
    assert_right(adam())
    assert stand_in().calls("nvrtcGetPTX") == 1
    assert b"--gpu-architecture=compute_90" in image()
    assert "does not know this GPU, for sm_90" in kernels.describe_device(0)


def test_a_gpu_that_neither_knows(driver, kernels):
    driver.set(major=12)
    in_a_new_process(kernels)
    driver.fail("cuModuleLoadData", 222)
    assert_refused(kernels, "not what NVRTC makes for others: update the driver, or torch")
