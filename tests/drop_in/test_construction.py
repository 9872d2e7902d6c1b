"""Construction: signatures, classes, arguments that are refused, as of torch.optim."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import seam
import torch
from cases import (
    EXTRAS,
    NAMES,
    TABLES,
    assert_trained_alike,
    draw,
    every_name,
    every_torch_name,
    leaf,
    train,
)

import fusedopt


def both(name):
    return getattr(fusedopt, name), TABLES[name].stock


def outcome(build, *args, **kwargs):
    """What a call does: the type and message of its exception, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            build(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)
    return None


@every_name
def test_signature(name):
    ours, stock = (inspect.signature(cls.__init__).parameters for cls in both(name))
    extras = {key for key in ours if key not in stock}
    known = {*EXTRAS, *seam.shared_options(), "capturable"}
    assert extras <= known
    assert all(ours[key].kind is inspect.Parameter.KEYWORD_ONLY for key in extras)
    assert not any(ours[key].default for key in extras)

    def described(parameters):
        return [(p.name, p.default, p.kind) for p in parameters.values() if p.name not in extras]

    assert described(ours) == described(stock)


@every_torch_name
def test_class(name):
    ours, stock = both(name)
    opt = ours([leaf(torch.ones(1))])
    assert isinstance(opt, (stock, torch.optim.Optimizer)) and isinstance(opt, stock)
    assert ours.__name__ == name and ours.__module__.startswith("fusedopt")
    assert isinstance(opt, torch.optim.Adam) == issubclass(stock, torch.optim.Adam)
    assert callable(opt.profile_hook_step)
    functions = {name for name in fusedopt.__all__ if name not in NAMES}
    assert {*NAMES} < set(fusedopt.__all__) and all(
        inspect.isfunction(getattr(fusedopt, name)) for name in functions
    )


@every_name
def test_positional_arguments(name):
    ours, stock = both(name)
    kinds = inspect.signature(stock.__init__).parameters.values()
    defaults = [p.default for p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD][2:]
    values = [0.25 if type(d) in (int, float) else d for d in defaults]
    for count in range(len(values) + 1):
        a, b = (cls([leaf(torch.ones(1))], *values[:count]) for cls in (ours, stock))
        assert a.defaults == b.defaults


BAD_OPTIONS = [
    {"lr": -0.1},
    {"lr": float("nan")},
    {"lr": torch.tensor([0.1, 0.2])},
    {"lr": torch.tensor(-0.1)},
    {"lr": torch.tensor(0.1), "foreach": True},
    {"lr": "x"},
    {"eps": -1e-9},
    {"eps": float("nan")},
    {"weight_decay": -0.1},
    {"betas": (-0.1, 0.9)},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, -0.1)},
    {"betas": (0.9, 1.0)},
    {"betas": (0.9,)},
    {"betas": (0, 0.9)},
    {"betas": (torch.tensor(0.9), 0.9)},
    {"betas": (torch.tensor(0.9), torch.tensor(0.9)), "foreach": True},
    {"betas": (torch.tensor([0.9, 0.9]), torch.tensor(0.9))},
    {"betas": (torch.tensor(0.9), torch.tensor([0.9, 0.9]))},
    {"momentum": -0.1},
    {"alpha": -0.1},
    {"lr_decay": -0.1},
    {"initial_accumulator_value": -0.1},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    {"fused": True, "foreach": True},
    {"fused": True, "differentiable": True},
    {"no_such_option": 1},
    {"momentum": 0.9, "lr": 0, "weight_decay": 0, "eps": 0},
]


@every_name
@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_bad_options(name, options):
    ours, stock = (outcome(cls, [leaf(torch.ones(1))], **options) for cls in both(name))
    if stock and stock[0] is TypeError and "unexpected keyword" in stock[1]:
        assert ours and ours[0] is TypeError and "unexpected keyword" in ours[1]
    else:
        assert ours == stock


@every_name
@pytest.mark.parametrize(
    "params",
    [
        lambda: torch.ones(1),
        lambda: [],
        lambda: None,
        lambda: 3,
        lambda: [3],
        lambda: ["x"],
        lambda: [leaf(torch.ones(1)) * 2],
        lambda: [{"params": {leaf(torch.ones(1))}}],
        lambda: [{"lr": 1.0}],
        lambda: [("a", leaf(torch.ones(1))), leaf(torch.ones(1))],
        lambda: [{"params": [leaf(torch.ones(1))]}, {"params": [("a", leaf(torch.ones(1)))]}],
        lambda: [p := leaf(torch.ones(1)), p],
        lambda: [{"params": (p := leaf(torch.ones(1)))}, {"params": p}],
    ],
)
def test_bad_params(name, params):
    ours, stock = (outcome(cls, params()) for cls in both(name))
    assert stock is not None
    assert ours[0] is stock[0] and ours[1][:60] == stock[1][:60]


@every_name
@pytest.mark.parametrize(
    "options",
    [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}, {"maximize": True}],
    ids=str,
)
def test_switches_between_stock_implementations_are_accepted_and_stored(name, options, backend):
    ours, stock = both(name)
    if set(options) - set(inspect.signature(stock.__init__).parameters):
        with pytest.raises(TypeError):
            ours([leaf(torch.ones(1))], **options)
        return
    values, grads = draw([(3,), (4, 5)], 3)
    a, opt = train(ours, values, grads, **options)
    b, expected = train(stock, values, grads, **options)
    assert opt.param_groups[0].items() >= options.items()
    assert_trained_alike(opt, a, expected, b)


@every_name
@pytest.mark.parametrize("fused", [None, True])
def test_amp_support_is_not_advertised(name, fused, backend):
    """torch sets it for fused=True; frameworks then refuse to clip and misread skipped steps."""
    ours, stock = both(name)
    has_fused = "fused" in inspect.signature(stock.__init__).parameters
    options = {"fused": fused} if has_fused else {}
    values, grads = draw([(3,)], 1)
    _, opt = train(ours, values, grads, **options)
    _, saved = train(stock, values, grads, **options)
    opt.load_state_dict(saved.state_dict())
    for o in (opt, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert not hasattr(o, "_step_supports_amp_scaling")
