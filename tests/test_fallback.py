"""With a native module, without one, and with a broken one: what import, step and info say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import seam
import torch

import fusedopt

STEP = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fusedopt
    from fusedopt import Adam, SGD
import torch
for name in fusedopt.__all__:
    if not hasattr(torch.optim, name):
        continue
    results = []
    for module in (fusedopt, torch.optim):
        p = torch.linspace(-1, 1, 37).requires_grad_()
        opt = getattr(module, name)([p], lr=0.1)
        for _ in range(3):
            p.grad = p.detach() * 2 + 0.3
            opt.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)
for w in caught:
    print("WARNING", w.category.__name__, w.message)
print("STATUS", fusedopt.backend.status())
print("FILE", fusedopt.__file__)
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package as it is when nothing was built."""
    # An editable installation would find the native module of the original.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
    )
    source = Path(fusedopt.__file__).parent
    ignore = shutil.ignore_patterns("_native*", "_build_error.txt", "__pycache__")
    return Path(shutil.copytree(source, tmp_path / "fusedopt", ignore=ignore))


def python(package, *args, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("FUSEDOPT_")}
    env |= {"PYTHONPATH": str(package.parent), **environment}
    return subprocess.run(
        [sys.executable, *args],
        env=env,
        cwd=package.parent,
        capture_output=True,
        text=True,
        timeout=180,
    )


def succeeds(*args, **environment):
    done = python(*args, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def warnings_in(out):
    return [line for line in out.splitlines() if line.startswith("WARNING")]


def test_without_a_native_module(package):
    """One warning, and right steps."""
    out = succeeds(package, "-c", STEP)
    assert f"FILE {package}" in out
    (warning,) = warnings_in(out)
    assert "RuntimeWarning" in warning and "fusedopt._native" in warning
    assert "python -m fusedopt.info" in warning
    assert "STATUS python" in out


def test_python_backend_asked_for(package):
    """With the native module in place, if there is one: no warning."""
    installed = Path(fusedopt.__file__).parent
    for module in installed.glob("_native*"):
        shutil.copy(module, package)
    out = succeeds(package, "-c", STEP, FUSEDOPT_BACKEND="python")
    assert not warnings_in(out)
    assert "STATUS python (FUSEDOPT_BACKEND=python)" in out


def test_native_backend_asked_for_where_there_is_none(package):
    (package / "_build_error.txt").write_text("c++: fatal error: no such thing\nline two\n")
    done = python(package, "-c", "import fusedopt", FUSEDOPT_BACKEND="native")
    assert done.returncode != 0
    last = done.stderr[done.stderr.rindex("ImportError: FUSEDOPT_BACKEND=native") :]
    assert "No module named 'fusedopt._native'" in last
    assert "c++: fatal error: no such thing\nline two" in last


def test_unknown_backend(package):
    done = python(package, "-c", "import fusedopt", FUSEDOPT_BACKEND="cuda")
    assert done.returncode != 0 and "ValueError" in done.stderr and "'cuda'" in done.stderr


def test_broken_native_module(package):
    """A file that is no shared library: the loader's own words are passed on."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (package / f"_native{suffix}").write_bytes(b"\x7fELF\x02\x01\x01" + b"garbage" * 1000)
    out = succeeds(package, "-c", STEP)
    (warning,) = warnings_in(out)
    assert "ImportError" in warning and f"_native{suffix}" in warning
    done = python(package, "-c", "import fusedopt", FUSEDOPT_BACKEND="native")
    assert done.returncode != 0
    assert "ImportError: FUSEDOPT_BACKEND=native" in done.stderr
    assert f"_native{suffix}" in done.stderr


def test_info_without_a_native_module(package):
    """Backends, their status, and the complete build error; it is no error itself."""
    log = "cmake ended with exit code 1:\n\nCMakeLists.txt:12: no compiler\n  indented detail\n"
    (package / "_build_error.txt").write_text(log)
    done = python(package, "-W", "ignore", "-m", "fusedopt.info")
    assert done.returncode == 0, done.stderr
    assert fusedopt.__version__ in done.stdout
    for backend in ("native", "python", "cuda"):
        assert f"{backend}:" in done.stdout
    assert "No module named 'fusedopt._native'" in done.stdout
    for line in log.split("\n"):
        assert line in done.stdout


def test_info_as_installed():
    package = Path(fusedopt.__file__).parent
    choice = "" if fusedopt.backend.native else "python"
    out = succeeds(package, "-m", "fusedopt.info", FUSEDOPT_BACKEND=choice)
    assert fusedopt.backend.status() in out
    if fusedopt.backend.native:
        assert fusedopt.backend.native.__file__ in out
        assert any(isa in out for isa in ("baseline", "avx2", "avx512", "neon"))


def test_a_gpu_that_the_kernels_cannot_run_on(kernels, monkeypatch):
    """One warning, which says why and what to do, and right steps without a launch."""
    problem = "it is sm_70, and the kernels need sm_75 (Turing) or newer"
    monkeypatch.setattr(fusedopt.backend, "native", kernels)
    monkeypatch.setattr(kernels, "device_problem", lambda device: problem)
    seam.forget_gpu_problems()
    launches = kernels.num_launches()
    params = [torch.linspace(-1, 1, 37).requires_grad_() for _ in range(2)]
    ours, stock = fusedopt.Adam(params[:1]), torch.optim.Adam(params[1:], foreach=False)
    try:
        with pytest.warns(RuntimeWarning, match="torch's operators: it is sm_70") as caught:
            for _ in range(3):
                for p, opt in zip(params, (ours, stock), strict=True):
                    p.grad = p.detach() * 2 + 0.3
                    opt.step()
    finally:
        seam.forget_gpu_problems()
    assert len(caught) == 1 and "need sm_75" in str(caught[0].message)
    assert kernels.num_launches() == launches
    torch.testing.assert_close(*params)
