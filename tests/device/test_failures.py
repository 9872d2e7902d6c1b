"""What fails on the way to a step: it is right all the same, or nothing has changed."""

from __future__ import annotations

import itertools

import pytest
import seam
import torch
from conftest import SEED, stand_in

import fusedopt
from device import (
    ADAM,
    adam,
    assert_refused,
    assert_right,
    cached,
    compilations,
    in_a_new_process,
    launches_of,
)


@pytest.mark.parametrize(
    "function, result, match",
    [
        ("nvrtcCompileProgram", 6, r"NVRTC 12.8 cannot compile it \(6\): some log"),
        ("nvrtcCompileProgram", 7, "cannot find libnvrtc-builtins"),
        ("nvrtcCreateProgram", 1, "giving NVRTC a program failed: an error of NVRTC"),
        ("nvrtcGetCUBIN", 3, "reading what NVRTC compiled failed: an error of NVRTC"),
        ("cuModuleLoadData", 1, "loading it failed"),
        ("cuModuleGetFunction", 500, "loading it failed"),
        ("cuFuncGetAttribute", 1, "loading it failed"),
        ("cuDevicePrimaryCtxRetain", 1, "taking the context of a GPU failed"),
        ("cuCtxPushCurrent_v2", 201, "using cuda:0 failed"),
        ("cuThreadExchangeStreamCaptureMode", 1, "allowing loads during a capture failed"),
        ("cuStreamCreate", 1, "making a stream for a trial failed"),
        ("cuMemAlloc_v2", 1, "taking [1-9][0-9]* KiB for a trial failed"),
        ("cuMemcpyHtoDAsync_v2", 1, "copying to the GPU failed"),
        ("cuMemcpyDtoHAsync_v2", 1, "copying from the GPU failed"),
        ("cuStreamSynchronize", 1, "what cuda:0 was given before failed"),
        ("cuLaunchKernel", 701, f"launching {ADAM} on cuda:0 failed"),
    ],
)
def test_a_function_fails_while_loading(function, result, match, driver, kernels):
    driver.fail(function, result)
    assert_refused(kernels, match)
    driver.fail(function, 0)
    assert stand_in().library.stand_in_contexts() == 0


def test_parameters_without_their_kernel_go_together(driver, kernels):
    """As where there is no kernel at all, and they are not looked at closely again."""
    driver.fail("nvrtcCompileProgram", 6)
    opt = adam()
    del opt.param_groups[0]["params"][2]  # an empty one, which needs no kernel
    with pytest.warns(RuntimeWarning, match=f"{ADAM} is not used"):
        for _ in range(3):
            assert_right(opt)
    assert seam.is_settled(opt)


def assert_nothing_changes(opt, match):
    params = opt.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=match):
        opt.step()
    assert all(map(torch.equal, params, before)) and not opt.state


@pytest.mark.parametrize(
    "function, after, result, match",
    [
        ("cuLaunchKernel", 0, 700, f"launching {ADAM} on cuda:0 failed"),
        ("cuMemcpyDtoHAsync_v2", 0, 716, "copying from the GPU failed"),
        ("cuStreamSynchronize", 2, 719, "a trial failed"),
    ],
)
def test_a_trial_after_which_the_gpu_is_lost(
    function, after, result, match, driver, kernels, monkeypatch
):
    """Once: the next process does without the kernel until somebody asks for another trial."""
    driver.fail(function, result, after)
    why = rf"{ADAM} is not used on cuda:0: when it was tried out, .*{match}.*\({result}\)"
    assert_nothing_changes(adam(), f"{why}, after which .*: start it again, it does without this")
    assert stand_in().library.stand_in_contexts() == 0
    driver.fail(function, 0)
    in_a_new_process(kernels)
    opt = adam()
    with pytest.warns(RuntimeWarning, match=f"{why}; FUSEDOPT_SELF_TEST=always tries"):
        assert launches_of(lambda: assert_right(opt)) == 0
    monkeypatch.setenv("FUSEDOPT_SELF_TEST", "always")
    in_a_new_process(kernels)
    adam().step()
    monkeypatch.delenv("FUSEDOPT_SELF_TEST")
    in_a_new_process(kernels)
    assert launches_of(adam().step) == 1


def test_a_gpu_that_fails_by_itself_during_a_trial(driver, kernels):
    """As by an error of its memory, or of a link: that is no verdict on a kernel."""
    for result in (214, 220, 709):
        in_a_new_process(kernels)
        driver.fail("cuLaunchKernel", result)
        assert_nothing_changes(adam(), rf"\({result}\), after which .*: start it again$")
        driver.fail("cuLaunchKernel", 0)
    in_a_new_process(kernels)
    assert not cached("verdict")
    assert_right(adam())


@pytest.mark.parametrize("function", ["cuStreamSynchronize", "cuModuleLoadData"])
def test_a_gpu_that_was_lost_before(function, driver, kernels):
    """That says nothing about a kernel."""
    driver.fail(function, 710)
    assert_nothing_changes(adam(), rf"{ADAM} is not used on cuda:0: .* failed: .*\(710\)")
    assert "(710)" in kernels.try_out(ADAM, 0)[2]
    assert not cached("verdict")
    driver.fail(function, 0)
    in_a_new_process(kernels)
    assert_right(adam())


