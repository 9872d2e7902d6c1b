"""What the optimizer in the backward computes: the bits of the ordinary one, and no more memory."""

from __future__ import annotations

import copy

import pytest
import torch
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
    snapshot,
)
from torch import nn

from attached import ADAMW, assert_same, attach, batches, both, loss, network, step


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
