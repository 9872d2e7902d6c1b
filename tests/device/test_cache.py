"""Compiled kernels and verdicts, kept for the next process."""

from __future__ import annotations

import ctypes
import os
import random
import re
import resource
import shutil
import threading
from pathlib import Path

import pytest
import seam

from device import adam, alone, assert_right, cached, compilations, in_a_new_process, launches_of


def test_the_next_process_takes_it_from_the_cache(driver, kernels):
    assert launches_of(adam().step) > 1  # the trial
    in_a_new_process(kernels)
    assert launches_of(adam().step) == 1
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
    assert (launches_of(opt.step) > 1) == (what == "verdict")
    assert compilations() == 1 + (what == "kernel")
    in_a_new_process(kernels)
    assert launches_of(opt.step) == 1
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
    assert launches_of(adam().step) > 1
    assert compilations() == 1


@pytest.mark.parametrize("change", ["name", "size"])
def test_another_release_of_the_driver_tries_it_out(change, kernels, driver, tmp_path):
    """Those of 580 all know CUDA 13.0. Where the name says nothing, the size does."""
    libraries = [tmp_path / "a/libcuda.so.580.65.06", tmp_path / "b/libcuda.so.580.65.06"]
    if change == "name":
        libraries[1] = libraries[1].with_name("libcuda.so.580.95.05")
    for library in libraries:
        library.parent.mkdir()
        shutil.copy(driver.path, library)
        library.with_name("libcuda.so.1").symlink_to(library)
    if change == "size":
        with libraries[1].open("ab") as file:
            file.write(bytes(8))
    for library in libraries:
        opened = ctypes.CDLL(str(library))
        opened.stand_in_run_with.argtypes = [ctypes.c_void_p]
        opened.stand_in_run_with(kernels.RUN_ON_HOST)
        for is_new in (True, False):
            seam.use_driver(kernels, str(library.with_name("libcuda.so.1")))
            before = opened.stand_in_calls(b"cuLaunchKernel")
            adam().step()
            assert (opened.stand_in_calls(b"cuLaunchKernel") - before > 1) == is_new
    assert len(cached()) == 1 and len(cached("verdict")) == 2


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


def test_no_space(driver, kernels, caplog):
    """The kernel is in memory, and what took long says that it will again, and why."""
    caplog.set_level("INFO", "fusedopt")
    driver.set(compile_ms=1100)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # as Python has it, no signal comes
    try:
        opt = adam()
        opt.step()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    folder = os.environ["FUSEDOPT_CACHE_DIR"]
    assert re.search(r"compiled 1 kernel in \d\.\d s, not kept: ", caplog.text)
    why = f"{folder} cannot be written: File too large: make room, or name another folder"
    assert why in caplog.text
    assert [*Path(folder).iterdir()] == []
    driver.set(compile_ms=0)
    assert_right(opt)
    in_a_new_process(kernels)
    assert_right(adam())
    assert compilations() == 2 and len(cached()) == 1


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


ALONE = """
import conftest, device, fusedopt, torch
fusedopt.backend.native = conftest.require_kernels()
for _ in range(20):
    device.assert_right(device.adam())
    device.in_a_new_process(fusedopt.backend.native)
print(conftest.stand_in().calls("nvrtcCompileProgram"))
"""


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
