"""Training loops around an attached optimizer."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cases import assert_trained_alike, leaf, richest, snapshot
from conftest import skip_or_fail
from schedulers import FEW
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

from attached import ADAMW, assert_same, attach, batches, both, gradients, loss, network, step

reentrant = pytest.mark.parametrize("reentrant", [False, True], ids=["replayed", "reentrant"])


@richest
@pytest.mark.parametrize("schedule", FEW.values(), ids=[*FEW])
@pytest.mark.parametrize("lr_type", [float, torch.tensor], ids=["float", "tensor"])
def test_schedulers(case, schedule, lr_type):
    """Without a single ``optimizer.step()``, and without a warning."""
    here, there = both(case, network(), lr=lr_type(0.05))
    schedules = [schedule(opt) for _, opt in (here, there)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for at, inputs in enumerate(batches(8)):
            for (model, opt), scheduler in zip((here, there), schedules, strict=True):
                loss(model, inputs).backward()
                if opt is there[1]:
                    opt.step()
                    opt.zero_grad()
                scheduler.step(*[1.0 + at] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
    assert_same(*here, *there)


def test_a_scheduler_before_the_first_backward_warns_as_ever():
    scheduler = lr_scheduler.StepLR(attach(ADAMW, network()), 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


@richest
@pytest.mark.parametrize("library", ["fusedopt", "stock"])
def test_checkpoints(case, library, backend):
    """Written and read in the middle, by an attached and by an ordinary optimizer."""
    model, inputs = network(), batches(6)
    opt = attach(case, model)
    for batch in inputs[:3]:
        step(model, opt, batch)
    twin = copy.deepcopy(model)
    build = case.ours if library == "fusedopt" else case.stock
    other = build(twin.parameters())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    resumed = copy.deepcopy(model)
    again = attach(case, resumed)
    step(resumed, again, inputs[0])  # plans for state that is then replaced
    resumed.load_state_dict(twin.state_dict())
    again.load_state_dict(copy.deepcopy(other.state_dict()))
    assert snapshot(again)[:3] == snapshot(opt)[:3]
    for batch in inputs[3:]:
        step(model, opt, batch)
        step(resumed, again, batch)
        other.zero_grad()
        loss(twin, batch).backward()
        other.step()
    assert_trained_alike(opt, [*model.parameters()], other, [*twin.parameters()])
    assert_trained_alike(again, [*resumed.parameters()], opt, [*model.parameters()])
    assert opt.state_dict()["state"].keys() == other.state_dict()["state"].keys()


@richest
def test_closure(case, backend):
    here, there = both(case, network())
    for inputs in batches(3):
        losses = []
        for model, opt in (here, there):

            def closure(model=model, opt=opt, inputs=inputs):
                opt.zero_grad()
                value = loss(model, inputs)
                value.backward()
                return value

            losses.append(opt.step(closure).item())
        assert losses[0] == losses[1]
    assert_same(*here, *there)


def test_hooks_of_step_run_in_step(backend):
    model, calls = network(), []
    opt = attach(ADAMW, model)
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append("all"))
    try:
        loss(model, *batches(1)).backward()
        assert not calls
        before = snapshot(opt)
        assert opt.step() is None
        assert snapshot(opt) == before
    finally:
        handle.remove()
    assert sorted(calls) == ["all", "post", "pre"]


def test_every_backward_is_a_step(backend):
    """Also of a graph that is kept, if it did not save the parameters."""
    values, inputs = torch.randn(3, 4), torch.randn(3, 4)
    param, other = leaf(values), leaf(values)
    opt, ordinary = attach(ADAMW, [param]), ADAMW.ours([other])
    graph = (param * inputs).sum()
    for _ in range(2):
        graph.backward(retain_graph=True)
        other.grad = inputs.clone()
        ordinary.step()
    assert snapshot(opt) == snapshot(ordinary)


def test_a_graph_that_saved_the_parameters_cannot_be_run_twice(backend):
    """torch sees that the step has changed them; wrong gradients would be worse."""
    model = network()
    opt = attach(ADAMW, model)
    graph = loss(model, *batches(1))
    graph.backward(retain_graph=True)
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.backward()
    assert before[0][:2] == snapshot(opt)[0][:2]  # the first layer was not reached


class Checkpointed(nn.Module):
    def __init__(self, reentrant, shared=False):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        if shared:
            self.layers[2] = self.layers[1]
        self.reentrant = reentrant

    def forward(self, x):
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = checkpoint(lambda x, f=layer: f(x).tanh(), x, use_reentrant=self.reentrant)
        return x


@richest
@reentrant
def test_activation_checkpointing(case, reentrant, backend):
    here, there = both(case, Checkpointed(reentrant).double())
    for inputs in batches(3):
        for model, opt in (here, there):
            step(model, opt, inputs)
    assert_same(*here, *there)


@reentrant
def test_checkpointed_segments_that_share_a_layer(reentrant, backend):
    """Reentrant checkpointing runs one backward for each segment."""
    here, there = both(ADAMW, Checkpointed(reentrant, shared=True).double())
    for inputs in batches(2):
        for model, opt in (here, there):
            step(model, opt, inputs)
    model, opt = here
    assert opt.state[model.layers[1].weight]["step"] == (4 if reentrant else 2)
    if not reentrant:
        assert_same(*here, *there)


@richest
def test_gradient_penalty(case, backend):
    """Double backward: gradients by ``torch.autograd.grad`` are part of the loss."""
    here, there = both(case, network())
    for inputs in batches(3):
        for model, opt in (here, there):
            x = inputs.clone().requires_grad_()
            (slope,) = torch.autograd.grad(loss(model, x), x, create_graph=True)
            opt.zero_grad()
            (loss(model, x) + slope.square().sum()).backward()
            opt.step()
    assert_same(*here, *there)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_create_graph(backend):
    here, there = both(ADAMW, network())
    for inputs in batches(3):
        for model, opt in (here, there):
            opt.zero_grad()
            loss(model, inputs).backward(create_graph=True)
            opt.step()
            assert not any(p.grad_fn or not p.is_leaf for p in model.parameters())
    assert_same(*here, *there)
    assert not any(t.requires_grad for state in here[1].state.values() for t in state.values())


def test_grad_scaler(backend):
    """One that is off is as good as none; one that is on says that it found nothing to unscale."""
    model = network()
    opt = attach(ADAMW, model)
    off, on = (torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (False, True))
    off.scale(loss(model, *batches(1))).backward()
    off.step(opt)
    off.update()
    on.scale(loss(model, *batches(1))).backward()
    with pytest.raises(AssertionError, match="No inf checks"):
        on.step(opt)


def test_compiled_model(backend):
    here, there = both(ADAMW, network())
    compiled = torch.compile(here[0], backend="aot_eager")
    for inputs in batches(3):
        loss(compiled, inputs).backward()
        assert not gradients(here[0])
        step(*there, inputs)
    assert_trained_alike(here[1], [*here[0].parameters()], there[1], [*there[0].parameters()])


class Regression(nn.Module):
    """What transformers calls a model."""

    def __init__(self):
        super().__init__()
        self.layers = network()

    def forward(self, inputs, labels):
        return {"loss": (self.layers(inputs) - labels).square().mean()}


def test_transformers_trainer(tmp_path):
    """Its loop clips, steps and clears gradients that are not there."""
    try:
        import accelerate  # noqa: F401
        import transformers
    except ImportError as error:
        skip_or_fail(f"{error}; pip install 'fusedopt[interop]'")
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=5,
        max_grad_norm=1e9,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    rows = [{"inputs": row, "labels": row[:3]} for row in torch.randn(40, 4, dtype=torch.float64)]
    here, there = both(ADAMW, Regression())
    for model, opt in (here, there):
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(opt, None))
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    assert_same(*here, *there)
