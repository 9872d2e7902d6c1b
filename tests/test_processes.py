"""Several processes: forked, spawned, and workers of a DataLoader beside the step."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import random
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
from cases import RICHEST, bits, draw, snapshot, train
from test_native import script
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusedopt

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
SHAPES = [(300_000,), (7, 5), (90, 80)]


def trained(case: Any, backend: str) -> Any:
    """What an optimizer has after three steps, on two threads."""
    native, threads = fusedopt.backend.native, torch.get_num_threads()
    try:
        fusedopt.backend.native = None if backend == "python" else native
        torch.set_num_threads(2)
        torch.manual_seed(3)
        random.seed(3)
        return snapshot(train(case.ours, *draw(SHAPES, 3))[1])
    finally:
        fusedopt.backend.native = native
        torch.set_num_threads(threads)


@pytest.mark.parametrize("wait", ["", "always"])
def test_spawned_processes_give_the_same_bits(wait, monkeypatch):
    """Four on whatever cores there are, at the same time, with and without late threads, which only
    native steps have. Importing torch takes most of it."""
    if wait and fusedopt.backend.native is None:
        pytest.skip("no native module")
    monkeypatch.setenv("FUSEDOPT_CPU_THREADS", wait)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # torch's threads leave the cores to others
    backends = ["native"] if fusedopt.backend.native else []
    backends += ["python"] if not wait else []
    calls = [*product((*RICHEST, *RICHEST[:3]), backends)]
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = [future.result(120) for future in [pool.submit(trained, *c) for c in calls]]
        again = [pool.submit(trained, *c).result(120) for c in calls[: len(backends)]]
    assert [trained(*c) for c in calls] == results
    assert again == results[: len(backends)]


def go_on(pickled: bytes) -> Any:
    opt, grads = pickle.loads(pickled)
    for param, grad in zip(opt.param_groups[0]["params"], grads, strict=True):
        param.grad = grad
    opt.step()
    return snapshot(opt)


def test_an_optimizer_sent_to_another_process_goes_on(native):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for case in RICHEST:
            values, grads = draw(SHAPES, 2)
            _, opt = train(case.ours, values, grads[:1])
            # Pickled here: a pool would share the memory of tensors.
            pickled = pickle.dumps((opt, grads[1]))
            assert pool.submit(go_on, pickled).result(120) == go_on(pickled), case


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_beside_the_workers_of_a_data_loader(start, native):
    """They live through two epochs of steps; the bits are those without workers."""
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start}")
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(48, 300), torch.randn(48, 1))
    nets = [nn.Sequential(nn.Linear(300, 1000), nn.Tanh(), nn.Linear(1000, 1))]
    nets.append(copy.deepcopy(nets[0]))
    workers = {"num_workers": 2, "multiprocessing_context": start, "persistent_workers": True}
    for net, more in zip(nets, ({}, workers), strict=True):
        opt = fusedopt.AdamW(net.parameters(), lr=0.01)
        loader = DataLoader(data, batch_size=12, **more)
        for _ in range(2):
            for inputs, targets in loader:
                opt.zero_grad()
                (net(inputs) - targets).square().mean().backward()
                opt.step()
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        assert bits(p) == bits(q)


@needs_fork
def test_forked_after_the_import():
    """A child steps on one thread, its parent on several, and both have the same bits. (Torch's own
    large operators hang in a child, on more than one thread.)"""
    out = script(
        """
import os, signal, torch
from cases import *
torch.set_num_threads(4)
values, grads = draw([(300_000,), (5,)], 1)
params, opt = train(RICHEST_OF["Adam"].ours, values, [])
for p, g in zip(params, grads[0]): p.grad = g
child = os.fork()
signal.alarm(60)
name = "child" if child == 0 else "parent"
if child == 0: torch.set_num_threads(1)
opt.step()
os.write(1, f"{name} {hash(str(snapshot(opt)))}\\n".encode())  # at once
if child: os.waitpid(child, 0)
os._exit(0)
""",
        PYTHONHASHSEED="0",
    )
    (one, first), (other, second) = map(str.split, out.splitlines())
    assert {one, other} == {"child", "parent"}
    assert first == second


@needs_fork
def test_forked_while_another_thread_steps():
    """The child has half a step and nobody who ends it: that is an error, and no waiting. Other
    optimizers go on."""
    out = script(
        """
import os, seam, signal, threading, torch
from cases import *
torch.set_num_threads(1)
values, grads = draw([(100,)], 1)
inside, forked = threading.Event(), threading.Event()

def wait():
    inside.set()
    forked.wait(60)

params, opt = train(RICHEST_OF["Adam"].ours, values, grads)
_, other = train(RICHEST_OF["Adam"].ours, values, grads)
seam.call_in_next_steps(opt, wait)
thread = threading.Thread(target=opt.step)
thread.start()
inside.wait(60)
child = os.fork()
if child == 0:
    signal.alarm(60)
    other.step()
    try:
        opt.step()
    except RuntimeError as error:
        os._exit(7 if "forked" in str(error) else 8)
    os._exit(9)
forked.set()
thread.join()
opt.step()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), opt.state[params[0]]["step"].item())
"""
    )
    assert out.split() == ["7", "3.0"]
