"""Parameters and gradients of many kinds, and what loops do with them."""

from __future__ import annotations

import random
import warnings

import pytest
import seam
import torch
from cases import LAYOUTS, SPARSE, Case, bits, leaf, richest, same_bits, snapshot
from schedulers import FEW
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

from offloaded import ADAMW, assert_same, batches, both, faulty_links, loss, network, offload, step
from offloaded.test_offloaded_steps import WAYS, train

ALL_WAYS = [*WAYS.values(), {"max_grad_norm": 0.05, "chunk": 200}]


def any_way(*, is_module=True):
    ways = [way for way in ALL_WAYS if is_module or way.get("overlap") != "forward"]
    return dict(random.choice(ways))


def alike(case, make, **more):
    """Two of what ``make`` makes, stepped with the same gradients, set by hand; None: none."""
    seed = random.randrange(2**31)
    way = any_way(is_module=False) | more
    made = []
    for is_ours in (True, False):
        torch.manual_seed(seed)
        params, grads = make()
        ordinary = {k: v for k, v in way.items() if k == "max_grad_norm"}
        opt = offload(case, params, **way) if is_ours else case.ours(params, **ordinary)
        for now in grads:
            for param, grad in zip(params, now, strict=True):
                param.grad = grad
            opt.step()
            opt.zero_grad()
        made.append((params, opt))
    (params, opt), (others, other) = made
    assert snapshot(opt) == snapshot(other), way
    return opt, params


# Kinds ----------------------------------------------------------------------------------------


@richest
def test_layouts(case, backend, only_by_the_rule, monkeypatch):
    """Those whose elements are not side by side stay where they are. (Which of torch's operators
    step the others, where there are no kernels, would depend on who is beside them.)"""
    faulty_links(monkeypatch)

    def make():
        values = [torch.randn(2, 3, 4, 5) for _ in LAYOUTS]
        params = [leaf_in(layout, v) for layout, v in zip(LAYOUTS.values(), values, strict=True)]
        rounds = []
        for at in range(3):
            torch.manual_seed(at)
            grads = [torch.randn(2, 3, 4, 5) for _ in params]
            layouts = [*LAYOUTS.values()]
            rounds.append([layouts[(i + at) % len(layouts)](g)[0] for i, g in enumerate(grads)])
        return params, rounds

    opt, params = alike(case, make)
    offloaded = sum(map(len, seam.in_chunks(opt)))
    assert 4 <= offloaded < len(params)


def leaf_in(layout, values):
    return layout(values)[0].detach().requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sizes_and_dtypes_beside_each_other(dtype, backend, monkeypatch):
    faulty_links(monkeypatch)

    def make():
        shapes = [(), (0,), (1,), (3, 0, 2), (7,), (33,), (5, 5)]
        params = [leaf(torch.randn(shape).to(dtype)) for shape in shapes]
        params += [leaf(torch.randn(9, dtype=torch.float64)), leaf(torch.randn(9))]
        return params, [[torch.randn_like(p) for p in params] for _ in range(3)]

    opt, params = alike(ADAMW, make, keep_below=0)
    assert sum(map(len, seam.in_chunks(opt))) == len(params)


