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


@pytest.mark.parametrize(
    "gpu, oldest, target",
    [
        ((10, 3), 75, "sm_100"),  # machine code of the first serves the rest of its generation
        ((8, 9), 75, "sm_80"),
        ((8, 9), 86, "compute_86"),
        ((11, 0), 75, "compute_101"),  # and PTX all that is newer
        ((13, 0), 75, "compute_120"),
    ],
    ids=str,
)
def test_a_gpu_that_nvrtc_does_not_know(gpu, oldest, target, driver, kernels):
    """It takes what NVRTC makes for one that is older."""
    driver.set(major=gpu[0], minor=gpu[1], oldest_architecture=oldest)
    in_a_new_process(kernels)
    assert_right(adam())
    assert stand_in().calls("nvrtcGetPTX") == target.startswith("compute")
    assert f"--gpu-architecture={target} ".encode() in image()
    assert f"does not know this GPU, for {target};" in kernels.describe_device(0)


@pytest.mark.parametrize("gpu, error", [((13, 0), 222), ((10, 3), 209)], ids=str)
def test_a_gpu_that_neither_knows(gpu, error, driver, kernels):
    driver.set(major=gpu[0], minor=gpu[1])
    in_a_new_process(kernels)
    driver.fail("cuModuleLoadData", error)
    assert_refused(kernels, "does not take what NVRTC makes for .*: update the driver, or torch")
