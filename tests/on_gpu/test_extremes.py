"""Tensors beyond 32 bits, and processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedopt
from on_gpu import DEVICE

# Size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", [2**31 + 4099, 2**32 + 4099], ids=["2**31", "2**32"])
def test_large_tensors(numel):
    """p = 1 - g, every element of it, where g counts 0, 1, ..., 250, 0, ...: exact in bfloat16."""
    period, at_once = 251, 251 << 20
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * numel + 6 * at_once + 2**30:
        pytest.skip(f"needs {4 * numel / 2**30:.0f} GiB and some more, {free / 2**30:.0f} are free")
    pattern = torch.arange(period, device=DEVICE).to(torch.bfloat16).repeat(at_once // period)
    expected = 1 - pattern
    p = torch.ones(numel, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    p.grad = torch.empty_like(p)
    for begin in range(0, numel, at_once):
        part = p.grad[begin : begin + at_once]
        part.copy_(pattern[: part.numel()])
    opt = fusedopt.SGD([p], lr=1.0, max_grad_norm=float("inf"))
    opt.step()
    for begin in range(0, numel, at_once):
        part = p.detach()[begin : begin + at_once]
        if not torch.equal(part, expected[: part.numel()]):
            wrong = (part != expected[: part.numel()]).nonzero()
            pytest.fail(f"{len(wrong)} wrong, the first at {begin + wrong[0].item()}")
    full, rest = divmod(numel, period)
    squares = full * sum(i * i for i in range(period)) + sum(i * i for i in range(rest))
    torch.testing.assert_close(opt.grad_norm.item(), squares**0.5, rtol=1e-5, atol=0)
    del p, opt, part, pattern, expected
    torch.cuda.empty_cache()


# Processes ------------------------------------------------------------------------------------


FORK = """
import os, sys, traceback, torch, fusedopt

assert not torch.cuda.is_initialized()

def train(device):
    p = torch.linspace(-1, 1, 37, device=device).requires_grad_()
    opt = fusedopt.Adam([p], lr=0.1)
    for _ in range(3):
        p.grad = p.detach() * 2 + 0.3
        opt.step()
    return p.detach().cpu()

expected = train("cpu")
assert not torch.cuda.is_initialized()
child = os.fork()
if child == 0:
    try:
        torch.testing.assert_close(train("cuda"), expected)
        assert fusedopt.backend.native.num_launches() == 3
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert code == 0, code
torch.testing.assert_close(train("cuda"), expected)
"""


def test_a_fork_after_import_can_use_the_gpu():
    """Neither the import nor a step on the CPU initializes CUDA."""
    root = Path(fusedopt.__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-c", FORK],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
