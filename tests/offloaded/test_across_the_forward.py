"""Steps that go on while the next forward runs: each module waits for its own parameters."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from contextlib import nullcontext

import pytest
import seam
import torch
from cases import bits, leaf, same_bits
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim import lr_scheduler

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
)


class Reluctant:
    """No copy is made before somebody waits for it."""

    def random(self):
        return 1.0


def reluctant(monkeypatch):
    return faulty_links(monkeypatch, Reluctant())


def is_pending(links, param):
    return any(
        target.data_ptr() == param.data_ptr()
        for link in links
        for copied in link.pending
        for target in copied.targets
    )


def begin_step(model, opt, inputs):
    """Up to where it goes on by itself."""
    opt.zero_grad()
    loss(model, inputs).backward()
    opt.step()


def wait_for_the_host(opt):
    """What is computed there is sent back from then on."""
    with seam.idle_worker(opt):
        pass
    seam.finish_worker(opt)


@pytest.mark.parametrize("way", [{}, {"max_grad_norm": 0.1}, {"gradients": "device"}], ids=str)
def test_each_module_waits_for_its_own(way, native, monkeypatch):
    links = reluctant(monkeypatch)
    model = network()
    opt = offload(ADAMW, model, overlap="forward", chunk=1, keep_below=0, **way)
    first, second = batches(2)
    begin_step(model, opt, first)
    wait_for_the_host(opt)
    own = [[*module.parameters()] for module in (model[0], model[2], model[4])]
    seen = []

    def look(module, *_):
        seen.append([any(is_pending(links, param) for param in params) for params in own])

    for at in (0, 2, 4):
        model[at].register_forward_pre_hook(look)
    model(second)
    assert seen == [[False, True, True], [False, False, True], [False, False, False]]


def test_the_device_waits_not_the_host(monkeypatch):
    """Whoever uses the parameters is ordered behind the copy, and goes on at once."""
    links = reluctant(monkeypatch)
    model = network()
    opt = offload(ADAMW, model, overlap="forward")
    begin_step(model, opt, *batches(1))
    model(*batches(1))
    assert links[0].joined


@pytest.mark.parametrize("gradients", ["host", "device"])
@pytest.mark.parametrize("options", [{"max_grad_norm": 0.05}, {}], ids=str)
def test_what_is_changed_while_the_step_is_under_way(options, gradients, backend, monkeypatch):
    """Options, learning rates in a tensor, and clipping are those of the step. Parameters that no
    forward needs may wait until the step after."""
    reluctant(monkeypatch)
    here, there = both(
        ADAMW, network(), overlap="forward", gradients=gradients, lr=torch.tensor(0.05), **options
    )
    scheduled = [lr_scheduler.ExponentialLR(opt, 0.5) for _, opt in (here, there)]
    for scale in (1, 100, 1):
        grads = [scale * torch.randn_like(param) for param in here[0].parameters()]
        for (model, opt), schedule in zip((here, there), scheduled, strict=True):
            with seam.idle_worker(opt) if opt is here[1] else nullcontext():
                for param, grad in zip(model.parameters(), grads, strict=True):
                    param.grad = grad.clone()
                opt.step()
                schedule.step()
                opt.param_groups[0]["weight_decay"] += 0.1
                if opt is here[1] and options:
                    seam.measure_another_norm(opt)
    assert_same(*here, *there)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("gradients", ["host", "device"])
def test_gradients_that_are_written_after_step(set_to_none, gradients, native, monkeypatch):
    """When copies of them are still to be made."""
    reluctant(monkeypatch)
    here, there = both(ADAMW, network(), overlap="forward", gradients=gradients)
    for _ in range(3):
        grads = [torch.randn_like(param) for param in here[0].parameters()]
        for model, opt in (here, there):
            mine = [grad.clone() for grad in grads]
            with seam.idle_worker(opt) if opt is here[1] else nullcontext():
                for param, grad in zip(model.parameters(), mine, strict=True):
                    param.grad = grad
                opt.step()
                opt.zero_grad(set_to_none)
                for grad in mine:
                    grad.fill_(1e3)
    assert_same(*here, *there)


def tensors_of(value):
    """Of a state dict, in an order that is always the same."""
    if isinstance(value, dict):
        return [tensors_of(value[key]) for key in sorted(value, key=str)]
    return bits(value) if isinstance(value, torch.Tensor) else str(value)


@pytest.mark.parametrize("at", [0, 1], ids=["of the model", "of the optimizer"])
def test_state_dicts_in_the_middle(at, native, monkeypatch):
    reluctant(monkeypatch)
    here, there = both(ADAMW, network(), overlap="forward", chunk=1)
    for inputs in batches(3):
        for each in (here, there):
            begin_step(*each, inputs)
        ours, theirs = (each[at].state_dict() for each in (here, there))
        assert tensors_of(ours) == tensors_of(theirs)


class Language(nn.Module):
    """Attention, a head that is tied to the embedding, and a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.head = nn.Linear(8, 7)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = self.attention(x, x, x, need_weights=False)[0] + x
        return self.head(self.normed(self.recurrent(self.block(x))[0]))


