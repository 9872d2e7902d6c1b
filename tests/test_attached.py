"""The optimizer in the backward: the bits of the ordinary one, without its gradients."""

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
import torch.distributed as dist
from cases import (
    LAYOUTS,
    RICHEST_OF,
    Case,
    assert_trained_alike,
    bits,
    every_case,
    every_name,
    gradient_like,
    leaf,
    richest,
    same_bits,
    snapshot,
)
from conftest import skip_or_fail
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

import fusedopt

reentrant = pytest.mark.parametrize("reentrant", [False, True], ids=["replayed", "reentrant"])
ADAMW = Case("AdamW", {"lr": 0.1})


class Embedded(nn.Module):
    """The first layer is an embedding, the last one is tied to it, and one layer is used twice."""

    def __init__(self, sparse=False):
        super().__init__()
        self.tokens = nn.Embedding(7, 4, sparse=sparse)
        self.twice = nn.Linear(4, 4)
        self.sparse = sparse

    def forward(self, inputs):
        x = self.twice(self.twice(self.tokens(inputs)).tanh())
        return x if self.sparse else x @ self.tokens.weight.T


def attach(case, params, **more):
    """As ``case.ours``, in the backward."""
    options = {**copy.deepcopy(case.options), **more}
    return fusedopt.attach(params, getattr(fusedopt, case.name), **options)


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()


def batches(count=4):
    return [torch.randn(6, 4, dtype=torch.float64) for _ in range(count)]


def loss(model, inputs):
    return model(inputs).square().mean()


def gradients(model):
    return [p.grad for p in model.parameters() if p.grad is not None]


def step(model, opt, inputs):
    """One round of a loop that does not know whether the optimizer is in the backward."""
    opt.zero_grad()
    loss(model, inputs).backward()
    assert not seam.is_attached(opt) or not gradients(model)
    opt.step()


def assert_same(model, opt, other_model, other):
    """Parameters, buffers, state and groups, bit for bit."""
    assert snapshot(opt) == snapshot(other)
    there = other_model.state_dict()
    assert all(same_bits(value, there[name]) for name, value in model.state_dict().items())


def both(case, model, *, groups=lambda model: model.parameters(), **more):
    """(model, optimizer), attached and ordinary, from the same weights."""
    twin = copy.deepcopy(model)
    ours = case.ours(groups(twin), **copy.deepcopy(more))
    return (model, attach(case, groups(model), **more)), (twin, ours)


# What it computes -----------------------------------------------------------------------------


@every_case
def test_the_bits_of_the_ordinary_optimizer(case, backend):
    here, there = both(case, network())
    for inputs in batches():
        for model, opt in (here, there):
            step(model, opt, inputs)
    assert_same(*here, *there)
    assert repr(here[1]) == repr(there[1]) and type(here[1]) is type(there[1])


@richest
def test_against_stock(case, backend):
    model = network()
    expected = copy.deepcopy(model)
    opt, stock = attach(case, model), case.exact(expected.parameters())
    for inputs in batches():
        loss(model, inputs).backward()  # all that a loop needs
        step_stock(expected, stock, inputs)
    assert_trained_alike(opt, [*model.parameters()], stock, [*expected.parameters()])


def step_stock(model, stock, inputs):
    stock.zero_grad()
    loss(model, inputs).backward()
    stock.step()


def test_gradients_never_exist_all_at_once(backend):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))).double()
    alive = []

    def count(param):
        assert param.grad is not None
        alive.append(len(gradients(model)))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)
    opt = attach(ADAMW, model)
    for inputs in batches(2):
        loss(model, inputs).backward()
        assert not gradients(model)
    assert alive == [1] * 20
    assert all(state["step"] == 2 for state in opt.state.values())


@every_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "column_block"])
def test_layouts_and_dtypes(name, dtype, layout, backend):
    case = RICHEST_OF[name]
    values = torch.randn(3, 4, 2, 5).to(dtype)
    grads = [gradient_like(values) for _ in range(3)]
    runs = []
    for build in (attach, lambda case, params: case.ours(params)):
        param, around = LAYOUTS[layout](values)
        untouched = [*map(bits, around)]
        param.requires_grad_()
        opt = build(case, [param])
        for grad in grads:
            opt.zero_grad()
            param.backward(grad)
            opt.step()
        assert [*map(bits, around)] == untouched
        runs.append(snapshot(opt))
    assert runs[0] == runs[1]


def test_no_dimension_and_no_elements(backend):
    runs = []
    for build in (attach, lambda case, params: case.ours(params)):
        params = [leaf(torch.tensor(2.0)), leaf(torch.empty(0, 3))]
        opt = build(ADAMW, params)
        for _ in range(2):
            opt.zero_grad()
            (params[0] * 3 + params[1].sum()).backward()
            opt.step()
        runs.append(snapshot(opt))
    assert runs[0] == runs[1]


