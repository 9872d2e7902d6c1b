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


def test_every_kernel_passes(driver, kernels):
    """And what it is tried out with reaches every kernel: one that does nothing fails."""
    assert {name: kernels.try_out(name, 0)[2] for name in kernels.kernels()} == dict.fromkeys(
        kernels.kernels(), ""
    )


def test_every_kernel_that_does_nothing_fails(broken, driver, kernels):
    for name in kernels.kernels():
        assert "differs from the CPU" in kernels.try_out(name, 0)[2]
