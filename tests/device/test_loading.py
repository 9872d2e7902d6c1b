"""From the first step on a GPU to kernels that are ready: the driver, the compiler, the cache and
the trial, with a library of the tests' own in the place of torch's. Whatever fails, the steps are
right."""

from __future__ import annotations

import ctypes
import locale
import os
import random
import shutil
import threading
from pathlib import Path

import nvrtc
import pytest
import seam
import torch
from conftest import StandIn, stand_in
from test_native import script

import fusedopt

ADAM = "fusedopt_AdamUpdate_float_false"


@pytest.fixture
def driver(kernels, monkeypatch, tmp_path):
    """The stand-in as it is at first, with a cache of its own, under the module for kernels."""
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSEDOPT_SELF_TEST", raising=False)
    monkeypatch.setattr(fusedopt.backend, "native", kernels)
    stand_in().reset()
    seam.use_driver(kernels, stand_in().path)
    yield stand_in()
    monkeypatch.delenv("FUSEDOPT_SELF_TEST", raising=False)
    stand_in().reset()
    stand_in().run_with(kernels.RUN_ON_HOST)
    seam.use_driver(kernels, stand_in().path)


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


def launches_of(kernels, run):
    before = kernels.num_launches()
    run()
    return kernels.num_launches() - before


def compilations():
    return stand_in().calls("nvrtcCompileProgram")


def cached(kind=""):
    return sorted(
        path
        for path in Path(os.environ["FUSEDOPT_CACHE_DIR"]).iterdir()
        if ("-verdict-" in path.name) == (kind == "verdict")
    )


# Loading --------------------------------------------------------------------------------------


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


def test_the_next_process_takes_it_from_the_cache(driver, kernels):
    assert launches_of(kernels, adam().step) > 1  # the trial
    in_a_new_process(kernels)
    assert launches_of(kernels, adam().step) == 1
    assert compilations() == 1


