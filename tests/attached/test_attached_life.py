"""Attaching, detaching, copies, and the end of an attached optimizer."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import warnings
import weakref

import pytest
import seam
import torch
from cases import RICHEST_OF, bits, leaf, richest, snapshot
from torch.optim import lr_scheduler

import fusedopt
from attached import ADAMW, assert_same, attach, batches, both, gradients, loss, network, step


@richest
def test_detach(case, backend):
    """It goes on as an ordinary optimizer, and may be attached again by way of a checkpoint."""
    here, there = both(case, network())
    model, opt = here
    for at, inputs in enumerate(batches(6)):
        if at == 3:
            fusedopt.detach(opt)
            assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
            assert vars(opt).keys() - {"_opt_called"} == vars(there[1]).keys()
        for each in (here, there):
            step(*each, inputs)
        assert bool(gradients(model)) == (at >= 3)
    assert_same(*here, *there)
    again = attach(case, model)
    again.load_state_dict(opt.state_dict())
    for inputs in batches(2):
        opt.zero_grad()
        loss(model, inputs).backward()
        step(*there, inputs)
    assert_same(model, again, *there)


def test_detach_of_what_is_not_attached():
    model = network()
    opt = attach(ADAMW, model)
    fusedopt.detach(opt)
    for other in (opt, fusedopt.SGD(model.parameters()), torch.optim.SGD(model.parameters()), None):
        with pytest.raises(ValueError, match=f"this {type(other).__name__} is not attached"):
            fusedopt.detach(other)


def test_other_hooks_survive_detach():
    param, calls = leaf(torch.ones(3)), []
    param.register_post_accumulate_grad_hook(lambda p: calls.append("before"))
    opt = attach(ADAMW, [param])
    param.register_post_accumulate_grad_hook(lambda p: calls.append("after"))
    fusedopt.detach(opt)
    param.sum().backward()
    assert calls == ["before", "after"] and param.grad is not None


def test_a_second_optimizer_on_a_parameter_is_an_error(backend):
    """It would find no gradient, and train nothing."""
    here, there = both(ADAMW, network())
    model, opt = here
    taken = re.escape("fusedopt.SGD, param group 1, parameter 0 (shape (5, 4)")
    for params in ([{"params": [leaf(torch.ones(1))]}, {"params": model.parameters()}],):
        with pytest.raises(ValueError, match=f"{taken}.*attached to another.*detach"):
            fusedopt.attach(params, fusedopt.SGD, lr=0.1)
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in model.parameters())
    other = fusedopt.attach([spare := leaf(torch.ones(1))], fusedopt.SGD, lr=0.5)
    with pytest.raises(ValueError, match="attached to another"):
        other.add_param_group({"params": model.parameters()})
    assert len(other.param_groups) == 1
    for inputs in batches(2):
        (loss(model, inputs) + spare.sum()).backward()
        step(*there, inputs)
    assert_same(*here, *there)
    assert spare.item() == 0


def test_two_optimizers_share_a_model(backend):
    """Of which each has parameters of its own."""
    (model, _), (twin, _) = both(ADAMW, network(), groups=lambda model: [leaf(torch.ones(1))])
    opts = attach(ADAMW, model[0]), attach(RICHEST_OF["SGD"], model[2])
    others = ADAMW.ours(twin[0].parameters()), RICHEST_OF["SGD"].ours(twin[2].parameters())
    for inputs in batches(3):
        loss(model, inputs).backward()
        loss(twin, inputs).backward()
        for other in others:
            other.step()
            other.zero_grad()
    for opt, other in zip(opts, others, strict=True):
        assert snapshot(opt) == snapshot(other)


def test_nothing_outlives_the_model(backend):
    model = network()
    opt = attach(ADAMW, model)
    scheduler = lr_scheduler.StepLR(opt, 1)
    for inputs in batches(2):
        step(model, opt, inputs)
        scheduler.step()
    alive = [*map(weakref.ref, (model, opt, scheduler, *model.parameters()))]
    del model, opt, scheduler
    gc.collect()
    assert not any(ref() for ref in alive)


def test_an_optimizer_that_is_gone_is_missed(backend):
    """The model does not keep it; without an error it would stop to learn."""
    model = network()
    attach(ADAMW, model)
    with pytest.raises(RuntimeError, match=r"that attach\(\) or offload\(\) returned is gone"):
        loss(model, *batches(1)).backward()
    model.zero_grad()
    here, there = both(ADAMW, model)
    for inputs in batches(2):
        for each in (here, there):
            step(*each, inputs)
    assert_same(*here, *there)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_ordinary(duplicate, backend):
    model = network()
    opt = attach(ADAMW, model)
    first, *rest = batches(3)
    step(model, opt, first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin, other = duplicate((model, opt))
    assert not seam.is_attached(other) and snapshot(other) == snapshot(opt)
    for inputs in rest:
        loss(twin, inputs).backward()
        assert len(gradients(twin)) == 3
        other.step()
        other.zero_grad()
        step(model, opt, inputs)
        assert not gradients(model)
    assert_same(model, opt, twin, other)


def test_saving_parameters_and_the_optimizer():
    model = network()
    opt = attach(ADAMW, model)
    step(model, opt, *batches(1))
    file = io.BytesIO()
    torch.save([model.state_dict(keep_vars=True), opt.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file)
    assert [*map(bits, weights.values())] == [*map(bits, model.parameters())]
    assert not any(p._post_accumulate_grad_hooks for p in weights.values())
    other = ADAMW.ours(weights.values())
    other.load_state_dict(state)
    assert snapshot(other) == snapshot(opt)
