"""Hooks, closures, schedulers and loads that raise."""

from __future__ import annotations

import contextlib
import copy
import random
from typing import Any

import pytest
import torch
from cases import snapshot

from faults import MODELS, Interrupt, every_situation, run, step


def fail(*_: Any) -> None:
    raise ZeroDivisionError


@every_situation
def test_raising_hooks_and_closures(model, steps, change, backend):
    opt = MODELS[model]()
    run(opt, steps)
    if change is not None:
        change(opt)
    before = snapshot(opt)
    hook = opt.register_step_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        step(opt)
    hook.remove()
    assert snapshot(opt) == before
    with pytest.raises(ZeroDivisionError):
        opt.step(fail)
    assert snapshot(opt) == before
    twin = copy.deepcopy(opt)
    hook = opt.register_step_post_hook(fail)
    with pytest.raises(ZeroDivisionError):
        step(opt)
    hook.remove()
    run(twin, 1)
    assert snapshot(opt) == snapshot(twin)
    run(twin, 1)
    step(opt)
    assert snapshot(opt) == snapshot(twin)


def test_a_raising_scheduler(backend):
    opt = MODELS["clipped and scaled"]()
    twin = copy.deepcopy(opt)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda at: 1.0 if at != 1 else 1 / 0)
    step(opt)
    with pytest.raises(ZeroDivisionError):
        scheduler.step()
    step(opt)
    run(twin, 2)
    assert snapshot(opt)[:2] == snapshot(twin)[:2]


def test_an_interrupted_load(backend):
    opt = MODELS["adam"]()
    run(opt, 1)
    saved = copy.deepcopy(opt.state_dict())
    run(opt, 1)
    before = snapshot(opt)
    with Interrupt(0) as counted:
        copy.deepcopy(opt).load_state_dict(saved)
    loaded = copy.deepcopy(opt)
    loaded.load_state_dict(saved)
    after = snapshot(loaded)
    for at in random.sample(range(1, 1 - counted.left), 20):
        again = copy.deepcopy(opt)
        with contextlib.suppress(KeyboardInterrupt), Interrupt(at):
            again.load_state_dict(saved)
        assert snapshot(again) in (before, after)
