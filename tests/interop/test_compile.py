"""torch.compile: compiled models in bare loops, and compiled training steps."""

from __future__ import annotations

import copy
import os
import shutil

import pytest
import torch
from conftest import skip_or_fail
from torch._dynamo.utils import counters
from torch.optim import lr_scheduler

import fusedopt
from interop import ADAMW, assert_same, every_case, ours, perceptron, two_cases

STEPS = 6
pytestmark = pytest.mark.filterwarnings("ignore:.*record_function", "ignore:.*script_method")


@pytest.fixture(autouse=True)
def step_threads():
    """One for all, without the hooks of ``step()``: they would be compiled, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model():
    return perceptron()


@pytest.fixture
def data():
    return [(torch.randn(4, 6).double(), torch.randn(4, 3).double()) for _ in range(STEPS)]


def exponential(optimizer):
    return lr_scheduler.ExponentialLR(optimizer, 0.8)


def one_cycle(optimizer):
    """Changes betas or momentum, too."""
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS + 1)


def train(build, model, data, compiled=None, backend="aot_eager", schedule=exponential):
    """``compiled`` is "model", "training step" or "step"."""
    model = copy.deepcopy(model)
    optimizer = build(model.parameters())
    scheduler = schedule(optimizer)

    def compile(name, function):
        return torch.compile(function, backend=backend) if compiled == name else function

    forward, update = compile("model", model), compile("step", optimizer.step)

    def training_step(inputs, targets):
        optimizer.zero_grad()
        loss = (forward(inputs) - targets).square().mean()
        loss.backward()
        update()
        return loss

    training_step = compile("training step", training_step)
    losses, frames = [], []
    counters.clear()
    for inputs, targets in data:
        losses.append(training_step(inputs, targets).item())
        scheduler.step()
        frames.append(counters["frames"]["total"])
    assert (frames[-1] > 0) == (compiled is not None)
    assert len(set(frames[1:])) == 1, "compiled again when lr changed"
    return {
        "losses": losses,
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rates": scheduler.get_last_lr(),
    }


@every_case
@pytest.mark.parametrize("compiled", ["model", "training step", "step"])
def test_compiled(case, compiled, model, data):
    assert_same(train(ours(case), model, data, compiled), train(case.stock, model, data))


@two_cases
def test_changing_more_than_the_rate(case, model, data):
    def build(params):
        return ours(case)(params, max_grad_norm=1e3)

    assert_same(
        train(build, model, data, "training step", schedule=one_cycle),
        train(case.stock, model, data, schedule=one_cycle),
    )


@pytest.mark.parametrize("compiled", ["model", "training step"])
def test_inductor(compiled, model, data):
    if not shutil.which(os.environ.get("CXX", "g++")):
        skip_or_fail("no C++ compiler for torch.compile")
    assert_same(
        train(ours(ADAMW), model, data, compiled, backend="inductor"),
        train(ADAMW.stock, model, data),
    )


@two_cases
def test_closure(case, model, data):
    results = []
    for build, backend in ((ours(case), "aot_eager"), (case.stock, None)):
        trained, losses = copy.deepcopy(model), []
        optimizer = build(trained.parameters())

        def training_step(inputs, targets, trained=trained, optimizer=optimizer):
            def closure():
                optimizer.zero_grad()
                loss = (trained(inputs) - targets).square().mean()
                loss.backward()
                return loss

            return optimizer.step(closure)

        step = torch.compile(training_step, backend=backend) if backend else training_step
        for batch in data:
            losses.append(step(*batch).item())
        results.append((losses, trained.state_dict(), optimizer.state_dict()))
    assert_same(*results)


def test_step_breaks_the_graph(model):
    optimizer = fusedopt.AdamW(model.parameters())
    model(torch.ones(1, 6).double()).sum().backward()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda: optimizer.step(), fullgraph=True, backend="eager")()


@two_cases
@pytest.mark.parametrize("compiled", ["model", "training step"])
def test_attached(case, compiled, model, data):
    """The optimizer in the backward of a compiled model."""

    def build(params):
        cls = getattr(fusedopt, case.name)
        return fusedopt.attach(params, cls, foreach=False, **case.options)

    assert_same(train(build, model, data, compiled), train(case.stock, model, data))
