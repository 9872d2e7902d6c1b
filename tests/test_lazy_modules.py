"""Parameters that get their shape in the first forward, after the optimizer was made."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import RICHEST, assert_near, snapshot
from torch import nn

import fusedopt

# torch's Adagrad fills its state in the constructor, and refuses; so does ours.
LAZY = [case for case in RICHEST if not case.table.makes_state_at_once]
lazy = pytest.mark.parametrize("case", LAZY, ids=lambda case: case.name)
STORED = [
    {},
    {"ema": 0.9},
    {"state_dtype": "8bit"},
    {"state_dtype": torch.bfloat16, "l1": 0.01},
]
stored = pytest.mark.parametrize("options", STORED, ids=str)
INPUTS = (70, 71)


class LazyScale(nn.modules.lazy.LazyModuleMixin, nn.Module):
    """Element by element, so that the same gradients have the same bits everywhere."""

    def __init__(self):
        super().__init__()
        self.weight = nn.UninitializedParameter()

    def initialize_parameters(self, inputs):
        if self.has_uninitialized_params():
            self.weight.materialize(inputs.shape)
            nn.init.normal_(self.weight)

    def forward(self, inputs):
        return inputs * self.weight


class Branches(nn.Module):
    """Two lazy layers, one of which is only used when it is asked for."""

    def __init__(self):
        super().__init__()
        self.first = LazyScale()
        self.last = nn.Parameter(torch.randn(INPUTS))
        self.side = LazyScale()
        self.uses_side = False

    def forward(self, inputs):
        loss = (self.first(inputs) + self.last).square().sum()
        return loss + (self.side(inputs).square().sum() if self.uses_side else 0)


def new_model():
    torch.manual_seed(0)
    return Branches()


def train(model, opt, inputs):
    """The layer at the side comes in the third step. Fresh weights are drawn there."""
    for step, batch in enumerate(inputs):
        torch.manual_seed(step)
        model.uses_side = step >= 2
        opt.zero_grad()
        model(batch).backward()
        opt.step()


@lazy
@stored
def test_in_the_backward(case, options, backend):
    """What the ordinary optimizer does; torch's is told by the next test."""
    inputs = torch.randn(4, *INPUTS)
    model, other = new_model(), new_model()
    train(other, opt := case.ours(other.parameters(), **options), inputs)
    attached = fusedopt.attach(model, getattr(fusedopt, case.name), **case.options, **options)
    train(model, attached, inputs)
    assert snapshot(attached) == snapshot(opt)
    assert all(param.grad is None for param in model.parameters())


@lazy
@pytest.mark.parametrize("attached", [False, True])
def test_against_torch(case, attached, backend):
    """In float64: gradients that hardly differ leave a centered RMSprop a variance of roundings."""
    double = {"dtype": torch.float64}
    inputs = torch.randn(4, 6, 10, **double)
    runs = []
    for is_ours in (True, False):
        torch.manual_seed(0)
        layers = nn.LazyLinear(7, **double), nn.Tanh(), nn.LazyLinear(3, **double)
        model = nn.Sequential(nn.LazyBatchNorm1d(**double), *layers)
        if is_ours and attached:
            opt = fusedopt.attach(model, getattr(fusedopt, case.name), **case.options)
        else:
            opt = (case.ours if is_ours else case.stock)(model.parameters())
        opt.step()
        opt.zero_grad()
        assert opt.state_dict()["state"] == {}
        repr(opt)
        for batch in inputs:
            opt.zero_grad()
            model(batch).square().mean().backward()
            opt.step()
        runs.append([*model.parameters()])
    for ours, theirs in zip(*runs, strict=True):
        assert_near(ours, theirs)


@lazy
@stored
@pytest.mark.parametrize("attached", [False, True])
def test_a_checkpoint_before_the_first_forward(case, options, attached, backend):
    inputs = torch.randn(6, *INPUTS)
    model = new_model()
    opt = case.ours(model.parameters(), **options)
    train(model, opt, inputs[:3])
    saved, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    results = []
    for is_ready in (True, False):
        other = new_model()
        if is_ready:
            other.uses_side = True
            other(inputs[0])
        if attached:
            cls = getattr(fusedopt, case.name)
            opt = fusedopt.attach(other, cls, **case.options, **options)
        else:
            opt = case.ours(other.parameters(), **options)
        opt.load_state_dict(copy.deepcopy(saved))
        other.load_state_dict(weights)
        train(other, opt, inputs[3:])
        results.append(snapshot(opt))
    assert results[0] == results[1]


