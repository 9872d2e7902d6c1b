"""A GPU without kernels: FUSEDOPT_BACKEND=python, a torch without NVRTC, or a compiler that refuses
them. The steps are right, and what is missing is said once."""

from __future__ import annotations

import contextlib
import subprocess
import warnings

import pytest
import seam
import torch
from cases import FLOWS, RICHEST_OF, SCALARS, Amp, Case, draw, leaf, richest

import fusedopt
from on_gpu import (
    DEVICE,
    HOST,
    SHAPES,
    assert_all_near,
    assert_near,
    clip_and_step,
    limit_for,
    num_launches,
    put,
    train_on,
)

NO_COMPILER = 'extern "C" int nvrtcCompileProgram(void*, int, const char* const*) { return 6; }'


@pytest.fixture(params=["no module", "no library", "no kernel"])
def missing(request, monkeypatch, tmp_path):
    """What is missing, and how many warnings a first step gives."""
    native = fusedopt.backend.native
    library, problem = seam.gpu_library()
    if request.param == "no module":
        monkeypatch.setattr(fusedopt.backend, "native", None)
    elif request.param == "no library":
        seam.use_driver(native, "", "for a test")
    else:
        monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path / "cache"))
        seam.use_driver(native, refusing(library, tmp_path))
    yield request.param
    monkeypatch.undo()
    seam.use_driver(native, library, problem)


def refusing(library, folder):
    """One that compiles nothing, and is torch's in all else."""
    source, shim = folder / "no_compiler.cpp", folder / "no_compiler.so"
    source.write_text(NO_COMPILER)
    place = library.rpartition("/")[0]
    command = ["g++", "-shared", "-fPIC", source, "-Wl,--no-as-needed", library]
    subprocess.run([*command, f"-Wl,-rpath,{place}", "-o", shim], check=True)
    return str(shim)


@contextlib.contextmanager
def nothing_launched(missing):
    """And one warning, or none where it came with the import."""
    native = fusedopt.backend.native
    before = native and num_launches()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert before == (native and num_launches())
    said = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    said = [text for text in said if text.startswith("fusedopt")]
    if missing == "no module":
        assert not said
    elif missing == "no library":
        assert len(said) == 1 and ": for a test. " in said[0]
    else:  # one for each kernel, that of the norm too
        assert len(said) == len({*said}) > 0
        assert all("cannot compile it (6)" in text for text in said)


WAYS = {"": {}, "capturable": {"capturable": True}, "clip": {"amp_fused": True}}


@richest
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_stock_without_kernels(case, way, dtype, missing):
    values, grads = draw(SHAPES, 4, dtype)
    if way != "clip":
        grads[1][1] = grads[2][0] = None
    limit = limit_for(grads) if way == "clip" else None
    with nothing_launched(missing):
        more = {**WAYS[way], "max_grad_norm": limit}
        params, opt = train_on(DEVICE, case.ours, values, grads, **more)
    exact = [leaf(put(v), torch.float64) for v in values]
    stock = case.exact(exact)
    clip_and_step(stock, exact, grads, limit or float("inf"))
    assert_all_near(params, exact)
    for p, q in zip(params, exact, strict=True):
        assert opt.state.get(p, {}).keys() == stock.state.get(q, {}).keys()
        for key in opt.state.get(p, {}).keys() & {*SCALARS}:
            assert_near(opt.state[p][key], stock.state[q][key], key, torch.float32)


@pytest.mark.parametrize("more", [{"state_dtype": "8bit"}, {"master_weights": "split"}], ids=str)
def test_options_that_torch_lacks(more, missing):
    """As the same on the CPU."""
    values, grads = draw([(33,), (4099,)], 3, torch.bfloat16)
    case = Case("Adam", {"lr": 0.1})
    with nothing_launched(missing):
        params, opt = train_on(DEVICE, case.ours, values, grads, **more)
    others, other = train_on(HOST, case.ours, values, grads, **more)
    assert_all_near(params, others)
    for p, q in zip(params, others, strict=True):
        for key, value in opt.state[p].items():
            there = other.state[q][key]
            assert (value.dtype, value.shape) == (there.dtype, there.shape)


@pytest.mark.parametrize("fused", [False, True], ids=["default", "amp_fused"])
def test_grad_scaler_without_kernels(fused, missing):
    for case in (RICHEST_OF["Adam"], RICHEST_OF["SGD"]):
        case = Case(case.name, {**case.options, "lr": 0.01})
        with nothing_launched(missing) if case.name == "Adam" else contextlib.nullcontext():
            for flow in FLOWS:
                ours = Amp(case.ours, device=DEVICE, amp_fused=fused).run(flow)
                stock = Amp(case.stock, device=DEVICE).run(flow)
                assert ours.log == stock.log
                assert_all_near(ours.params, stock.params)
