"""From the first step on a GPU to kernels that are ready."""

from __future__ import annotations

import locale
import threading

import nvrtc
import pytest
from conftest import stand_in

import fusedopt
from device import ADAM, adam, alone, assert_right, cached, compilations, in_a_new_process


def test_a_step_compiles_what_it_needs_and_nothing_else(driver, kernels):
    opt = adam()
    assert_right(opt)
    assert compilations() == 1
    (kernel,) = cached()
    (verdict,) = cached("verdict")
    assert kernel.name.startswith(ADAM) and verdict.name.startswith(ADAM)
    assert_right(adam())
    assert compilations() == 1
    fusedopt.SGD([opt.param_groups[0]["params"][0]], lr=0.1).step()
    assert compilations() == 2
    assert stand_in().library.stand_in_contexts() == 0


@pytest.mark.parametrize("compiler", nvrtc.compilers(), ids=str)
def test_a_real_compiler(compiler, driver, kernels):
    """Takes the sources and options of the product, and what it makes is loaded and kept."""
    driver.compile_with(compiler.path)
    try:
        in_a_new_process(kernels)
        assert_right(adam())
        (kernel,) = cached()
        assert b"\x7fELF" in kernel.read_bytes()
        in_a_new_process(kernels)
        before = compilations()
        assert_right(adam())
        assert compilations() == before
    finally:
        driver.compile_with("")


def test_the_locale_of_the_thread_stays(driver, kernels):
    """NVRTC leaves it as "C", in which Python takes the files that it opens for ASCII."""
    before = locale.nl_langinfo(locale.CODESET)
    adam().step()
    assert compilations() == 1 and locale.nl_langinfo(locale.CODESET) == before


def test_threads_wait_for_one_compilation(driver):
    opts = [adam() for _ in range(4)]
    threads = [threading.Thread(target=opt.step) for opt in opts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert compilations() == 1
    for opt in opts:
        assert opt.state[opt.param_groups[0]["params"][0]]["step"] == 1


FORKED = """
import os
import conftest, device, fusedopt
module = fusedopt.backend.native = conftest.require_kernels()
device.adam().step()
read, write = os.pipe()
if os.fork() == 0:
    try:
        device.adam().step()
        os.write(write, b"a step")
    except Exception as error:
        os.write(write, f"{module.device_problem(0)}\\n{error}".encode())
    os._exit(0)
print(os.read(read, 10_000).decode())
"""


def test_a_forked_child(kernels, tmp_path):
    """What the parent loaded is of no use to it."""
    problem, error = alone(FORKED, tmp_path).splitlines()
    assert "forked" in problem and "'spawn'" in problem
    assert "forked" in error
