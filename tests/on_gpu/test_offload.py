"""The optimizer on the host, of parameters on a GPU."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from cases import RICHEST_OF, richest
from offloaded import assert_same, loss
from torch import nn

import fusedopt
from on_gpu import DEVICE, LONG, two_gpus

WAYS = [
    {"chunk": 2**16},
    {"overlap": "forward", "chunk": 2**16},
    {"overlap": "forward", "max_grad_norm": 0.1},
    {"gradients": "device", "chunk": 2**16, "max_grad_norm": 0.1},
]
ADAMW = RICHEST_OF["AdamW"]
every_way = pytest.mark.parametrize("way", WAYS, ids=str)


def network(dtype=torch.bfloat16, width=257):
    layers = [nn.Linear(100, width), nn.Tanh(), nn.Linear(width, 300), nn.LayerNorm(300)]
    return nn.Sequential(*layers, nn.Linear(300, 100)).to(DEVICE, dtype)


def warm_up(model):
    """What libraries allocate once."""
    loss(model, torch.randn(33, 100, device=DEVICE, dtype=torch.bfloat16)).backward()
    model.zero_grad()
    torch.cuda.synchronize()


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
    model = network(width=8000)  # whose moments have 13 MB
    warm_up(model)
    opt = fusedopt.offload(model, fusedopt.AdamW, **way)
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
    model = network(width=8000)
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


def test_gradients_from_another_stream():
    here, there = both(ADAMW, {"chunk": 2**16}, network())
    for _ in range(5):
        inputs = torch.randn(33, 100, device=DEVICE, dtype=torch.bfloat16)
        for model, opt in (here, there):
            opt.zero_grad()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                torch.cuda._sleep(LONG // 8)
                loss(model, inputs).backward()
            torch.cuda.current_stream().wait_stream(side)
            opt.step()
    assert_same(*here, *there)


def test_parameters_that_others_write():
    here, there = both(ADAMW, {"chunk": 2**16}, network())
    for _ in range(4):
        inputs = torch.randn(33, 100, device=DEVICE, dtype=torch.bfloat16)
        for model, opt in (here, there):
            opt.zero_grad()
            loss(model, inputs).backward()
            opt.step()
            with torch.no_grad():
                torch.cuda._sleep(LONG // 8)
                for param in model.parameters():
                    param.clamp_(-0.1, 0.1)
    assert_same(*here, *there)


@two_gpus
def test_two_gpus_in_one_process():
    layers = [nn.Linear(100, 300, device="cuda:0"), nn.Linear(300, 100, device="cuda:1")]
    twins = copy.deepcopy(layers)
    opt = fusedopt.offload([p for m in layers for p in m.parameters()], fusedopt.AdamW, lr=0.1)
    other = fusedopt.AdamW([p for m in twins for p in m.parameters()], lr=0.1)
    for _ in range(4):
        inputs = torch.randn(33, 100, device="cuda:0")
        for (first, second), its in ((layers, opt), (twins, other)):
            its.zero_grad()
            second(first(inputs).to("cuda:1")).square().mean().backward()
            its.step()
    for one, twin in zip(layers, twins, strict=True):
        assert all(map(torch.equal, one.parameters(), twin.parameters()))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("gradients", ["host", "device"])
def test_a_scaler(gradients, enabled):
    """An infinite gradient skips the step, and halves the scale; one that is off does nothing."""
    model = network(torch.float32)
    scaler = torch.amp.GradScaler(init_scale=2.0**10, enabled=enabled)
    opt = fusedopt.offload(model, fusedopt.AdamW, gradients=gradients, amp_fused=True)
    for at in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        opt.zero_grad()
        factor = float("inf") if at == 1 and enabled else 1.0
        scaler.scale(loss(model, torch.randn(33, 100, device=DEVICE)) * factor).backward()
        scaler.step(opt)
        scaler.update()
        after = [p.detach() for p in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == (
            enabled and at == 1
        )
    assert scaler.get_scale() == (2.0**9 if enabled else 1.0)


def test_cpu_parameters_stay():
    on_gpu, on_cpu = nn.Linear(100, 100, device=DEVICE), nn.Linear(100, 100)
    params = [*on_gpu.parameters(), *on_cpu.parameters()]
    opt = fusedopt.offload(params, fusedopt.SGD, lr=0.1, momentum=0.9)
    (
        on_gpu(torch.randn(3, 100, device=DEVICE)).sum().cpu() + on_cpu(torch.randn(3, 100)).sum()
    ).backward()
    opt.step()
    assert all(param in opt.state for param in params)
