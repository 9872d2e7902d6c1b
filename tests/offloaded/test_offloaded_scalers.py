"""``GradScaler`` and clipping, where gradients are on the host or on the device."""

from __future__ import annotations

import math
import random

import pytest
import seam
import torch
from cases import bits, richest, snapshot

from offloaded import ADAMW, assert_same, batches, both, faulty_links, loss, network, offload

WAYS = {
    "host": {"chunk": 200},
    "device": {"gradients": "device", "chunk": 1},
    "across the forward": {"overlap": "forward", "chunk": 200},
    "from the device, across the forward": {"gradients": "device", "overlap": "forward"},
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def overflow(model, name, value):
    """The gradient of a parameter has this number, as soon as it is there."""
    param = model.get_parameter(name)
    return param.register_hook(lambda grad: grad.index_fill(0, torch.tensor(1), value))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.01}], ids=str)
@richest
def test_grad_scaler(case, options, backend, monkeypatch):
    """A gradient that is not finite skips the step of all, and halves the scale."""
    faulty_links(monkeypatch)
    way = random.choice([*WAYS.values()])
    here, there = both(case, network(torch.float32), **way, **options, amp_fused=True)
    scalers = [torch.amp.GradScaler("cpu", 256.0, growth_interval=2) for _ in range(2)]
    # Of parameters that are offloaded, and of one that is not.
    bad = {1: ("2.weight", math.inf), 2: ("0.bias", math.nan), 4: ("4.weight", -math.inf)}
    for at, inputs in enumerate(batches(7, torch.float32)):
        norms = []
        for (model, opt), scaler in zip((here, there), scalers, strict=True):
            opt.zero_grad()
            handle = overflow(model, *bad[at]) if at in bad else None
            scaler.scale(loss(model, inputs)).backward()
            before = snapshot(opt)
            scaler.step(opt)
            opt.synchronize()
            if handle is not None:
                handle.remove()
                assert snapshot(opt)[0] == before[0]
            scaler.update()
            norms.append(None if opt.grad_norm is None else bits(opt.grad_norm))
        assert norms[0] == norms[1] and (norms[0] is None) is not bool(options)
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert scalers[0].state_dict() == scalers[1].state_dict()
    assert_same(*here, *there)


@pytest.mark.parametrize("gradients", ["host", "device"])
def test_the_scale_grows_while_the_step_is_under_way(gradients, native, monkeypatch):
    faulty_links(monkeypatch)
    settings = {"overlap": "forward", "gradients": gradients, "amp_fused": True}
    here, there = both(ADAMW, network(torch.float32), **settings)
    scalers = [torch.amp.GradScaler("cpu", 256.0, growth_interval=1) for _ in range(2)]
    for inputs in batches(3, torch.float32):
        for (model, opt), scaler in zip((here, there), scalers, strict=True):
            opt.zero_grad()
            scaler.scale(loss(model, inputs)).backward()
            if opt is there[1]:
                scaler.step(opt)
                scaler.update()
            else:
                with seam.idle_worker(opt):
                    scaler.step(opt)
                    scaler.update()
    assert_same(*here, *there)


@pytest.mark.parametrize("gradients", ["host", "device"])
def test_unscale(gradients, native, monkeypatch):
    """Of gradients that are on the host it is an error."""
    faulty_links(monkeypatch)
    here, there = both(ADAMW, network(torch.float32), gradients=gradients, amp_fused=True)
    scalers = [torch.amp.GradScaler("cpu", 256.0) for _ in range(2)]
    for at, inputs in enumerate(batches(3, torch.float32)):
        for (model, opt), scaler in zip((here, there), scalers, strict=True):
            opt.zero_grad()
            scaler.scale(loss(model, inputs)).backward()
            if at == 1:
                scaler.unscale_(opt)
            if at == 1 and gradients == "host":
                if opt is here[1]:
                    before = snapshot(opt)
                    with pytest.raises(RuntimeError, match=r"unscale_\(\).*on the host already"):
                        scaler.step(opt)
                    assert snapshot(opt) == before
                    return
            scaler.step(opt)
            scaler.update()
    assert_same(*here, *there)


@every_way
def test_a_scaler_without_amp_fused(way, native, monkeypatch):
    """It looks for gradients, which are on the host."""
    faulty_links(monkeypatch)
    here, there = both(ADAMW, network(torch.float32), **way)
    scalers = [torch.amp.GradScaler("cpu", 256.0) for _ in range(2)]
    for (model, opt), scaler in zip((here, there), scalers, strict=True):
        scaler.scale(loss(model, batches(1, torch.float32)[0] * 0 + 1)).backward()
        if opt is here[1] and way.get("gradients") != "device":
            with pytest.raises(AssertionError, match="No inf checks"):
                scaler.step(opt)
            return
        scaler.step(opt)
    assert_same(*here, *there)


@every_way
def test_steps_without_a_gradient(way, backend, monkeypatch):
    """Of any parameter, or of any that is offloaded."""
    faulty_links(monkeypatch)
    for options in ({"max_grad_norm": 1.0}, {"amp_fused": True}, {}):
        here, there = both(ADAMW, network(), **way, **options)
        for kept in (None, "0.bias", None):
            norms = []
            for model, opt in (here, there):
                opt.zero_grad()
                if kept is not None:
                    param = model.get_parameter(kept)
                    param.grad = torch.full_like(param, 3)
                opt.step()
                norms.append(None if opt.grad_norm is None else opt.grad_norm.item())
            assert norms[0] == norms[1]
        assert_same(*here, *there)


def test_clipping_is_switched_on_and_off(native, monkeypatch):
    faulty_links(monkeypatch)
    here, there = both(ADAMW, network(), chunk=1)
    for at, inputs in enumerate(batches(6)):
        for model, opt in (here, there):
            opt.max_grad_norm = 0.01 if at in (1, 2, 4) else None
            opt.zero_grad()
            loss(model, inputs).backward()
            if at == 4:
                opt.max_grad_norm = None
            opt.step()
    assert_same(*here, *there)


def test_others_clip_what_is_on_the_device(native, monkeypatch):
    faulty_links(monkeypatch)
    here, there = both(ADAMW, network(), gradients="device", chunk=1)
    for inputs in batches(3):
        for model, opt in (here, there):
            opt.zero_grad()
            loss(model, inputs).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            opt.step()
    assert_same(*here, *there)


def test_gradients_in_any_layout_have_the_same_norm(native, monkeypatch):
    faulty_links(monkeypatch)
    stepped = []
    for make in (offload, type(ADAMW).ours):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(300, 70)) for _ in range(3)]
        opt = make(ADAMW, params, max_grad_norm=1.0)
        params[0].grad = torch.randn(70, 300).t()
        params[1].grad = torch.randn(300, 140)[:, ::2]
        params[2].grad = torch.randn(70).expand(300, 70)
        opt.step()
        stepped.append((bits(opt.grad_norm), snapshot(opt)))
    assert stepped[0] == stepped[1]
