"""Errors in the backward, and what cannot be attached."""

from __future__ import annotations

import re

import pytest
import torch
from cases import bits, every_name, leaf, richest, snapshot
from torch import nn

import fusedopt
from attached import ADAMW, attach, batches, loss, network, step


@richest
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("bucket_bytes", [0, 2**20], ids=["alone", "together"])
def test_an_error_in_the_backward(case, steps, bucket_bytes, backend):
    """Comes out of ``backward()`` and names the parameter by its place in the whole. What is in its
    bucket is as before; the buckets before it are updated."""
    model = network()
    opt = attach(
        case,
        [{"params": model[2].named_parameters()}, {"params": [*model[0].named_parameters()]}],
        lr=0.05,
        bucket_bytes=bucket_bytes,
    )
    for inputs in batches(steps):
        step(model, opt, inputs)
    before = [*map(bits, model.parameters())]
    key = next(iter(case.table.slots))
    good = opt.state[model[0].bias].copy()
    opt.state[model[0].bias] = {"step": torch.tensor(2.0), **good, key: torch.ones(2, 2)}
    inputs = batches(1)[0]
    named = re.escape(f"fusedopt.{case.name}, param group 1, parameter 1 'bias' (shape (5,)")
    with pytest.raises(ValueError, match=rf"{named}.*state\['{key}'\] has shape \(2, 2\)"):
        loss(model, inputs).backward()
    assert model[0].bias.grad is not None and bits(model[0].bias) == before[1]
    is_updated = bucket_bytes == 0
    assert (bits(model[2].weight) != before[2]) == is_updated
    assert (model[2].weight.grad is None) == is_updated
    opt.state[model[0].bias] = good
    if not good:
        del opt.state[model[0].bias]
    after = bits(model[2].weight)
    opt.step()  # what is left over
    assert bits(model[0].bias) != before[1]
    assert (bits(model[2].weight) == after) == is_updated


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("change", [{"lr": "fast"}, {}], ids=["text", "missing"])
def test_an_option_that_is_no_number(change, steps, backend):
    model = network()
    opt = attach(ADAMW, [{"params": model[2].parameters()}, {"params": model[0].parameters()}])
    for inputs in batches(steps):
        step(model, opt, inputs)
    del opt.param_groups[1]["lr"]
    opt.param_groups[1].update(change)
    with pytest.raises(TypeError, match="fusedopt.AdamW, param group 1: 'lr' must be a number"):
        loss(model, *batches(1)).backward()


@every_name
@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 1.0}, {"amp_fused": True}, {"differentiable": True}], ids=str
)
def test_options_that_need_all_gradients(name, options):
    model = network()
    cls, (option, value) = getattr(fusedopt, name), *options.items()
    with pytest.raises(ValueError, match=rf"fusedopt.{name}: {option} does not go with attach"):
        fusedopt.attach(model, cls, lr=0.1, **options)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    opt = fusedopt.attach(model, cls, lr=0.1)
    before = snapshot(opt)
    if option == "differentiable":
        opt.defaults[option] = value
    else:
        setattr(opt, option, value)
    with pytest.raises(ValueError, match=f"{option} does not go with attach"):
        loss(model, *batches(1)).backward()
    assert snapshot(opt) == before


class Renamed(fusedopt.SGD):
    """A class of the user's, which changes no step."""

    def __init__(self, params):
        super().__init__(params, lr=0.5)


class OwnStep(fusedopt.SGD):
    def step(self, closure=None):
        return super().step(closure)


def test_classes():
    model = network()
    for cls in (torch.optim.AdamW, fusedopt.AdamW(model.parameters()), "AdamW", None, nn.Linear):
        with pytest.raises(TypeError, match=r"one of fusedopt's classes, like fusedopt.AdamW, got"):
            fusedopt.attach(model, cls, lr=0.1)
    for _ in range(2):  # torch wraps the step of a class when it is used first
        with pytest.raises(TypeError, match=r"OwnStep has a step\(\) of its own"):
            fusedopt.attach(model, OwnStep, lr=0.1)
        OwnStep(model.parameters()).step()
    opt = fusedopt.attach([param := leaf(torch.ones(2))], Renamed)
    param.sum().backward()
    assert param.tolist() == [0.5, 0.5] and type(opt) is Renamed


@pytest.mark.parametrize("bucket_bytes", [-1, 1.5, "1MB", None, True])
def test_sizes_of_buckets(bucket_bytes):
    model = network()
    with pytest.raises((TypeError, ValueError), match="bucket_bytes must be an int of at least 0"):
        fusedopt.attach(model, fusedopt.AdamW, bucket_bytes=bucket_bytes)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_params_and_options_that_the_class_refuses():
    model = network()
    for params, options, error in [
        (model, {"lr": -1.0}, ValueError),
        (model, {"no_such": 1}, TypeError),
        ([], {}, ValueError),
        (nn.Linear(2, 2).requires_grad_(False), {}, ValueError),
        ([model[0].weight * 2], {}, ValueError),
        (3, {}, TypeError),
    ]:
        with pytest.raises(error):
            fusedopt.attach(params, fusedopt.AdamW, **options)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
