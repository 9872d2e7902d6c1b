"""A kernel proves itself before its first use."""

from __future__ import annotations

import pytest
import torch

from device import (
    ADAM,
    adam,
    assert_refused,
    assert_right,
    compilations,
    in_a_new_process,
    launches_of,
)

DIFFERS = "on this GPU it differs from the CPU in .* of the parameter .* instead of 0x"


def test_a_kernel_that_differs_is_not_used(broken, driver, kernels):
    assert_refused(kernels, DIFFERS)
    assert broken == [ADAM]
    assert_right(adam())  # without another warning
    assert broken == [ADAM]


def test_the_verdict_is_remembered(broken, driver, kernels, monkeypatch):
    assert_refused(kernels, DIFFERS)
    in_a_new_process(kernels)
    assert_refused(kernels, DIFFERS)
    assert broken == [ADAM] and compilations() == 1
    driver.run_with(kernels.RUN_ON_HOST)
    monkeypatch.setenv("FUSEDOPT_SELF_TEST", "always")
    in_a_new_process(kernels)
    assert_right(adam())
    monkeypatch.delenv("FUSEDOPT_SELF_TEST")
    in_a_new_process(kernels)
    assert launches_of(adam().step) == 1


def test_no_trial(broken, driver, kernels, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_SELF_TEST", "never")
    in_a_new_process(kernels)
    opt = adam()
    before = opt.param_groups[0]["params"][0].detach().clone()
    opt.step()
    assert torch.equal(before, opt.param_groups[0]["params"][0]) and broken == [ADAM]


def test_a_setting_that_does_not_exist(driver, kernels, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_SELF_TEST", "x")
    with pytest.raises(ValueError, match="FUSEDOPT_SELF_TEST=x: it is always or never"):
        in_a_new_process(kernels)


def assert_every_kernel_passes(kernels):
    found = {name: kernels.try_out(name, 0)[2] for name in kernels.kernels()}
    assert found == dict.fromkeys(kernels.kernels(), "")


@pytest.mark.parametrize("asynchronous", [0, 1])
def test_every_kernel_passes(asynchronous, driver, kernels):
    """Also where the driver reads what it copies, and launches, no sooner than it must."""
    driver.set(asynchronous=asynchronous)
    assert_every_kernel_passes(kernels)


def test_subnormal_numbers_count(driver, kernels):
    """A thread that flushes them has the bits of a GPU, which does not, all the same."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush them")
    try:
        driver.set(keeps_subnormals=1)
        assert_every_kernel_passes(kernels)
        assert (torch.tensor([1e-39]) * 1.5).item() == 0  # the thread goes on as it did
    finally:
        torch.set_flush_denormal(False)


def test_every_kernel_that_does_nothing_fails(broken, driver, kernels):
    for name in kernels.kernels():
        assert "differs from the CPU" in kernels.try_out(name, 0)[2]
