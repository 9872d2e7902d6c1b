"""What ``python -m fusedopt.info`` says of GPUs, and ``fusedopt.self_test`` of kernels."""

from __future__ import annotations

import pytest
import seam
import torch

from device import ADAM, adam, compilations, in_a_new_process, launches_of
from fusedopt import info, self_test


@pytest.fixture
def gpus(driver, kernels, monkeypatch):
    """A torch that is built for CUDA, and finds so many GPUs."""

    def choose(count):
        driver.set(device_count=count)
        seam.use_driver(kernels, driver.path)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return choose


def said_of_gpus():
    lines = info.report().splitlines()
    return [line for line in lines if line.startswith(("cuda", "kernels"))]


def test_info_names_each_gpu(gpus, driver, kernels, tmp_path, monkeypatch):
    driver.set(major1=7)
    gpus(2)
    monkeypatch.setattr(kernels, "KERNEL_DEVICE", "cuda")
    assert said_of_gpus() == [
        "cuda:0:  native, Stand-in, sm_90: kernels compiled by NVRTC 12.8; the driver knows CUDA "
        "13.0",
        "cuda:1:  torch.optim's own steps, and rules for the options that it lacks: it is sm_70, "
        "and the kernels need sm_75 (Turing) or newer",
        f"kernels: compiled when a step on a GPU first needs them, kept in {tmp_path}/cache",
    ]


def test_info_without_a_driver(gpus, driver, kernels, tmp_path):
    """What is missing, and what will happen when it is there."""
    driver.set(driver_version=0)
    gpus(0)
    gpu, cache = said_of_gpus()
    assert gpu.startswith("cuda:    there is no NVIDIA driver, install it to use a GPU: ")
    assert cache.endswith(f"first needs them, kept in {tmp_path}/cache")


def test_info_of_a_torch_without_cuda(driver, kernels, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    seam.use_driver(kernels, "", "this torch is built without CUDA")
    assert said_of_gpus() == ["cuda:    this torch is built without CUDA"]


def test_self_test(gpus, driver, kernels, capsys):
    """Of every kernel; afterwards a step finds it compiled and proven."""
    gpus(1)
    assert self_test.main() == 0
    head, *lines, summary, cache = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == kernels.kernels()
    assert all(line.endswith("passed") and "compiled in" in line for line in lines)
    assert "Stand-in, sm_90" in head and "kept in" in cache
    assert f"{len(lines)} of {len(lines)} kernels passed" in summary
    assert compilations() == len(lines)
    in_a_new_process(kernels)
    assert launches_of(adam().step) == 1 and compilations() == len(lines)
    assert self_test.main() == 0
    assert capsys.readouterr().out.count("from the cache") == len(lines)


def test_self_test_finds_what_differs(gpus, broken, kernels, capsys):
    gpus(1)
    assert self_test.main() == 1
    out = capsys.readouterr().out
    assert f"0 of {len(kernels.kernels())} kernels passed" in out
    (line,) = (line for line in out.splitlines() if line.split()[0] == ADAM)
    assert "on this GPU it differs from the CPU in" in line


def test_self_test_without_a_gpu(gpus, driver, capsys):
    driver.set(driver_version=11080)
    gpus(0)
    assert self_test.main() == 1
    why = "this driver knows CUDA 11.8, fusedopt needs 12.0: update the driver"
    assert capsys.readouterr().out == f"cuda:0: no kernel can be used: {why}\n"