@lazy
@stored
def test_the_state_of_a_layer_that_stays_lazy(case, options, backend):
    """It is kept until the layer is used, and checked then."""
    inputs = torch.randn(4, *INPUTS)
    opt = case.ours((model := new_model()).parameters(), **options)
    train(model, opt, inputs)
    saved = copy.deepcopy(opt.state_dict())
    for shape in (INPUTS, (3, 5)):
        model = new_model()
        opt = case.ours(model.parameters(), **options)
        opt.load_state_dict(copy.deepcopy(saved))
        train(model, opt, inputs[:2])
        assert opt.state[model.side.weight].keys() == saved["state"][2].keys()
        model.side(torch.randn(shape)).square().sum().backward()
        if shape == INPUTS:
            opt.step()
            continue
        before = snapshot(opt)
        with pytest.raises((TypeError, ValueError), match=r"parameter \d \(shape.*(shape|scale)"):
            opt.step()
        assert snapshot(opt) == before


@lazy
def test_frozen_layers_that_are_thawed(case, backend):
    """A lazy layer can be frozen by its attribute."""
    inputs = torch.randn(4, *INPUTS)
    model, other = new_model(), new_model()
    opts = []
    for each in (model, other):
        each.first.weight.requires_grad = False
        params = [*each.parameters()]
        if each is model:
            opts.append(fusedopt.attach(params, getattr(fusedopt, case.name), **case.options))
        else:
            opts.append(case.ours(params))
        assert not each.first.weight.requires_grad
        train(each, opts[-1], inputs[:1])
        each.first.weight.requires_grad_()
        train(each, opts[-1], inputs[1:])
    assert snapshot(opts[0]) == snapshot(opts[1])


@lazy
def test_detach_before_the_first_forward(case, backend):
    inputs = torch.randn(2, *INPUTS)
    model = new_model()
    opt = fusedopt.attach(model, getattr(fusedopt, case.name), **case.options)
    fusedopt.detach(opt)
    torch.manual_seed(0)
    model(inputs[0]).backward()
    assert not opt.state
    assert model.first.weight.grad is not None
    opt.step()


@lazy
def test_two_optimizers_are_an_error_before_the_first_forward(case):
    model = new_model()
    opt = fusedopt.attach(model, getattr(fusedopt, case.name))
    with pytest.raises(ValueError, match=r"not materialized yet.*attached to another"):
        fusedopt.attach(model.side, getattr(fusedopt, case.name))
    fusedopt.detach(opt)


@lazy
def test_messages(case, backend):
    model = new_model()
    opt = case.ours([*model.side.named_parameters()])
    saved = {"state": {0: 3}, "param_groups": opt.state_dict()["param_groups"]}
    with pytest.raises(TypeError, match=r"parameter 0 'weight' \(not materialized yet, torch.fl"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}], ids=str)
def test_adagrad_refuses_as_torch_does(options):
    for build in (torch.optim.Adagrad, fusedopt.Adagrad):
        more = options if build is fusedopt.Adagrad else {}
        with pytest.raises(ValueError, match="Call `forward` with a dummy batch"):
            build(new_model().parameters(), **more)


def test_adagrad_takes_a_lazy_group_later(backend):
    """torch's makes the state of groups that are added in the first step."""
    inputs = torch.randn(3, *INPUTS)
    models = [new_model() for _ in range(2)]
    for model, cls in zip(models, (fusedopt.Adagrad, torch.optim.Adagrad), strict=True):
        opt = cls([model.last], lr=0.1)
        opt.add_param_group({"params": [*model.first.parameters(), *model.side.parameters()]})
        train(model, opt, inputs)
    for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
        assert_near(ours, theirs)
