"""Limits of memory, and processes that are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fusedopt


def script(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    paths = [str(Path(fusedopt.__file__).parents[1]), str(Path(__file__).parents[1])]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


LIMITED = """
import copy, resource, sys
import fusedopt, torch
from cases import RICHEST_OF, draw, leaf, snapshot

torch.set_num_threads(1)
if sys.argv[1] == "python":
    fusedopt.backend.native = None
failed = done = 0
for case in [RICHEST_OF["SGD"], RICHEST_OF["Adam"]]:
    values, (grads,) = draw([(200_000,), (3,), (100_000,)] + [(2,)] * 200, 1)
    for steps in (0, 1):
        def twin():
            params = [leaf(v) for v in values]
            for p, g in zip(params, grads):
                p.grad = g
            opt = case.ours(params)
            for _ in range(steps):
                opt.step()
            return opt

        reference = twin()
        before = snapshot(reference)
        reference.step()
        after = snapshot(reference)
        del reference
        opt = twin()
        for more in range(0, 12 << 20, 3 << 17):
            pages = int(open("/proc/self/statm").read().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, -1))
            try:
                opt.step()
                stepped = True
            except (MemoryError, RuntimeError):
                stepped = False
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
            assert snapshot(opt) == (after if stepped else before), (case, steps, more)
            failed += not stepped
            done += stepped
            if stepped:
                break
        else:
            raise AssertionError("never enough memory")
print(failed, done)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("which", ["native", "python"])
def test_a_limit_of_memory(which):
    """Until the address space is enough for the step, it fails and changes nothing."""
    # Without these, the allocator would have what the runs before have freed.
    process = script(LIMITED, which, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0")
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    failed, done = map(int, out.split())
    assert failed > done == 4


SAVING = """
import os, sys
import torch
from torch import nn
import fusedopt

torch.set_num_threads(1)
path, end = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))
optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2)
at = 0
if os.path.exists(path):
    checkpoint = torch.load(path)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    at = checkpoint["at"]
print("ready", flush=True)
while at < end:
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(at))
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()
    at += 1
    with open(path + ".new", "wb") as file:
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "at": at}, file
        )
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".new", path)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_a_process_killed_while_it_saves(tmp_path):
    """docs/schedulers-and-checkpoints.md: the file is the old or the new one, and resuming from it
    gives the bits of a run that nobody disturbed."""
    end = 40
    undisturbed, path = tmp_path / "undisturbed.pt", tmp_path / "checkpoint.pt"
    process = script(SAVING, str(undisturbed), str(end))
    assert process.wait(100) == 0, process.stderr.read()
    killed = 0
    while killed < 3:
        process = script(SAVING, str(path), str(end))
        assert process.stdout.readline() == "ready\n"
        time.sleep(random.uniform(0, 0.04))
        process.kill()
        process.communicate()
        killed += process.returncode != 0
        if path.exists():
            torch.load(path)
        if process.returncode == 0:
            break
    process = script(SAVING, str(path), str(end))
    assert process.wait(100) == 0, process.stderr.read()
    ours, expected = torch.load(path), torch.load(undisturbed)
    assert killed and ours["at"] == expected["at"] == end
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
