"""A GPU without memory for what a kernel needs is full for now: the kernel is tried again later."""

from __future__ import annotations

import time

import pytest
import seam
import torch

import fusedopt
from device import (
    ADAM,
    adam,
    assert_refused,
    assert_right,
    compilations,
    in_a_new_process,
    launches_of,
)

ALLOCATES = ("cuMemAlloc_v2", "cuModuleLoadData", "cuDevicePrimaryCtxRetain")


def step_until(is_reached, make_step):
    """Which takes a second or so: what failed is tried again after a while."""
    begin = time.monotonic()
    while time.monotonic() < begin + 60:
        make_step()
        if is_reached():
            return
    pytest.fail("it is not reached")


@pytest.mark.parametrize(
    "function, options",
    [(ALLOCATES[0], {}), (ALLOCATES[1], {"max_grad_norm": 1e9}), (ALLOCATES[2], {})],
    ids=str,
)
def test_memory_that_is_there_later(function, options, driver, kernels, recwarn):
    """The steps before are right, the later ones take the kernels; it is said once."""
    begin = kernels.num_launches()
    driver.fail(function, 2)
    opt = adam(**options)
    del opt.param_groups[0]["params"][2]  # an empty one, which needs no kernel
    assert_right(opt)
    for _ in range(300):
        opt.step()
    assert seam.is_settled(opt)
    assert kernels.num_launches() == begin
    assert driver.calls(function) < 100  # not in every step
    driver.fail(function, 0)
    step_until(lambda: launches_of(opt.step) == 1 + len(options), opt.step)
    assert_right(adam(**options))
    assert compilations() == 1 + len(options)
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == 1 + len(options)
    assert f"{ADAM} is not used on cuda:0: " in said[-1]
    assert "failed: out of memory (2); later steps try again" in said[-1]


@pytest.mark.parametrize("function", ALLOCATES)
def test_memory_that_torch_has_and_does_not_use(function, driver, kernels, monkeypatch, recwarn):
    driver.fail(function, 2)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: driver.fail(function, 0))
    begin = kernels.num_launches()
    adam().step()
    assert kernels.num_launches() == begin + 1 and not recwarn.list


def test_what_one_optimizer_finds_another_sees(driver, kernels):
    driver.fail("cuMemAlloc_v2", 2)
    opt = adam()
    del opt.param_groups[0]["params"][2]
    with pytest.warns(RuntimeWarning, match="later steps try again"):
        for _ in range(5):
            opt.step()
    assert seam.is_settled(opt)
    driver.fail("cuMemAlloc_v2", 0)
    begin = kernels.num_launches()
    step_until(lambda: kernels.num_launches() > begin, lambda: adam().step())
    assert launches_of(opt.step) == 1


def test_not_within_a_capture(driver, kernels):
    """A step that did without the kernels before is no error."""
    opt = adam(capturable=True)
    driver.fail("cuMemAlloc_v2", 2)
    assert_refused(kernels, "later steps try again")
    opt.step()
    driver.fail("cuMemAlloc_v2", 0)
    begin, tried = kernels.num_launches(), driver.calls("cuMemAlloc_v2")
    driver.set(capturing=1)
    step_until(lambda: kernels.num_put_off_no_longer() > 1, opt.step)
    assert (kernels.num_launches(), driver.calls("cuMemAlloc_v2")) == (begin, tried)
    driver.set(capturing=0)
    step_until(lambda: kernels.num_launches() > begin, opt.step)


def test_who_asks_for_a_trial_is_told_each_time(driver, kernels):
    driver.fail("cuMemAlloc_v2", 2)
    for _ in range(2):
        assert "out of memory" in kernels.try_out(ADAM, 0)[2]
    driver.fail("cuMemAlloc_v2", 0)
    assert kernels.try_out(ADAM, 0)[2] == ""


def test_room_cannot_be_made(driver, kernels, monkeypatch):
    """Where torch cannot free what it keeps, as during a capture, the step is torch's."""

    def fails():
        raise RuntimeError("captures are underway")

    monkeypatch.setattr(fusedopt.backend, "_free_memory", fails)
    in_a_new_process(kernels)
    driver.fail("cuMemAlloc_v2", 2)
    assert_refused(kernels, "making room failed: RuntimeError: captures are underway; later steps")