def test_modules_of_many_kinds(native, monkeypatch):
    """In training and in evaluation, where some take a shorter way that reads what others hold."""
    reluctant(monkeypatch)
    here, there = both(ADAMW, Language(), overlap="forward", chunk=1, keep_below=0, lr=1e-2)
    assert parametrize.is_parametrized(here[0].normed)
    tokens = torch.randint(7, (4, 3, 5))
    for each in tokens:
        outputs = []
        for model, opt in (here, there):
            model.train()
            opt.zero_grad()
            loss(model, each).backward()
            opt.step()
            model.eval()
            with torch.no_grad():
                outputs.append(model(each))
        assert same_bits(*outputs)
        for model, opt in (here, there):
            begin_step(model, opt, each)
    assert_same(*here, *there)


def test_modules_alone(native, monkeypatch):
    """Also one that is called without the others."""
    reluctant(monkeypatch)
    here, there = both(ADAMW, Language(), overlap="forward", chunk=1, keep_below=0, lr=1e-2)
    tokens, x = torch.randint(7, (3, 5)), torch.randn(3, 5, 8)
    calls = {
        "embedding": tokens,
        "attention": (x, x, x),
        "block": x,
        "recurrent": x,
        "normed": x,
        "head": x,
    }
    for name, inputs in calls.items():
        for each in (here, there):
            each[0].train()
            begin_step(*each, tokens)
            each[0].eval()
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        with torch.no_grad():
            ours, theirs = (getattr(model, name)(*inputs) for model, _ in (here, there))
        if isinstance(ours, tuple):
            ours, theirs = ours[0], theirs[0]
        assert same_bits(ours, theirs), name


def test_copies_of_the_model(native, monkeypatch, tmp_path):
    """Have no optimizer, and wait for none."""
    reluctant(monkeypatch)
    (model, opt), _ = both(ADAMW, network(), overlap="forward")
    inputs = batches(3)
    begin_step(model, opt, inputs[0])
    opt.synchronize()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    expected = model(inputs[1]).clone()
    begin_step(model, opt, inputs[2])
    for each in copies:
        assert same_bits(each(inputs[1]), expected) and each.state_dict()


def test_weights_that_are_loaded_in_the_middle(native, monkeypatch):
    reluctant(monkeypatch)
    here, there = both(ADAMW, network(), overlap="forward", chunk=1)
    saved = {name: value + 1 for name, value in network().state_dict().items()}
    for inputs in batches(2):
        for model, opt in (here, there):
            begin_step(model, opt, inputs)
            model.load_state_dict(saved)
            begin_step(model, opt, inputs)
    assert_same(*here, *there)


def test_a_model_that_outlives_its_optimizer(native, monkeypatch):
    """Whose last step is under way when nobody holds it any more."""
    reluctant(monkeypatch)
    here, there = both(ADAMW, network(), overlap="forward", chunk=1)
    inputs = batches(2)
    for each in (here, there):
        begin_step(*each, inputs[0])
    model, twin = here[0], there[0]
    alive = weakref.ref(here[1])
    del here, each
    gc.collect()
    outputs = [each(inputs[1]) for each in (model, twin)]
    assert same_bits(*outputs)
    assert collected(lambda: alive() is None)
    assert [*map(bits, model.parameters())] == [*map(bits, twin.parameters())]


def test_an_optimizer_that_is_detached(native, monkeypatch):
    reluctant(monkeypatch)
    here, there = both(ADAMW, network(), overlap="forward", chunk=1)
    inputs = batches(4)
    for at, each in enumerate(inputs):
        for model, opt in (here, there):
            begin_step(model, opt, each)
        if at == 1:
            fusedopt.detach(here[1])
    assert_same(*here, *there)


def test_the_model_may_be_a_list_of_parameters(native, monkeypatch):
    """``nn.ParameterList`` has no forward; its parameters are waited for in ``state_dict()``."""
    reluctant(monkeypatch)
    model = nn.ParameterList([leaf(torch.rand(8)) for _ in range(2)])
    twin = copy.deepcopy(model)
    opt, other = offload(ADAMW, model, overlap="forward"), ADAMW.ours(twin.parameters())
    for each, its in ((model, opt), (twin, other)):
        sum(param.square().sum() for param in each).backward()
        its.step()
    assert [*map(bits, model.state_dict().values())] == [*map(bits, twin.state_dict().values())]
