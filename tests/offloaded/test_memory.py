"""What is alive, and for how long."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from cases import RICHEST_OF

import fusedopt
from offloaded import ADAMW, batches, faulty_links, network, offload, step


@pytest.mark.parametrize("way", [{}, {"overlap": "forward"}, {"max_grad_norm": 1.0}], ids=str)
def test_nothing_waits_for_the_garbage_collector(way, native):
    """The memory of a GPU and pinned memory are too much to wait for it."""
    model = network()
    opt = offload(ADAMW, model, chunk=200, **way)
    for inputs in batches(3):
        step(model, opt, inputs)
    opt.synchronize()
    opt.zero_grad()
    alive = [*map(weakref.ref, (opt, *model.parameters()))]
    gc.collect()
    gc.disable()
    try:
        del model, opt
        assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()


def test_hooks_of_modules_go_with_detach(native):
    model = network()
    for _ in range(3):
        opt = offload(ADAMW, model, overlap="forward")
        step(model, opt, *batches(1))
        fusedopt.detach(opt)
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._state_dict_pre_hooks


@pytest.mark.parametrize("way", [{}, {"overlap": "forward"}, {"gradients": "device"}], ids=str)
def test_memory_is_there_from_the_beginning(way, native, monkeypatch):
    """It is not in the backward that it cannot be had."""
    links = faulty_links(monkeypatch)
    model = network()
    opt = offload(RICHEST_OF["Adam"], model, chunk=1, **way)
    memory, sizes = links[0].memory, []
    monkeypatch.setattr(links[0], "memory", lambda size: sizes.append(size) or memory(size))
    for inputs in batches(3):
        step(model, opt, inputs)
    opt.synchronize()
    assert not sizes


def test_state_that_comes_back_while_nothing_is_trained(native):
    model = network()
    opt = ADAMW.ours(model.parameters())
    step(model, opt, *batches(1))
    with torch.inference_mode():
        fusedopt.offload_state(opt, device="cpu")
        fusedopt.load_state(opt)
    for entries in opt.state.values():
        assert not any(v.is_inference() for v in entries.values())
    step(model, opt, *batches(1))
