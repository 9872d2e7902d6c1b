"""Several threads: as in turns, never torn."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import seam
import torch
from cases import CASES, RICHEST_OF, bits, draw, leaf, richest, snapshot, train

import fusedopt

SHAPES = [(300_000,), (7, 5), (2,), (90, 80)]


def at_once(*calls: Any) -> list[Any]:
    """Runs each call in a thread, all from the same moment."""
    barrier = threading.Barrier(len(calls))

    def start(call: Any) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(120) for future in [pool.submit(start, call) for call in calls]]


def ready(case: Any, steps: int = 0, **more: Any) -> Any:
    """An optimizer whose parameters have a gradient."""
    values, grads = draw(SHAPES, steps + 1)
    params, opt = train(case.ours, values, grads[:steps], **more)
    for param, grad in zip(params, grads[steps], strict=True):
        param.grad = grad
    return opt


def several_steps(opt: Any, count: int) -> None:
    for _ in range(count):
        seam.step_without_hooks(opt)  # those of the fixture change the number of threads


@pytest.mark.parametrize("steps", [0, 1])
@richest
def test_one_optimizer_in_several_threads(case, steps, backend):
    """They wait for each other, at the first step too: the bits are those of one thread."""
    opt = ready(case, steps)
    alone = copy.deepcopy(opt)
    several_steps(alone, 12)
    at_once(*[lambda: several_steps(opt, 3)] * 4)
    assert snapshot(opt) == snapshot(alone)


@richest
def test_clipped_in_several_threads(case, backend):
    opt = ready(case, max_grad_norm=0.5, ema=0.9)
    alone = copy.deepcopy(opt)
    several_steps(alone, 12)
    norms = at_once(*[lambda: (several_steps(opt, 3), opt.grad_norm)] * 4)
    assert snapshot(opt) == snapshot(alone)
    assert all(norm is None or norm == alone.grad_norm for _, norm in norms)


def test_optimizers_of_their_own_in_several_threads(backend):
    cases = CASES[::4]
    opts = [ready(case) for case in cases]
    alone = [copy.deepcopy(opt) for opt in opts]
    for opt in alone:
        several_steps(opt, 4)
    at_once(*[lambda opt=opt: several_steps(opt, 4) for opt in opts])
    for opt, expected, case in zip(opts, alone, cases, strict=True):
        assert snapshot(opt) == snapshot(expected), case


@richest
def test_saving_loading_and_adding_while_another_thread_steps(case, backend):
    """Each finds the state before a step or after it."""
    opt = ready(case, 1)
    twin = copy.deepcopy(opt)
    saved = copy.deepcopy(opt.state_dict())
    extra = [leaf(torch.randn(3)) for _ in range(8)]

    def save() -> None:
        for _ in range(8):
            state = opt.state_dict()["state"]
            assert len({len(entry) for entry in state.values()}) == 1

    def load() -> None:
        for _ in range(4):
            opt.load_state_dict(copy.deepcopy(saved))

    def add() -> None:
        for param in extra:
            param.grad = torch.ones(3)
            opt.add_param_group({"params": [param]})

    at_once(lambda: several_steps(opt, 12), save, load)
    at_once(lambda: several_steps(opt, 12), save, add)
    for param, other in zip(
        opt.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True
    ):
        with torch.no_grad():
            param.copy_(other)
    for _ in extra:
        opt.param_groups.pop()
    for param in extra:
        opt.state.pop(param, None)
    opt.load_state_dict(saved)
    several_steps(opt, 2)
    several_steps(twin, 2)
    assert snapshot(opt) == snapshot(twin)


def test_attached_to_backwards_in_several_threads(backend):
    """Each thread has a model of its own part; a scheduler's thread saves."""
    torch.manual_seed(0)
    models = [torch.nn.Linear(40, 30) for _ in range(3)]
    twins = copy.deepcopy(models)
    inputs = torch.randn(8, 40)
    whole, alone = (
        fusedopt.attach(torch.nn.ModuleList(m), fusedopt.AdamW, lr=0.1) for m in (models, twins)
    )
    # They share a bucket, of which each thread finds gradients that are not its own.
    for opt_models in (models, twins):
        sum(model(inputs).square().mean() for model in opt_models).backward()

    def backwards(model: Any) -> None:
        for _ in range(40):
            model(inputs).square().mean().backward()

    for model in twins:
        backwards(model)
    at_once(*[lambda model=model: backwards(model) for model in models], whole.state_dict)
    for model, twin in zip(models, twins, strict=True):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert bits(p) == bits(q)
            assert whole.state[p]["step"] == alone.state[q]["step"] == 41


def test_the_number_of_threads_may_change_at_any_time(native):
    opt = ready(RICHEST_OF["Adam"])
    alone = copy.deepcopy(opt)
    several_steps(alone, 12)
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for count in (1, 4, 2):
                torch.set_num_threads(count)

    def steps() -> None:
        try:
            for count in (1, 3, 2, 5):
                torch.set_num_threads(count)
                several_steps(opt, 3)
        finally:
            stop.set()

    at_once(steps, change)
    assert snapshot(opt) == snapshot(alone)


def test_the_turn_is_not_copied(backend):
    """Except with a shallow copy, which steps the same parameters."""
    opt = ready(RICHEST_OF["Adam"], 1)
    assert seam.share_turns(copy.copy(opt), opt)
    with seam.in_turn(opt):
        copies = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
        stock = torch.optim.Adam([leaf(torch.ones(3))])
        copies.append(fusedopt.from_torch(stock))
        # Another thread would wait for a turn that had been copied.
        for done in at_once(
            *[lambda other=other: several_steps(other, 1) or 1 for other in copies]
        ):
            assert done