@pytest.mark.parametrize("what", ["kernel", "verdict"])
@pytest.mark.parametrize("damage", ["a byte", "the end", "all", "other content"])
def test_a_damaged_cache(what, damage, driver, kernels):
    adam().step()
    (path,) = cached("" if what == "kernel" else what)
    content = bytearray(path.read_bytes())
    if damage == "a byte":
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    elif damage == "other content":
        content = content.replace(b"stand-in: ", b"").replace(b"passed", b"failed")
    path.write_bytes(content[: {"the end": len(content) // 2, "all": 0}.get(damage, len(content))])
    in_a_new_process(kernels)
    opt = adam()
    assert (launches_of(kernels, opt.step) > 1) == (what == "verdict")
    assert compilations() == 1 + (what == "kernel")
    in_a_new_process(kernels)
    assert launches_of(kernels, opt.step) == 1
    assert compilations() == 1 + (what == "kernel")


@pytest.mark.parametrize(
    "change", [{"nvrtc_version": 12090}, {"major": 8}, {"driver_version": 12000}], ids=str
)
def test_a_cache_of_another_version(change, driver, kernels):
    adam().step()
    driver.set(**change)
    in_a_new_process(kernels)
    adam().step()
    assert compilations() == 2 and len(cached()) == 2


def test_a_new_driver_tries_out_what_was_compiled(driver, kernels):
    adam().step()
    driver.set(driver_version=13010)
    in_a_new_process(kernels)
    assert launches_of(kernels, adam().step) > 1
    assert compilations() == 1


@pytest.mark.parametrize("folder", ["a file", "nowhere", "of all", "of another user"])
def test_a_folder_that_cannot_be_used(folder, driver, kernels, tmp_path, monkeypatch, recwarn):
    """No error, and no trace: the kernel is in memory."""
    place = tmp_path / "other"
    if folder == "a file":
        place.write_text("something")
    elif folder == "nowhere":
        place = Path("/proc/no/such/place")
    else:
        place.mkdir()
        if folder == "of all":
            place.chmod(0o777)
        elif os.geteuid() != 0:
            pytest.skip("needs root")
        else:
            os.chown(place, 12345, 12345)
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(place))
    assert_right(adam())
    in_a_new_process(kernels)
    assert_right(adam())
    assert compilations() == 2 and not recwarn.list
    assert not place.is_dir() or not [*place.iterdir()]
    assert "not kept" in kernels.describe_cache() and str(place) in kernels.describe_cache()


def test_where_the_cache_is(driver, kernels, tmp_path, monkeypatch):
    monkeypatch.delenv("FUSEDOPT_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert kernels.describe_cache() == f"kept in {tmp_path}/home/.cache/fusedopt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert kernels.describe_cache() == f"kept in {tmp_path}/xdg/fusedopt"
    assert (tmp_path / "xdg/fusedopt").stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    assert "neither FUSEDOPT_CACHE_DIR nor HOME" in kernels.describe_cache()


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


ALONE = """
import conftest, fusedopt, test_loading, torch
fusedopt.backend.native = conftest.require_kernels()
for _ in range(20):
    test_loading.assert_right(test_loading.adam())
    test_loading.in_a_new_process(fusedopt.backend.native)
print(conftest.stand_in().calls("nvrtcCompileProgram"))
"""


def alone(code, folder):
    here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    return script(here + code, FUSEDOPT_CACHE_DIR=str(folder))


def test_processes_share_a_cache(kernels, tmp_path):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(int(alone(ALONE, tmp_path / "cache"))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(count <= 1 for count in found) and sum(found) >= 1
    left = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len(left) == 2 and not [name for name in left if name.endswith(".part")]


FORKED = """
import os
import conftest, fusedopt, test_loading
module = fusedopt.backend.native = conftest.require_kernels()
test_loading.adam().step()
read, write = os.pipe()
if os.fork() == 0:
    try:
        test_loading.adam().step()
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


# What is not there ----------------------------------------------------------------------------


def assert_left_out(kernels, match):
    """The steps are right without a launch, and one warning says why."""
    opt = adam()
    with pytest.warns(RuntimeWarning, match=match) as caught:
        assert launches_of(kernels, lambda: assert_right(opt)) == 0
    assert len(caught) == 1, [str(warning.message) for warning in caught]


def test_a_torch_without_cuda(driver, kernels):
    seam.use_driver(kernels, "", "this torch is built without CUDA")
    assert_left_out(kernels, "Python rule: this torch is built without CUDA")


def test_no_such_library(driver, kernels):
    seam.use_driver(kernels, "/no/such/library.so")
    assert_left_out(kernels, "cannot be loaded: /no/such/library.so")


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
        ({"nvrtc_version": 11080}, "NVRTC is 11.8, fusedopt needs 12.0: update torch"),
        ({"major": 7, "minor": 0}, "it is sm_70, and the kernels need sm_75"),
        ({"device_count": 0}, "has 0 GPUs, and cuda:0 is not among them: set CUDA_VISIBLE_DEVICES"),
    ],
    ids=str,
)
def test_too_old(settings, match, driver, kernels):
    driver.set(**settings)
    seam.use_driver(kernels, driver.path)
    assert_left_out(kernels, match)


def test_gpus_of_several_architectures(driver, kernels):
    """Each is judged by itself. A MIG device is as any other of its architecture."""
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


# What fails on the way ------------------------------------------------------------------------


def assert_refused(kernels, match):
    """The steps are right; a warning for the kernel says what and why."""
    opt = adam()
    with pytest.warns(RuntimeWarning, match=match) as caught:
        assert_right(opt)
    assert len(caught) == 1 and f"{ADAM} is not used on cuda:0" in str(caught[0].message)


@pytest.mark.parametrize(
    "function, result, match",
    [
        ("nvrtcCompileProgram", 6, r"NVRTC 12.8 cannot compile it \(6\): some log"),
        ("nvrtcCompileProgram", 7, "cannot find libnvrtc-builtins"),
        ("nvrtcCreateProgram", 1, "giving NVRTC a program failed"),
        ("nvrtcGetCUBIN", 3, "reading what NVRTC compiled failed"),
        ("cuModuleLoadData", 2, "loading it failed: out of memory"),
        ("cuModuleGetFunction", 500, "loading it failed"),
        ("cuFuncGetAttribute", 2, "loading it failed: out of memory"),
        ("cuDevicePrimaryCtxRetain", 2, "taking the context of a GPU failed: out of memory"),
        ("cuCtxPushCurrent_v2", 201, "using cuda:0 failed"),
        ("cuThreadExchangeStreamCaptureMode", 1, "allowing loads during a capture failed"),
        ("cuStreamCreate", 2, "making a stream for a trial failed"),
        ("cuMemAlloc_v2", 2, "for a trial failed: out of memory"),
        ("cuMemcpyHtoDAsync_v2", 700, "copying to the GPU failed"),
        ("cuMemcpyDtoHAsync_v2", 700, "copying from the GPU failed"),
        ("cuStreamSynchronize", 700, "a trial failed"),
        ("cuLaunchKernel", 700, f"launching {ADAM} on cuda:0 failed"),
    ],
)
def test_a_function_fails_while_loading(function, result, match, driver, kernels):
    driver.fail(function, result)
    assert_refused(kernels, match)
    driver.fail(function, 0)
    assert stand_in().library.stand_in_contexts() == 0


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
    assert launches_of(kernels, opt.step) == 1


# Drivers and GPUs of other years --------------------------------------------------------------


@pytest.mark.parametrize("versions", [{"driver_version": 12000}, {"nvrtc_version": 12000}], ids=str)
def test_small_tables_where_large_ones_are_unknown(versions, driver, kernels):
    params = [torch.randn(3).requires_grad_() for _ in range(490)]
    opt = fusedopt.SGD(params, lr=0.1)
    for p in params:
        p.grad = torch.randn(3)
    opt.step()
    assert launches_of(kernels, opt.step) == 1
    driver.set(**versions)
    in_a_new_process(kernels)
    opt.step()
    assert launches_of(kernels, opt.step) == 4  # a table has 4,000 bytes, a tensor takes 32 of them
    assert b"FUSEDOPT_ARGUMENT_BYTES=4096" in image()


def image():
    text = ctypes.c_char_p()
    size = stand_in().library.stand_in_image(ctypes.byref(text))
    return ctypes.string_at(text, size)


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


# The trial ------------------------------------------------------------------------------------


HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p
)


@pytest.fixture
def broken(driver, kernels):
    """A GPU whose kernels do nothing; what they are called with."""
    seen = []
    hook = HOOK(lambda name, *rest: seen.append(name.decode()) or 1)
    driver.run_with(ctypes.cast(hook, ctypes.c_void_p).value)
    yield seen
    driver.run_with(kernels.RUN_ON_HOST)


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
    assert launches_of(kernels, adam().step) == 1


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
    assert {name: kernels.try_out(name) for name in kernels.kernels()} == dict.fromkeys(
        kernels.kernels(), ""
    )


def test_every_kernel_that_does_nothing_fails(broken, driver, kernels):
    for name in kernels.kernels():
        assert "differs from the CPU" in kernels.try_out(name)