@richest
def test_groups_with_options_of_their_own(case, backend):
    def groups(model):
        first, last = model[0].named_parameters(), model[2].named_parameters()
        return [
            {"params": [*first], "lr": 0.3, "weight_decay": 0.2},
            {"params": [*last], "name": "head"},
        ]

    here, there = both(case, network(), groups=groups)
    for at, inputs in enumerate(batches(6)):
        for model, opt in (here, there):
            step(model, opt, inputs)
            opt.param_groups[at % 2]["lr"] *= 0.5
            if at == 3:
                opt.param_groups[1]["weight_decay"] = 0.0
    assert_same(*here, *there)
    assert here[1].param_groups[1]["name"] == "head"


@richest
def test_tied_weights_and_a_layer_that_is_used_twice(case, backend):
    here, there = both(case, Embedded().double())
    for _ in range(3):
        inputs = torch.randint(7, (5,))
        for model, opt in (here, there):
            step(model, opt, inputs)
    assert_same(*here, *there)


@pytest.mark.parametrize(
    "case",
    [Case("SGD", {"lr": 0.1}), Case("SGD", {"lr": 0.1, "momentum": 0.9}), Case("Adagrad", {})],
    ids=str,
)
def test_sparse_gradients(case, backend):
    here, there = both(case, Embedded(sparse=True).double())
    for _ in range(3):
        inputs = torch.randint(7, (5,))
        for model, opt in (here, there):
            step(model, opt, inputs)
    assert_same(*here, *there)


def test_gradients_that_hooks_change(backend):
    """Those of the tensor, and those after accumulation that were there before."""

    def halve(param):
        param.grad = param.grad * 0.5

    model = network()
    for param in model.parameters():
        param.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
        param.register_post_accumulate_grad_hook(halve)
    expected = copy.deepcopy(model)  # a copy has no hooks
    opt, other = attach(ADAMW, model), ADAMW.ours(expected.parameters())
    for inputs in batches():
        loss(model, inputs).backward()
        other.zero_grad()
        loss(expected, inputs).backward()
        for param in expected.parameters():
            param.grad = param.grad.clamp(-0.01, 0.01) * 0.5
        other.step()
    assert_same(model, opt, expected, other)


# Which parameters -----------------------------------------------------------------------------


def test_a_module_gives_the_parameters_that_require_a_gradient(backend):
    model = network()
    model[0].weight.requires_grad_(False)
    opt = attach(ADAMW, model)
    assert [len(group["params"]) for group in opt.param_groups] == [2]
    before = bits(model[0].weight)
    loss(model, *batches(1)).backward()
    assert bits(model[0].weight) == before and len(opt.state) == 2


@richest
def test_parameters_that_freeze_and_thaw(case, backend):
    """Frozen at first, at the end, or in between."""
    here, there = (
        (model, build(case, [*model.parameters()]))
        for build in (attach, lambda case, params: case.ours(params))
        for model in [network_with_frozen_weight()]
    )
    assert not here[0][0].weight.requires_grad and here[0][0].weight.is_leaf
    for at, inputs in enumerate(batches(6)):
        for model, opt in (here, there):
            model[0].weight.requires_grad_(at >= 2)
            model[0].bias.requires_grad_(at < 4)
            model[2].weight.requires_grad_(at not in (2, 3))
            opt.zero_grad()
            loss(model, inputs).backward()
            assert not seam.is_attached(opt) or not gradients(model)
            if not seam.is_attached(opt):
                opt.step()
    assert_same(*here, *there)


def network_with_frozen_weight():
    torch.manual_seed(0)
    model = network()
    model[0].weight.requires_grad_(False)
    return model


def test_integer_parameters_are_left_alone():
    params = [leaf(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.int8), False)]
    fusedopt.attach(params, fusedopt.SGD, lr=0.5)
    with torch.inference_mode():
        frozen = torch.ones(3)
    opt = fusedopt.attach([*params[1:], frozen, other := leaf(torch.ones(3))], fusedopt.SGD, lr=0.5)
    other.sum().backward()
    assert other.tolist() == [0.5] * 3
    fusedopt.detach(opt)


@richest
def test_parameters_without_a_gradient_in_a_step(case, backend):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    here, there = both(case, model.double())
    for at, inputs in enumerate(batches(6)):
        for model, opt in (here, there):
            opt.zero_grad()
            loss(model["ab"[at % 2]], inputs).backward()
            opt.step()
    assert_same(*here, *there)
    assert not here[1].state.keys() & {*model["c"].parameters()} or case.table.makes_state_at_once


@richest
def test_a_group_that_is_added(case, backend):
    here, there = both(case, network(), groups=lambda model: model[0].parameters())
    for at, inputs in enumerate(batches(4)):
        for model, opt in (here, there):
            if at == 2:
                opt.add_param_group({"params": model[2].parameters(), "lr": 0.03})
            if at < 2:
                model[2].requires_grad_(False)
            else:
                model[2].requires_grad_()
            step(model, opt, inputs)
    assert_same(*here, *there)