def test_a_lost_gpu_and_no_cache(driver, kernels, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", "/proc/no/such/place")
    driver.fail("cuLaunchKernel", 700)
    assert_nothing_changes(adam(), "with FUSEDOPT_BACKEND=python, as this is not kept: /proc/no/su")


def test_the_kernel_of_the_norm_is_refused(driver, kernels):
    adam().step()
    driver.fail("nvrtcCompileProgram", 6)
    opt = adam(max_grad_norm=1e9)
    with pytest.warns(RuntimeWarning, match="fusedopt_grad_norm is not used"):
        assert_right(opt)
    grads = torch.cat([p.grad for p in opt.param_groups[0]["params"]])
    torch.testing.assert_close(opt.grad_norm.item(), grads.double().norm().item())


def test_a_launch_that_fails_changes_nothing(driver, kernels):
    opt = adam()
    opt.step()
    params = opt.param_groups[0]["params"]
    before = [p.detach().clone() for p in params], opt.state[params[0]]["step"].clone()
    driver.fail("cuLaunchKernel", 719)
    with pytest.raises(RuntimeError, match=f"launching {ADAM} on cuda:0 failed.*719"):
        opt.step()
    for p, value in zip(params, before[0], strict=True):
        assert torch.equal(p, value)
    assert opt.state[params[0]]["step"] == before[1]
    driver.fail("cuLaunchKernel", 0)
    opt.step()
    assert opt.state[params[0]]["step"] == before[1] + 1


@pytest.mark.parametrize("known", ["nothing", "some entries"])
def test_a_first_step_that_fails_changes_nothing(known, driver, kernels):
    """There is no state that makes the next step the second: with dampening that would show."""

    def made():
        torch.manual_seed(SEED)
        p = torch.randn(5).requires_grad_()
        p.grad = torch.randn(5)
        opt = fusedopt.SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
        if known != "nothing":
            opt.state[p] = {"note": "kept"}
        return p, opt

    other, expected = made()
    for _ in range(2):
        expected.step()
    p, opt = made()
    before, state = p.detach().clone(), {q: dict(entries) for q, entries in opt.state.items()}
    own = opt.state.get(p)
    driver.fail("cuLaunchKernel", 719)
    with pytest.raises(RuntimeError, match="launching"):
        opt.step()
    assert torch.equal(p, before) and opt.state == state and opt.state.get(p) is own
    driver.fail("cuLaunchKernel", 0)
    for _ in range(2):
        opt.step()
    assert torch.equal(p, other)


def test_an_interrupt_while_new_state_is_taken_back(driver, kernels, monkeypatch):
    """Finding a parameter in the state is Python code. Wherever an interrupt arrives in it, it is
    heard, and nothing has changed."""
    params = [torch.randn(5).requires_grad_() for _ in range(3)]
    for p in params:
        p.grad = torch.randn(5)
    fusedopt.SGD(params, lr=0.1, momentum=0.9).step()  # loads the kernel
    opt = fusedopt.SGD(params, lr=0.1, momentum=0.9)
    driver.fail("cuLaunchKernel", 719)
    hash_of, heard = torch.Tensor.__hash__, 0
    for at in itertools.count(1):
        calls = itertools.count(1)

        def interrupted(tensor, calls=calls, at=at):
            if next(calls) == at:
                raise KeyboardInterrupt
            return hash_of(tensor)

        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "__hash__", interrupted)
            try:
                opt.step()
            except KeyboardInterrupt:
                heard += 1
            except RuntimeError as error:
                assert "719" in str(error)
                break
        assert not opt.state
    assert heard >= len(params) and not opt.state


def test_what_the_python_rule_did_before_goes_back(driver, kernels):
    params = [torch.randn(5).requires_grad_(), torch.randn(5, dtype=torch.complex64)]
    params[1].requires_grad_()
    for p in params:
        p.grad = torch.randn_like(p)
    opt = fusedopt.SGD(params, lr=0.1, momentum=0.9)
    opt.step()
    before = [
        p.detach().clone() for p in (*params, *(e["momentum_buffer"] for e in opt.state.values()))
    ]
    driver.fail("cuLaunchKernel", 719)
    with pytest.raises(RuntimeError, match="launching"):
        opt.step()
    after = [*params, *(entries["momentum_buffer"] for entries in opt.state.values())]
    assert all(map(torch.equal, after, before))
    driver.fail("cuLaunchKernel", 0)
    opt.step()
    assert not any(map(torch.equal, after, before))


def test_a_launch_that_fails_behind_another_says_so(driver, kernels):
    """Each table is a launch, and nobody takes a launch back."""
    params = [torch.randn(3).requires_grad_() for _ in range(3000)]
    for p in params:
        p.grad = torch.randn(3)
    opt = fusedopt.SGD(params, lr=0.1)
    opt.step()
    driver.fail("cuLaunchKernel", 719, after=2)
    with pytest.raises(RuntimeError, match="719.*; 2 of this step's launches .* load a checkpoint"):
        opt.step()


def test_a_norm_that_fails_half_way_is_right_the_next_time(driver, kernels):
    """The first of two launches has counted."""
    params = [torch.randn(3).requires_grad_() for _ in range(3000)]
    for p in params:
        p.grad = torch.randn(3)
    opt = fusedopt.SGD(params, lr=0.0, max_grad_norm=1.0)
    opt.step()
    expected = opt.grad_norm.item()
    driver.fail("cuLaunchKernel", 719, after=1)
    with pytest.raises(RuntimeError, match="launching fusedopt_grad_norm"):
        opt.step()
    driver.fail("cuLaunchKernel", 0)
    for _ in range(2):
        opt.step()
        assert opt.grad_norm.item() == expected


def test_no_capture_of_what_is_not_loaded(driver, kernels):
    opt = adam(capturable=True)
    driver.set(capturing=1)
    with pytest.raises(RuntimeError, match="Adam: the first step loads kernels, which cannot be"):
        opt.step()
    assert compilations() == 0
    driver.set(capturing=0)
    opt.step()
    driver.set(capturing=1)
    assert launches_of(opt.step) == 1