@pytest.mark.parametrize("way", [{}, {"max_grad_norm": 0.1}, {"gradients": "device"}], ids=str)
def test_gradients_of_another_dtype(way, backend, monkeypatch):
    """Where torch allows it: with ``grad_dtype``."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    faulty_links(monkeypatch)
    made = []
    values = torch.randn(40), torch.randn(40)
    for is_ours in (True, False):
        params = [leaf(v) for v in values]
        for param in params:
            param.grad_dtype = None
        options = {k: v for k, v in way.items() if is_ours or k == "max_grad_norm"}
        opt = (offload if is_ours else Case.ours)(ADAMW, params, **options)
        for at, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32)):
            torch.manual_seed(at)
            for param, one in zip(params, (dtype, torch.bfloat16), strict=True):
                param.grad = torch.randn(40).to(one)
            opt.step()
            opt.zero_grad()
        made.append(snapshot(opt))
    assert made[0] == made[1]


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("way", [{}, {"max_grad_norm": 0.1}, {"gradients": "device"}], ids=str)
def test_sparse_gradients(name, way, backend, monkeypatch):
    faulty_links(monkeypatch)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3)).double()
    here, there = both(Case(name, {"lr": 0.1}), model, chunk=1, **way)
    for at in range(4):
        tokens = torch.randint(9, (2, 3)) if at != 2 else torch.zeros(0, 3, dtype=torch.int64)
        for each, opt in (here, there):
            opt.zero_grad()
            (each(tokens).square().sum() + each[1].weight.sum()).backward()
            opt.step()
    assert_same(*here, *there)


PARAMETERS = {
    "overlapping halves": lambda b: [b[:14], b[10:]],
    "one inside of the other": lambda b: [b, b[2:12]],
    "interleaved": lambda b: [b[::2], b[1::2]],
    "another view of the same": lambda b: [b, b.view(4, 6)],
    "side by side": lambda b: [b[:12], b[12:]],
}


@pytest.mark.parametrize("kind", PARAMETERS)
def test_parameters_that_share_memory(kind, backend, monkeypatch):
    """A step of one is seen by the next, which their images would not see."""
    faulty_links(monkeypatch)

    def make():
        base = torch.randn(24, dtype=torch.float64)
        other = leaf(torch.randn(8, dtype=torch.float64))
        params = [*(v.detach().requires_grad_() for v in PARAMETERS[kind](base)), other]
        return params, [[torch.randn_like(p) for p in params] for _ in range(3)]

    opt, params = alike(ADAMW, make, chunk=1)
    count = sum(map(len, seam.in_chunks(opt)))
    assert count == (3 if kind == "side by side" else 1)


def test_a_parameter_that_shares_memory_comes_later(native, monkeypatch):
    faulty_links(monkeypatch)
    model = network()
    opt = offload(ADAMW, [model[0].weight])
    view = nn.Parameter(model[0].weight.data[:2])
    with pytest.raises(ValueError, match="group 1, parameter 0 .*shares memory"):
        opt.add_param_group({"params": [view]})
    assert len(opt.param_groups) == 1


# Loops ----------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A batch reaches the trunk, one layer twice, and some of the others; two share a weight."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
        self.experts[3].weight = self.experts[0].weight
        self.double()

    def forward(self, inputs, chosen):
        x = self.trunk(self.trunk(inputs).tanh())
        return sum(self.experts[i](x).square().mean() for i in chosen)


@richest
def test_late_and_missing_gradients(case, backend, monkeypatch):
    """Layers that are not used, and parameters that freeze and thaw."""
    faulty_links(monkeypatch)
    here, there = both(case, Experts(), groups=shuffled, **any_way(is_module=False))
    for at, chosen in enumerate(([0], [1, 2], [0, 3], [2], [0, 1, 2, 3])):
        inputs = batches(1)[0]
        for model, opt in (here, there):
            model.trunk.weight.requires_grad_(at not in (0, 3))
            model.experts[2].bias.requires_grad_(at < 4)
            opt.zero_grad()
            model(inputs, chosen).backward()
            opt.step()
    assert_same(*here, *there)


def shuffled(model):
    """Groups with options of their own, whose parameters follow each other in any order."""
    names = sorted(name for name, _ in model.named_parameters())
    order = random.Random(random.getstate()[1][0]).sample(names, len(names))
    params = dict(model.named_parameters())
    params = [params[name] for name in order]
    return [{"params": params[::2], "lr": 0.05}, {"params": params[1::2], "lr": 0.2}]


@richest
def test_accumulation(case, backend, monkeypatch):
    """The last backward does not reach all parameters."""
    faulty_links(monkeypatch)
    here, there = both(case, Experts(), **any_way(is_module=False))
    for rounds in ([[0, 1], [1], [2, 1]], [[3], [0]], [[1]], [[0, 1, 2], [0]]):
        inputs = batches(len(rounds))
        for model, opt in (here, there):
            opt.zero_grad()
            with opt.accumulating():
                for each, chosen in zip(inputs[:-1], rounds[:-1], strict=True):
                    model(each, chosen).backward()
            model(inputs[-1], rounds[-1]).backward()
            opt.step()
    assert_same(*here, *there)


def test_a_step_while_accumulating(native, monkeypatch):
    """``step()`` is ``step()``, and gradients that are cleared are gone."""
    faulty_links(monkeypatch)
    here, there = both(ADAMW, network(), **any_way())
    inputs = batches(5)
    for model, opt in (here, there):
        with opt.accumulating():
            loss(model, inputs[0]).backward()
            loss(model, inputs[1]).backward()
            opt.step()
            opt.zero_grad()
            loss(model, inputs[2]).backward()
        opt.zero_grad()
        step(model, opt, inputs[3])
        with opt.accumulating():
            opt.zero_grad()
            loss(model, inputs[4]).backward()
        opt.step()
    assert_same(*here, *there)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.reentrant = reentrant
        self.double()

    def forward(self, x):
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = checkpoint(lambda x, f=layer: f(x).tanh(), x, use_reentrant=self.reentrant)
        return x


@richest
@pytest.mark.parametrize("reentrant", [False, True], ids=["replayed", "reentrant"])
def test_activation_checkpointing(case, reentrant, native, monkeypatch):
    faulty_links(monkeypatch)
    here, there = both(case, Checkpointed(reentrant), **any_way())
    for inputs in batches(3):
        for each in (here, there):
            step(*each, inputs)
    assert_same(*here, *there)


@richest
def test_a_group_that_is_added(case, native, monkeypatch):
    faulty_links(monkeypatch)
    groups = lambda model: model[0].parameters()  # noqa: E731
    here, there = both(case, network(), groups=groups, **any_way(is_module=False))
    for at, inputs in enumerate(batches(4)):
        for model, opt in (here, there):
            model[2:].requires_grad_(at >= 2)
            if at == 2:
                opt.add_param_group({"params": model[2:].parameters(), "lr": 0.03})
            step(model, opt, inputs)
    assert_same(*here, *there)


@pytest.mark.parametrize("schedule", FEW.values(), ids=[*FEW])
@pytest.mark.parametrize("lr_type", [float, torch.tensor], ids=["float", "tensor"])
def test_schedulers(schedule, lr_type, native, monkeypatch):
    """Without a warning."""
    faulty_links(monkeypatch)
    here, there = both(ADAMW, network(), lr=lr_type(0.05), **any_way())
    schedules = [schedule(opt) for _, opt in (here, there)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for at, inputs in enumerate(batches(6)):
            for (model, opt), each in zip((here, there), schedules, strict=True):
                step(model, opt, inputs)
                each.step(*[1.0 + at] * isinstance(each, lr_scheduler.ReduceLROnPlateau))
    assert_same(*here, *there)


@richest
def test_closures_and_hooks(case, native, monkeypatch):
    faulty_links(monkeypatch)
    here, there = both(case, network(), **any_way())
    calls = []
    for _, opt in (here, there):
        for register in ("step_pre_hook", "step_post_hook", "state_dict_pre_hook"):
            getattr(opt, f"register_{register}")(lambda *_, name=register: calls.append(name))
        opt.register_state_dict_post_hook(lambda _, saved: saved | {"more": 1})
        opt.register_load_state_dict_pre_hook(lambda *_: calls.append("load"))
    for inputs in batches(3):
        values = []
        for model, opt in (here, there):

            def closure(model=model, opt=opt, inputs=inputs):
                opt.zero_grad()
                value = loss(model, inputs)
                value.backward()
                return value

            values.append(opt.step(closure).item())
            opt.load_state_dict(opt.state_dict())
            assert opt.state_dict()["more"] == 1
        assert values[0] == values[1]
    half = len(calls) // 2
    assert calls[:5] == calls[5:10] and half == 15
    assert_same(*here, *there)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(
    "way", [{"max_grad_norm": 0.05}, {"overlap": None}, {"gradients": "device"}], ids=str
)
def test_gradients_that_are_forgotten(way, set_to_none, native, monkeypatch):
    """Between backward and step, where they wait for each other."""
    faulty_links(monkeypatch)
    here, there = both(ADAMW, network(), **way)
    for inputs in zip(batches(3), batches(3), strict=True):
        for model, opt in (here, there):
            loss(model, inputs[0]).backward()
            opt.zero_grad(set_to_none)
            loss(model, inputs[1]).backward()
            opt.step()
            opt.zero_grad(set_to_none)
    assert_same(*here, *there)


def test_averages(native, monkeypatch):
    faulty_links(monkeypatch)
    options = {"ema": 0.7, **any_way()}
    here, there = both(ADAMW, network(torch.bfloat16), master_weights="split", **options)
    for inputs in batches(3, torch.bfloat16):
        outputs = []
        for model, opt in (here, there):
            step(model, opt, inputs)
            averages = [p.detach().clone() for p in opt.ema_parameters()]
            with opt.swap_ema():
                outputs.append(model(inputs))
                averages = [value.to(torch.bfloat16) for value in averages]
                assert [*map(bits, averages)] == [*map(bits, model.parameters())]
                with pytest.raises(RuntimeError, match="leave swap_ema"):
                    opt.step()
            opt.zero_grad()
        assert same_bits(*outputs)
    assert_same(*here, *there)


@pytest.mark.parametrize("options", [{"state_dtype": "8bit"}, {"rounding": "stochastic"}], ids=str)
@richest
def test_storage(options, case, backend, monkeypatch):
    """Blocks of a large parameter, and random numbers, whatever runs when."""
    faulty_links(monkeypatch)
    model = nn.Sequential(nn.Linear(4, 200), nn.Linear(200, 3)).to(torch.bfloat16)
    here, there = both(case, model, **options, **any_way())
    train(here, there, batches(3, torch.bfloat16))
    assert_same(*here, *there)
