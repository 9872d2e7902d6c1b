"""Parameters without kernels: which way they go, and that each way is right."""

from __future__ import annotations

import random
import warnings

import pytest
import seam
import torch
from cases import (
    CASES,
    NAMES,
    RICHEST_OF,
    TABLES,
    Case,
    bits,
    gradient_like,
    leaf,
    richest,
    snapshot,
)
from memory import STORED
from seam import modes

import fusedopt

Kind, Mode, Torch = modes.Kind, modes.Mode, modes.Torch


@pytest.fixture
def python(monkeypatch):
    monkeypatch.setattr(fusedopt.backend, "native", None)


def stepped(build, shapes=None, dtype=torch.float32, steps=4, seed=0, **more):
    """An optimizer after some steps, with gradients that are left as they were."""
    torch.manual_seed(seed)
    shapes = shapes or [(3, 4), (), (0,), (300, 300), *[(7,)] * 12]
    params = [leaf(torch.randn(shape), dtype) for shape in shapes]
    half = len(params) // 2
    opt = build([{"params": params[:half]}, {"params": params[half:]}], **more)
    for _ in range(steps):
        for p in params:
            p.grad = gradient_like(p.detach())
        grads = [bits(p.grad) for p in params]
        opt.step()
        assert [bits(p.grad) for p in params] == grads
    return opt


def values(opt) -> list:
    """Parameters and state without what only one of two implementations keeps."""
    params, states, *_ = snapshot(opt)
    return [params, [{k: v for k, v in (state or {}).items() if k != "step"} for state in states]]


# Which way -------------------------------------------------------------------------------------

CUDA = Torch(lambda operator, device: device in ("cuda", "cpu"), ("cuda",))
ORDINARY = Kind("cuda", torch.float32, True, True, False, False, False)
WAYS = [
    # class, options, kind, way
    ("Adam", {}, {}, Mode.FUSED),
    ("AdamW", {}, {"counts_on_device": True}, Mode.FUSED),
    ("SGD", {"momentum": 0.9}, {"is_first": True}, Mode.RULE),
    ("SGD", {"momentum": 0.9}, {}, Mode.FUSED),
    ("SGD", {"nesterov": True, "momentum": 0.9}, {"is_aligned": False}, Mode.LOOP),
    ("SGD", {"nesterov": True, "momentum": 0.9}, {"device": "cpu", "is_aligned": False}, Mode.RULE),
    ("Adagrad", {}, {}, Mode.FUSED),
    ("Adagrad", {}, {"is_aligned": False, "counts_on_device": True}, Mode.ALONE),
    ("Adam", {"amsgrad": True}, {}, Mode.FOREACH),
    ("Adam", {}, {"is_aligned": False}, Mode.FOREACH),
    ("Adam", {}, {"is_uniform": False}, Mode.RULE),
    ("Adam", {}, {"device": "mps", "is_aligned": False}, Mode.LOOP),
    ("Adam", {}, {"dtype": torch.bfloat16}, Mode.FUSED),
    ("Adam", {}, {"dtype": torch.bfloat16, "is_scaled": True}, Mode.RULE),
    ("Adam", {}, {"dtype": torch.bfloat16, "device": "cpu"}, Mode.RULE),
    ("Adam", {"l1": 0.1}, {}, Mode.RULE),
    ("Adam", {"ema": 0.0}, {}, Mode.RULE),
    ("Adam", {"l1": 0.1}, {"counts_on_device": True}, Mode.ALONE),
    ("Adam", {"lr": torch.tensor(0.1)}, {}, Mode.FUSED),
    ("Adam", {"lr": torch.tensor(0.1), "l1": 0.1}, {}, Mode.ALONE),
    ("RMSprop", {}, {}, Mode.FOREACH),
    ("RMSprop", {}, {"counts_on_device": True}, Mode.FOREACH),
    ("RMSprop", {}, {"dtype": torch.float16}, Mode.RULE),
    ("RMSprop", {"eps_inside_sqrt": True}, {}, Mode.RULE),
    ("RAdam", {}, {}, Mode.LOOP),
    ("RAdam", {}, {"device": "cpu"}, Mode.RULE),
    ("Lion", {}, {}, Mode.RULE),
]


@pytest.mark.parametrize(("name", "options", "kind", "way"), WAYS)
def test_the_way_of_some_parameters(name, options, kind, way):
    cls = getattr(fusedopt, name)
    (group,) = cls([torch.zeros(1)], **options).param_groups
    torchs = seam.torch_options(cls) if seam.has_stock(cls) else None
    found = modes.choose(seam.rule_of(cls), torchs, group, ORDINARY._replace(**kind), CUDA)
    assert found is way


# That it is right ------------------------------------------------------------------------------


# Where it is the rule that computes: the first step of SGD with momentum, and RAdam.
BY_RULE = [c for c in CASES if c.name == "RAdam" or c.name == "SGD" and c.options.get("momentum")]
WITH_STOCK = [
    case for case in CASES if seam.has_stock(getattr(fusedopt, case.name)) and case not in BY_RULE
]


