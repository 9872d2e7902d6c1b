"""Copies, checkpoints, threads, processes, interrupts, and the end of an offloaded optimizer."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import random
import signal
import threading
import time
import weakref

import pytest
import seam
import torch
from cases import assert_trained_alike, bits, richest
from test_native import script
from test_processes import needs_fork
from test_threads import at_once

import fusedopt
from offloaded import (
    ADAMW,
    assert_same,
    batches,
    both,
    collected,
    faulty_links,
    loss,
    network,
    offload,
    step,
)
from offloaded.test_offloaded_steps import WAYS


def threads():
    return [each for each in threading.enumerate() if each.name.startswith("fusedopt-offload")]


def any_way():
    return dict(random.choice([*WAYS.values()]))


# Copies and checkpoints -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1, "ema": 0.5}], ids=str)
def test_copies_are_offloaded_too(duplicate, options, native, monkeypatch):
    links = faulty_links(monkeypatch)
    here, there = both(ADAMW, network(), **any_way(), **options)
    inputs = batches(4)
    for each in inputs[:2]:
        step(*here, each)
        step(*there, each)
    here[1].synchronize()  # the model alone does not know when it can be copied
    twin = duplicate(here)
    assert len(links) == 2
    for each in inputs[2:]:
        for some in (here, there, twin):
            step(*some, each)
    assert_same(*here, *there)
    assert_same(*twin, *there)
    for name in ("max_grad_norm", "amp_fused"):
        assert getattr(twin[1], name) == getattr(there[1], name)


def test_a_copy_of_the_optimizer_alone(native, monkeypatch):
    """Brings its parameters along, whose steps it waits for."""
    faulty_links(monkeypatch)
    here, there = both(ADAMW, network(), overlap="forward", chunk=1)
    inputs = batches(1)
    for each in (here, there):
        step(*each, *inputs)
    copied = [pickle.loads(pickle.dumps(opt)) for opt in (here[1], there[1])]
    for opt in copied:
        torch.manual_seed(1)
        for param in opt.param_groups[0]["params"]:
            param.grad = torch.randn_like(param)
        opt.step()
        opt.synchronize()
    ours, theirs = ([*map(bits, opt.param_groups[0]["params"])] for opt in copied)
    assert ours == theirs


def test_a_shallow_copy_steps_the_same_parameters(native, monkeypatch):
    faulty_links(monkeypatch)
    (model, opt), there = both(ADAMW, network(), chunk=1)
    other = copy.copy(opt)
    for at, inputs in enumerate(batches(4)):
        step(model, (opt, other)[at % 2], inputs)
        step(*there, inputs)
    assert_same(model, other, *there)


@richest
@pytest.mark.parametrize(
    "options",
    [{}, {"state_dtype": "8bit", "master_weights": "split"}, {"rounding": "stochastic"}],
    ids=str,
)
def test_detach(options, case, backend, monkeypatch):
    """It goes on as an ordinary optimizer, and may be offloaded again by way of a checkpoint."""
    faulty_links(monkeypatch)
    here, there = both(case, network(torch.bfloat16), **any_way(), **options)
    model, opt = here
    again = None
    for at, inputs in enumerate(batches(6, torch.bfloat16)):
        if at == 2:
            fusedopt.detach(opt)
            assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
            assert vars(opt).keys() == vars(there[1]).keys()
        if at == 4:
            again = offload(case, model, chunk=1, **options)
            again.load_state_dict(opt.state_dict())
        seed = random.randrange(2**31)
        for each, its in ((model, again or opt), there):
            torch.manual_seed(seed)
            step(each, its, inputs)
    assert_same(model, again, *there)


@pytest.mark.parametrize("way", [{"max_grad_norm": 0.01}, {"overlap": None}], ids=str)
def test_gradients_that_wait_when_it_is_detached(way, backend, monkeypatch):
    faulty_links(monkeypatch)
    here, there = both(ADAMW, network(), **way)
    for model, opt in (here, there):
        loss(model, torch.ones(2, 4, dtype=torch.float64)).backward()
        if opt is here[1]:
            fusedopt.detach(opt)
        opt.step()
    assert_same(*here, *there)


@richest
@pytest.mark.parametrize("library", ["fusedopt", "stock"])
def test_checkpoints(case, library, backend, monkeypatch):
    """Written and read in the middle, by an offloaded and by an ordinary optimizer."""
    faulty_links(monkeypatch)
    way = any_way()
    (model, opt), (twin, other) = both(case, network(), **way)
    inputs = batches(6)
    for each in inputs[:3]:
        step(model, opt, each)
    twin.load_state_dict(model.state_dict())
    if library == "stock":
        other = case.stock(twin.parameters())
    other.load_state_dict(copy.deepcopy(opt.state_dict(stock=library == "stock")))
    (resumed, again), _ = both(case, network(), **way)
    step(resumed, again, inputs[0])
    resumed.load_state_dict(twin.state_dict())
    again.load_state_dict(copy.deepcopy(other.state_dict()))
    for each in inputs[3:]:
        for some in ((model, opt), (twin, other), (resumed, again)):
            step(*some, each)
    opt.synchronize()
    again.synchronize()
    if library == "fusedopt":
        assert_same(model, opt, twin, other)
        assert_same(resumed, again, twin, other)
    else:
        for each, its in ((model, opt), (resumed, again)):
            assert_trained_alike(its, [*each.parameters()], other, [*twin.parameters()])


def test_a_checkpoint_between_backward_and_step(native, monkeypatch):
    """Gradients that wait on the host are none of its business."""
    faulty_links(monkeypatch)
    here, there = both(ADAMW, network(), max_grad_norm=0.01)
    saved = []
    for at, inputs in enumerate(batches(4)):
        for model, opt in (here, there):
            opt.zero_grad()
            loss(model, inputs).backward()
            if at == 1:
                saved.append(copy.deepcopy(opt.state_dict()))
            if at == 3:
                opt.load_state_dict(saved.pop(0))
            opt.step()
    assert_same(*here, *there)


def test_a_file(native, monkeypatch):
    faulty_links(monkeypatch)
    (model, opt), _ = both(ADAMW, network(), **any_way())
    step(model, opt, *batches(1))
    file = io.BytesIO()
    torch.save([model.state_dict(keep_vars=True), opt.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file)
    opt.synchronize()
    assert [*map(bits, weights.values())] == [*map(bits, model.parameters())]
    assert state["param_groups"] == opt.state_dict()["param_groups"]


# The end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_nothing_outlives_the_model(way, native, monkeypatch):
    links = faulty_links(monkeypatch)
    model = network()
    (model, opt), _ = both(ADAMW, model, **way)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)
    for inputs in batches(2):
        step(model, opt, inputs)
        scheduler.step()
    assert threads()
    alive = [*map(weakref.ref, (model, opt, scheduler, *model.parameters(), *links))]
    workers = threads()
    del model, opt, scheduler, _
    links.clear()
    assert collected(lambda: not any(worker.is_alive() for worker in workers))
    assert collected(lambda: not any(ref() for ref in alive))


def test_the_optimizer_may_be_dropped_and_another_made(native, monkeypatch):
    faulty_links(monkeypatch)
    model = network()
    offload(ADAMW, model)
    with pytest.raises(RuntimeError, match=r"attach\(\) or offload\(\) returned is gone"):
        loss(model, *batches(1)).backward()
    model.zero_grad()
    here, there = both(ADAMW, model)
    for inputs in batches(2):
        for each in (here, there):
            step(*each, inputs)
    assert_same(*here, *there)


@pytest.mark.parametrize("way", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_memory_stays_flat(way, native, monkeypatch):
    links = faulty_links(monkeypatch)
    param = torch.nn.Parameter(torch.ones(8))
    opt = offload(ADAMW, [param], **way)
    sizes = []
    for _ in range(3):
        for _ in range(200):
            param.sum().backward()
            opt.step()
            opt.zero_grad()
        gc.collect()
        sizes.append(len(gc.get_objects()))
    assert sizes[2] - sizes[1] < 50 and not links[0].pending


# Threads, processes, interrupts ---------------------------------------------------------------


def test_backwards_in_several_threads(backend, monkeypatch):
    """Each thread has a model of its own part, of chunks that they share."""
    faulty_links(monkeypatch)
    models = torch.nn.ModuleList(torch.nn.Linear(40, 30) for _ in range(3))
    twins = copy.deepcopy(models)
    inputs = torch.randn(8, 40)
    opt, other = offload(ADAMW, models, keep_below=31), ADAMW.ours(twins.parameters())

    def backwards(model):
        for _ in range(15):
            model(inputs).square().mean().backward()
            opt.step()

    for _ in range(15):
        sum(twin(inputs).square().mean() for twin in twins).backward()
        other.step()
        other.zero_grad()
    at_once(*[lambda model=model: backwards(model) for model in models], opt.state_dict)
    assert_same(models, opt, twins, other)


def test_the_threads_of_a_step(native, monkeypatch, step_threads):
    """Those that it was given, whatever torch uses elsewhere."""
    faulty_links(monkeypatch)
    with seam.native_threads() as seen:
        (model, opt), _ = both(ADAMW, network(), num_threads=2, keep_below=0)
        for inputs in batches(2):
            step(model, opt, inputs)
    assert seen and {*seen} == {2}


def test_the_cores_that_others_leave(native, monkeypatch):
    for name, count in (("1", 6), ("2", 2), ("7", 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(7)}, raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", name)
        with seam.native_threads() as seen:
            model = network()
            opt = offload(ADAMW, model, keep_below=0)
            for inputs in batches(2):
                step(model, opt, inputs)
        assert {*seen} == {count}


@needs_fork
def test_forked_with_a_step_under_way(native, monkeypatch):
    """The child goes on, and has the bits of its parent."""
    here, there = both(ADAMW, network(), overlap="forward", num_threads=1)
    inputs = batches(3)
    for each in (here, there):
        step(*each, inputs[0])
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        code = 1
        try:
            for each in inputs[1:]:
                step(*here, each)
            here[1].synchronize()
            os.write(write, pickle.dumps([*map(bits, here[0].parameters())]))
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    for at in (1, 2):
        for each in (here, there):
            step(*each, inputs[at])
    assert_same(*here, *there)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read, "rb") as file:
        answer = file.read()
    assert status == 0 and pickle.loads(answer) == [*map(bits, there[0].parameters())]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs pthread_kill")
@pytest.mark.parametrize("overlap", ["backward", "forward"])
def test_interrupted_while_step_waits(overlap, native, monkeypatch):
    """The interrupt comes out of it when it is done, and training goes on."""
    faulty_links(monkeypatch)
    here, there = both(ADAMW, network(), overlap=overlap)
    model, opt = here
    for inputs in batches(3):
        step(*there, inputs)
        opt.zero_grad()
        with seam.idle_worker(opt) as go_on:
            loss(model, inputs).backward()

            def interrupt(go_on=go_on):
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                time.sleep(0.05)
                go_on.set()

            timer = threading.Timer(0.05, interrupt)
            with pytest.raises(KeyboardInterrupt):
                if overlap == "forward":
                    opt.step()
                timer.start()
                if overlap == "backward":
                    opt.step()
                opt.synchronize()
            timer.join()
    assert_same(*here, *there)


def test_the_interpreter_ends_with_a_step_under_way(native):
    """Of an optimizer that is still held, and of one that is not."""
    out = script(
        """
import sys, torch
sys.path.insert(0, "tests")
from offloaded import *
opts = [offload(ADAMW, nn.Linear(300, 3000), overlap="forward", keep_below=0) for _ in range(2)]
for opt in opts:
    for param in opt.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    opt.step()
print("done")
del opt, opts[0]
"""
    )
    assert out == "done\n"
