"""GPUs, drivers and compilers that the kernels cannot use: one warning, and the steps are right."""

from __future__ import annotations

import ctypes
import ctypes.util
import shutil
import subprocess
from pathlib import Path

import pytest
import seam
import torch
from conftest import StandIn

from device import (
    ADAM,
    adam,
    assert_left_out,
    assert_right,
    cached,
    compilations,
    image,
    in_a_new_process,
    launches_of,
)


def test_a_torch_without_cuda(driver, kernels):
    seam.use_driver(kernels, "", "this torch is built without CUDA")
    assert_left_out(kernels, "torch's operators: this torch is built without CUDA")


def test_libraries_that_lie_elsewhere(driver, monkeypatch, tmp_path):
    """As some distributions have torch's: where those are that the process has loaded."""
    if "libtorch_cuda.so" in Path("/proc/self/maps").read_text():
        pytest.skip("this torch has some")
    libraries = tmp_path / "of the system"
    libraries.mkdir()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    library, problem = seam.gpu_library()
    assert library == "" and "no libcaffe2_nvrtc.so in " in problem and "/torch/lib" in problem
    for name in ("libtorch_cuda.so.2.13", "libcaffe2_nvrtc.so"):
        shutil.copy(driver.path, libraries / name)
    ctypes.CDLL(str(libraries / "libtorch_cuda.so.2.13"))
    assert seam.gpu_library() == (str(libraries / "libcaffe2_nvrtc.so"), "")


def test_no_such_library(driver, kernels):
    seam.use_driver(kernels, "/no/such/library.so")
    assert_left_out(kernels, "cannot be loaded: /no/such/library.so")


@pytest.fixture
def without_a_driver(driver, kernels, tmp_path):
    """torch's library needs libcuda.so.1, which comes with the driver."""
    if ctypes.util.find_library("cuda"):
        pytest.skip("there is a driver")
    source, cuda, library = (
        tmp_path / name for name in ("nothing.cpp", "libcuda.so.1", "libcaffe2_nvrtc.so")
    )
    source.write_text("")
    link = ["g++", "-shared", "-fPIC", source, "-Wl,--no-as-needed"]
    subprocess.run([*link, "-Wl,-soname,libcuda.so.1", "-o", cuda], check=True)
    subprocess.run([*link, cuda, "-o", library], check=True)
    cuda.unlink()
    seam.use_driver(kernels, str(library))


def test_there_is_no_driver(without_a_driver, kernels):
    why = "there is no NVIDIA driver, install it to use a GPU: libcuda.so.1: cannot open"
    assert_left_out(kernels, why)


def test_a_library_without_a_function(driver, kernels, tmp_path):
    seam.use_driver(kernels, StandIn(tmp_path, "-DSTAND_IN_OLD").path)
    assert_left_out(kernels, "has no nvrtcGetNumSupportedArchs: update")


@pytest.mark.parametrize(
    "settings, match",
    [
        (
            {"driver_version": 11080},
            "driver knows CUDA 11.8, fusedopt needs 12.0: update the driver",
        ),
        ({"driver_version": 0}, "there is no NVIDIA driver, install it to use a GPU"),
        ({"nvrtc_version": 11080}, "NVRTC is 11.8, fusedopt needs 12.0: update torch"),
        ({"major": 7, "minor": 0}, "it is sm_70, and the kernels need sm_75"),
        (
            {"major": 7, "minor": 5, "oldest_architecture": 80},
            "it is sm_75, and NVRTC 12.8 makes nothing for GPUs so old: install a torch for an",
        ),
        ({"device_count": 0}, "has 0 GPUs, and cuda:0 is not among them: set CUDA_VISIBLE_DEVICES"),
    ],
    ids=str,
)
def test_too_old(settings, match, driver, kernels):
    driver.set(**settings)
    seam.use_driver(kernels, driver.path)
    assert_left_out(kernels, match)


def test_each_gpu_has_the_code_of_its_architecture(driver, kernels):
    driver.set(device_count=2, major1=8)
    seam.use_driver(kernels, driver.path)
    for index, architecture in enumerate((b"sm_90", b"sm_80")):
        _, _, problem = kernels.try_out(ADAM, index)
        assert problem == "" and b"--gpu-architecture=" + architecture in image()
    assert len(cached()) == len(cached("verdict")) == 2
    assert launches_of(adam().step) == 1


def test_a_part_of_a_gpu(driver, kernels):
    """One of MIG differs in its name: it takes the code of the whole, and tries it out for itself.
    CUDA_VISIBLE_DEVICES may bring it, or any other, to the same number in the next process."""
    driver.name("Stand-in")
    adam().step()
    driver.name("Stand-in MIG 1g.18gb")
    in_a_new_process(kernels)
    assert "Stand-in MIG 1g.18gb, sm_90" in kernels.describe_device(0)
    opt = adam()
    assert launches_of(opt.step) > 1 and compilations() == 1
    assert_right(opt)


def test_gpus_of_several_architectures(driver, kernels):
    """Each is judged by itself."""
    driver.set(device_count=2, major1=7, minor1=0)
    seam.use_driver(kernels, driver.path)
    assert kernels.device_problem(0) == ""
    assert "sm_70" in kernels.device_problem(1)
    assert "cuda:2 is not among them" in kernels.device_problem(2)
    assert "sm_90: kernels compiled by NVRTC 12.8" in kernels.describe_device(0)


def test_the_builtins_beside_nvrtc_are_opened(driver, kernels, tmp_path):
    """NVRTC finds them only where they are open."""
    library = tmp_path / "libcaffe2_nvrtc.so"
    builtins = tmp_path / "libnvrtc-builtins.so.12.8"
    for copy in (library, builtins):
        shutil.copy(driver.path, copy)
    seam.use_driver(kernels, str(library))
    assert str(builtins) not in Path("/proc/self/maps").read_text()
    assert kernels.device_problem(0) == ""
    assert str(builtins) in Path("/proc/self/maps").read_text()


def test_a_driver_that_does_not_start(driver, kernels):
    driver.fail("cuInit", 999)
    seam.use_driver(kernels, driver.path)
    assert_left_out(kernels, r"starting the driver failed: an error of the stand-in \(999\)")