@pytest.mark.parametrize("case", WITH_STOCK, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_bits_are_those_of_torch(case, dtype, python):
    """Of its implementation that was chosen; what torch lacks is computed one by one elsewhere."""
    if seam.own_options(type(case.ours([torch.zeros(1)]))) & case.options.keys():
        pytest.skip("torch does not have the option")
    if any(isinstance(v, torch.Tensor) for v in case.options.values()):
        pytest.skip("torch's other implementations take no tensor")
    ours = stepped(case.ours, dtype=dtype)
    found = []
    for mode in ({"foreach": True}, {"foreach": False}, {"fused": True, "foreach": None}):
        try:
            found.append(values(_stock(case, dtype, mode)))
        except (TypeError, RuntimeError):
            continue
    assert values(ours) in found


def _stock(case, dtype, mode):
    options = {"foreach": None, **case.options, **mode}
    torch.manual_seed(0)
    return stepped(lambda groups: TABLES[case.name].stock(groups, **options), dtype=dtype)


@richest
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "more", [{}, {"l1": 0.1}, {"ema": 0.5}, {"maximize": True, "l1": 0.1}], ids=str
)
def test_the_rule_over_lists_has_the_bits_of_the_rule(case, dtype, more, python):
    build = Case(case.name, {**case.options, **more}).ours
    with seam.only_by_the_rule():
        together = stepped(build, dtype=dtype)
    with seam.one_by_one():
        alone = stepped(build, dtype=dtype)
    assert snapshot(together) == snapshot(alone)


@richest
@pytest.mark.parametrize("stored", STORED)
def test_stored_values_over_lists(case, stored, python):
    options, dtype = STORED[stored]
    shapes = [(5000,), (3,), (64, 65)]
    build = Case(case.name, {**case.options, **options}).ours
    with seam.only_by_the_rule():
        together = stepped(build, shapes, dtype)
    with seam.one_by_one():
        alone = stepped(build, shapes, dtype)
    assert snapshot(together) == snapshot(alone)


@richest
def test_parameters_at_different_steps(case, python):
    """Those of one group that have been updated a different number of times."""
    results = []
    for way in (seam.only_by_the_rule, seam.one_by_one):
        torch.manual_seed(1)
        params = [leaf(torch.randn(5)) for _ in range(6)]
        opt = case.ours(params, l1=0.1)
        with way():
            for at in range(5):
                for i, p in enumerate(params):
                    p.grad = None if (at + i) % 3 == 0 else gradient_like(p.detach())
                opt.step()
        results.append(snapshot(opt))
    assert results[0] == results[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_does_not_look_closely_again(name, python):
    """What was checked is recognised, and what has changed since is not."""
    case = RICHEST_OF[name]
    opt = case.ours([leaf(torch.randn(7)) for _ in range(5)])
    params = opt.param_groups[0]["params"]

    def step() -> int:
        for p in params:
            p.grad = torch.randn(7)
        with seam.checks_of(opt) as checked:
            opt.step()
        return len(checked)

    assert step() == 5
    step()
    assert step() == 0
    at = random.randrange(5)
    params[at].data = params[at].data.clone()
    assert step() == 1
    opt.load_state_dict(opt.state_dict())
    step()
    assert step() == 0
    params[at].grad = None
    params[at].data = params[at].data.double()
    state = opt.state[params[at]]
    opt.state[params[at]] = {k: v.double() if v.dim() else v for k, v in state.items()}
    params.append(params.pop(at))
    for p in params:
        p.grad = torch.randn(7, dtype=p.dtype)
    with seam.checks_of(opt) as checked:
        opt.step()
    assert len(checked) == 1


def test_a_device_is_asked_once_whether_to_skip(python):
    params = [leaf(torch.randn(4)) for _ in range(20)]
    opt = fusedopt.Adam(params, amp_fused=True, max_grad_norm=1.0)
    for p in params:
        p.grad = torch.randn(4)
    for found, stays in ((0.0, False), (1.0, True)):
        opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(found)
        before = snapshot(opt)
        with seam.questions_whether_to_skip() as asked:
            opt.step()
        assert len(asked) == 1
        assert (snapshot(opt) == before) == stays


# What is said of it ----------------------------------------------------------------------------


def test_a_device_without_kernels_is_named_once():
    if fusedopt.backend.native is None:
        pytest.skip("it was said at import")
    seam.forget_missing_kernels()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for device in ("cpu", "xpu", "xpu", "mps"):
            seam.warn_of_missing_kernels(device)
    seam.forget_missing_kernels()
    assert [("xpu" in str(w.message), "mps" in str(w.message)) for w in caught] == [
        (True, False),
        (False, True),
    ]
    assert all("no kernels" in str(w.message) and "info" in str(w.message) for w in caught)


def test_info_has_a_line_for_each_device():
    from fusedopt import info

    lines = info.report().splitlines()
    assert [line for line in lines if line.startswith("cpu: ")]