def test_parameters_that_the_backward_does_not_reach():
    model = network()
    opt = attach(ADAMW, model)
    before = [*map(bits, model.parameters())]
    loss(model, *batches(1)).backward(inputs=[model[0].weight])
    assert [*map(bits, model.parameters())][1:] == before[1:]
    assert [*opt.state] == [model[0].weight]


def test_gradients_that_are_computed_but_not_accumulated(backend):
    """``torch.autograd.grad`` does not step; gradients set by hand are left to ``step()``."""
    here, there = both(ADAMW, network())
    for inputs in batches():
        for model, opt in (here, there):
            before = snapshot(opt)
            grads = torch.autograd.grad(loss(model, inputs), [*model.parameters()])
            for param, grad in zip(model.parameters(), grads, strict=True):
                param.grad = grad
            assert snapshot(opt) == before
            opt.step()
            assert snapshot(opt) != before
            opt.zero_grad()
            step(model, opt, inputs)
    assert_same(*here, *there)


def test_a_gradient_from_before_is_part_of_the_sum(backend):
    model = network()
    first, second = batches(2)
    loss(model, first).backward()
    twin = copy.deepcopy(model)
    for param, grad in zip(twin.parameters(), gradients(model), strict=True):
        param.grad = grad.clone()
    opt, other = attach(ADAMW, model), ADAMW.ours(twin.parameters())
    loss(model, second).backward()
    loss(twin, second).backward()
    other.step()
    assert_same(model, opt, twin, other)


@pytest.mark.parametrize(
    "change",
    [lambda groups: groups.pop(0), lambda groups: groups.pop(), list.reverse, list.clear],
    ids=["first", "last", "order", "all"],
)
def test_groups_that_are_changed_by_hand_are_an_error(change):
    """Rather than the options of another group."""
    model = network()
    opt = attach(ADAMW, [{"params": [p]} for p in model.parameters()])
    before, groups = snapshot(opt), opt.param_groups.copy()
    change(opt.param_groups)
    with pytest.raises(RuntimeError, match=r"no longer where it was in param_groups; detach\(\)"):
        loss(model, *batches(1)).backward(inputs=[model[0].weight, model[2].weight])
    opt.param_groups[:] = groups
    assert snapshot(opt) == before


@richest
def test_state_that_is_deleted_starts_anew(case, backend):
    here, there = both(case, network())
    for at, inputs in enumerate(batches(5)):
        for model, opt in (here, there):
            if at == 2:
                opt.state.pop(model[0].weight, None)
            if at == 3:
                opt.state.clear()
            step(model, opt, inputs)
    assert_same(*here, *there)


# Loops ----------------------------------------------------------------------------------------


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, 0.1, 9, cycle_momentum="lr_decay" not in o.defaults
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.1, 2, cycle_momentum="lr_decay" not in o.defaults
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.CosineAnnealingLR(o, 5)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@richest
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=[*SCHEDULERS])
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


# Its life -------------------------------------------------------------------------------------


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
    with pytest.raises(RuntimeError, match=r"that attach\(\) returned is gone"):
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


# Errors ---------------------------------------------------------------------------------------


@richest
@pytest.mark.parametrize("steps", [0, 2])
def test_an_error_in_the_backward(case, steps, backend):
    """Comes out of ``backward()`` and names the parameter by its place in the whole."""
    model = network()
    opt = attach(
        case,
        [{"params": model[2].named_parameters()}, {"params": [*model[0].named_parameters()]}],
        lr=0.05,
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
    assert bits(model[2].weight) != before[2] and model[2].weight.grad is None
    opt.state[model[0].bias] = good
    if not good:
        del opt.state[model[0].bias]
    opt.step()  # what is left over
    assert bits(model[0].bias) != before[1]


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


# Distributed ----------------------------------------------------------------------------------


@pytest.fixture
def process_group():
    if not dist.is_available():
        skip_or_fail("torch was built without torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_wrappers_that_reduce_gradients_later(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    class Wrapped(DistributedDataParallel):
        pass

    cpu = torch.device("cpu")

    for wrap, name in [
        (DistributedDataParallel, "DistributedDataParallel"),
        (Wrapped, "DistributedDataParallel"),
        (lambda model: nn.Sequential(Wrapped(model)), "DistributedDataParallel"),
        (lambda model: FullyShardedDataParallel(model, device_id=cpu), "FullyShardedDataParallel"),
    ]:
        model = wrap(network())
        with pytest.raises(ValueError, match=f"{name} reduces gradients after.*fully_shard"):
            fusedopt.attach(model, fusedopt.AdamW)
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_fully_shard(process_group, backend):
    from torch.distributed.fsdp import fully_shard

    model = network()
    twin = copy.deepcopy(model)
    opt, other = attach(ADAMW, fully_shard(model)), ADAMW.ours(twin.parameters())
    for inputs in batches(3):
        step(model, opt, inputs)
        step(twin, other, inputs)
    for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert same_bits(param.full_tensor(), expected)
