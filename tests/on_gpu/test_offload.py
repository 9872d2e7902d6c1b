"""The optimizer on the host, of parameters on a GPU."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from cases import richest
from offloaded import assert_same, loss
from torch import nn

import fusedopt
from on_gpu import DEVICE, LONG

WAYS = [
    {"chunk": 2**16},
    {"overlap": "forward", "chunk": 2**16},
    {"overlap": "forward", "max_grad_norm": 0.1},
    {"gradients": "device", "chunk": 2**16, "max_grad_norm": 0.1},
]
every_way = pytest.mark.parametrize("way", WAYS, ids=str)


def network(dtype=torch.bfloat16):
    layers = [nn.Linear(100, 257), nn.Tanh(), nn.Linear(257, 300), nn.LayerNorm(300)]
    return nn.Sequential(*layers, nn.Linear(300, 100)).to(DEVICE, dtype)


def both(case, way, model, **options):
    twin = copy.deepcopy(model)
    settings = {name: way[name] for name in way if name != "max_grad_norm"}
    options |= {name: way[name] for name in way if name == "max_grad_norm"}
    cls = getattr(fusedopt, case.name)
    here = fusedopt.offload(model, cls, **settings, **copy.deepcopy(case.options), **options)
    return (model, here), (twin, case.ours(twin.parameters(), **options))


@richest
@every_way
def test_the_bits_of_a_step_on_the_gpu(case, way):
    """While the GPU is far behind, or has nothing to do."""
    options = {"master_weights": "split", "state_dtype": random.choice(["8bit", torch.bfloat16])}
    here, there = both(case, way, network(), **options)
    for at in range(20):
        inputs = torch.randn(33, 100, device=DEVICE, dtype=torch.bfloat16)
        for model, opt in (here, there):
            opt.zero_grad()
            if at % 7 == 0:
                torch.cuda._sleep(LONG // 4)
            loss(model, inputs).backward()
            opt.step()
    assert_same(*here, *there)


@every_way
def test_state_and_gradients_are_on_the_host(way):
    model = network()
    opt = fusedopt.offload(model, fusedopt.AdamW, **way)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss(model, torch.randn(33, 100, device=DEVICE, dtype=torch.bfloat16)).backward()
    opt.step()
    opt.synchronize()
    kept = sum(p.numel() for p in model.parameters() if p.numel() < 4096)
    left = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert all(
        value.device.type == "cpu" or value.numel() < 4096
        for entries in opt.state.values()
        for value in entries.values()
    )
    assert torch.cuda.memory_allocated() - before <= left + 2 * 4 * kept + 2**20


def test_state_leaves_the_gpu_and_comes_back():
    model = network()
    twin = copy.deepcopy(model)
    opt, other = (fusedopt.AdamW(m.parameters(), lr=0.1) for m in (model, twin))
    for _ in range(3):
        inputs = torch.randn(33, 100, device=DEVICE, dtype=torch.bfloat16)
        for each, its in ((model, opt), (twin, other)):
            its.zero_grad()
            loss(each, inputs).backward()
            fusedopt.load_state(its)
            its.step()
        before = torch.cuda.memory_allocated()
        fusedopt.offload_state(opt)
        moments = [e[key] for e in opt.state.values() for key in ("exp_avg", "exp_avg_sq")]
        assert all(moment.is_pinned() for moment in moments)
        assert torch.cuda.memory_allocated() <= before - sum(m.nbytes for m in moments) + 2**20
    fusedopt.load_state(opt)
    assert_same(model, opt, twin, other)


@pytest.mark.parametrize("gradients", ["host", "device"])
def test_a_scaler(gradients):
    """An infinite gradient skips the step, and halves the scale."""
    model = network(torch.float32)
    scaler = torch.amp.GradScaler(init_scale=2.0**10)
    opt = fusedopt.offload(model, fusedopt.AdamW, gradients=gradients, amp_fused=True)
    for at in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        opt.zero_grad()
        factor = float("inf") if at == 1 else 1.0
        scaler.scale(loss(model, torch.randn(33, 100, device=DEVICE)) * factor).backward()
        scaler.step(opt)
        scaler.update()
        after = [p.detach() for p in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == (at == 1)
    assert scaler.get_scale() == 2.0**9


def test_cpu_parameters_stay():
    on_gpu, on_cpu = nn.Linear(100, 100, device=DEVICE), nn.Linear(100, 100)
    params = [*on_gpu.parameters(), *on_cpu.parameters()]
    opt = fusedopt.offload(params, fusedopt.SGD, lr=0.1, momentum=0.9)
    (
        on_gpu(torch.randn(3, 100, device=DEVICE)).sum().cpu() + on_cpu(torch.randn(3, 100)).sum()
    ).backward()
    opt.step()
    assert all(param in opt.state for param in params)
