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
    RICHEST,
    RICHEST_OF,
    STATELESS,
    TABLES,
    Case,
    bits,
    gradient_like,
    leaf,
    richest,
    richest_of_every_class,
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

CUDA = Torch(lambda operator, overload, device: device in ("cuda", "cpu"), ("cuda",), ("cuda",))
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
    ("RMSprop", {}, {"counts_on_device": True, "device": "mps"}, Mode.ALONE),
    ("RMSprop", {}, {"dtype": torch.float16}, Mode.RULE),
    ("RMSprop", {"eps_inside_sqrt": True}, {}, Mode.RULE),
    ("RAdam", {}, {}, Mode.LOOP),
    ("RAdam", {}, {"device": "cpu"}, Mode.RULE),
    ("Lion", {}, {}, Mode.RULE),
]


def test_what_this_torch_has():
    assert modes.INSTALLED.has_kernel("_fused_adam_", "default", "cpu")
    assert not modes.INSTALLED.has_kernel("_fused_rmsprop_", "default", "cpu")
    assert not modes.INSTALLED.has_kernel("_fused_adam_", "lr_of_two", "cpu")


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


@richest_of_every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "more",
    [{}, {"l1": 0.1}, {"ema": 0.5}, {"maximize": True, "l1": 0.1}, {"max_grad_norm": 0.5}],
    ids=str,
)
def test_the_rule_over_lists_has_the_bits_of_the_rule(case, dtype, more, python):
    build = Case(case.name, {**case.options, **more}).ours
    with seam.only_by_the_rule():
        together = stepped(build, dtype=dtype)
    with seam.one_by_one():
        alone = stepped(build, dtype=dtype)
    assert snapshot(together) == snapshot(alone)


@richest_of_every_class
@pytest.mark.parametrize("part", [1, 100])
def test_the_rule_in_parts_on_a_device(case, part, python):
    build = Case(case.name, {**case.options, "l1": 0.1}).ours
    with seam.as_on_a_device(part):
        in_parts = stepped(build)
    with seam.one_by_one():
        alone = stepped(build)
    assert snapshot(in_parts) == snapshot(alone)


@richest_of_every_class
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


def _set(**options):
    return lambda opt, params: opt.param_groups[0].update(options)


def _state(key, change):
    """Replaces an entry of the state of one parameter, if there is one."""

    def replace(opt, params):
        state = opt.state.get(params[1], {})
        for name, value in [*state.items()]:
            if (name == "step") == (key == "step"):
                state[name] = change(value)

    return replace


def _change(name):
    def decorate(function):
        CHANGES[name] = function
        return function

    return decorate


def _grad(change):
    def replace(opt, params):
        params[1].grad = change(params[1].grad)

    return replace


def _data(change):
    def replace(opt, params):
        grad, params[1].grad = params[1].grad, None
        params[1].data = change(params[1].data)
        params[1].grad = change(grad) if params[1].dtype != grad.dtype else grad

    return replace


CHANGES = {
    "option": _set(lr=0.3),
    "option that is a string": _set(lr="0.3"),
    "option that is a tensor": _set(lr=torch.tensor(0.25)),
    "option that is two tensors": _set(weight_decay=torch.ones(2)),
    "penalty": _set(weight_decay=0.1),
    "penalty that torch lacks": _set(l1=0.1),
    "maximize": _set(maximize=True),
    "amsgrad": _set(amsgrad=True),
    "momentum": _set(momentum=0.5),
    "betas": _set(betas=(0.5, 1.0)),
    "capturable": _set(capturable=1),
    "differentiable": _set(differentiable=True),
    "ema": _set(ema=0.5),
    "state_dtype": _set(state_dtype=torch.bfloat16),
    "another number of parameters": lambda opt, params: opt.add_param_group(
        {"params": [leaf(torch.ones(3))]}
    ),
    "no parameter": lambda opt, params: opt.param_groups[0]["params"].pop(),
    "order": lambda opt, params: opt.param_groups[0]["params"].reverse(),
    "parameter listed twice": lambda opt, params: opt.param_groups[0]["params"].append(params[1]),
    "groups of another type": lambda opt, params: opt.param_groups.__setitem__(
        0, type("Group", (dict,), {})(opt.param_groups[0])
    ),
    "no state": lambda opt, params: opt.state.pop(params[1], None),
    "count": _state("step", lambda step: step + 3),
    "negative count in place": _state("step", torch.neg_),
    "count at the end in place": _state("step", lambda step: step.fill_(2.0**24)),
    "count in float64": _state("step", torch.Tensor.double),
    "negative count": _state("step", torch.neg),
    "count at the end": _state("step", lambda step: torch.full_like(step, 2.0**24)),
    "count that is no tensor": _state("step", float),
    "count of two numbers": _state("step", lambda step: step.expand(2)),
    "state of another dtype": _state("", torch.Tensor.double),
    "state of another shape": _state("", torch.Tensor.flatten),
    "state of other strides": _state("", lambda value: value.t().contiguous().t()),
    "negated state": _state("", lambda value: torch._neg_view(value)),
    "state without memory": _state("", lambda value: value.untyped_storage().resize_(4) and value),
    "sparse state": _state("", torch.Tensor.to_sparse),
    "compressed state": _state("", lambda value: value.to_sparse_csr() if value.dim() else value),
    "nested state": _state("", lambda value: torch.nested.nested_tensor([value, value])),
    "moved": _data(torch.clone),
    "of other strides": _data(lambda data: data.t().contiguous().t()),
    "with gaps": _data(lambda data: data.repeat_interleave(2, 1)[:, ::2]),
    "negated": _data(lambda data: torch._neg_view(data)),
    "in float64": _data(torch.Tensor.double),
    "without memory": lambda opt, params: params[1].untyped_storage().resize_(8),
    "not to be trained": lambda opt, params: params[1].requires_grad_(False),
    "no gradient": _grad(lambda grad: None),
    "gradient of other strides": _grad(lambda grad: grad.t().contiguous().t()),
    "expanded gradient": _grad(lambda grad: grad[:1].expand(4, 4)),
    "gradient of the next parameter": lambda opt, params: setattr(
        params[1], "grad", params[2].grad
    ),
    "sparse gradient": _grad(torch.Tensor.to_sparse),
    "negated gradient": _grad(lambda grad: torch._neg_view(grad)),
    "zero without memory": _grad(lambda grad: torch._efficientzerotensor(grad.shape)),
    "gradient without memory": lambda opt, params: params[1].grad.untyped_storage().resize_(8),
}


@_change("state of another class")
def _(opt, params):
    if params[1] in opt.state:
        opt.state[params[1]] = type("State", (dict,), {})(opt.state[params[1]])


@_change("gradient that is the parameter")
def _(opt, params):
    params[1].grad = params[1].detach()


@_change("gradient that is the next parameter")
def _(opt, params):
    params[1].grad = params[2].detach()


@_change("memory of the next parameter")
def _(opt, params):
    params[1].data = params[2].data


@pytest.mark.parametrize(
    ("case", "guards"),
    [*((case, True) for case in (*RICHEST, *STATELESS)), (RICHEST_OF["Adam"], False)],
    ids=str,
)
def test_a_step_sees_what_has_changed(case, guards, python, monkeypatch):
    """Whatever has happened since the last step, the next is the one that checks everything; also
    where torch's guards are not as they are known."""
    assert seam.forms.can_use_guards()
    monkeypatch.setattr(seam.forms, "can_use_guards", lambda: guards)

    def course(name, forget):
        torch.manual_seed(1)
        params = [leaf(torch.randn(4, 4)) for _ in range(4)]
        opt = case.ours([{"params": params[:3]}, {"params": params[3:]}])

        def step():
            for p in params:
                p.grad = gradient_like(p.detach())

        for _ in range(4):
            step()
            opt.step()
        assert seam.is_settled(opt)
        step()
        CHANGES[name](opt, params)
        found = []
        for _ in range(3):
            if forget:
                seam.forget_what_was_checked(opt)
            try:
                opt.step()
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")
            found.append(bits_of_all(opt, params))
        return found

    for name in CHANGES:
        assert (name, course(name, False)) == (name, course(name, True))


def bits_of_all(opt, params) -> list:
    """Of what has all its memory."""
    states = [opt.state.get(p) or {} for p in params]
    found = []
    for value in [*params, *(v for state in states for v in state.values())]:
        if isinstance(value, torch.Tensor) and value.is_nested:
            value = "nested"
        elif isinstance(value, torch.Tensor):
            dense = value.detach().to_dense()
            is_whole = dense.untyped_storage().nbytes() >= dense.numel() * dense.element_size()
            value = bits(dense) if is_whole else "not whole"
        found.append(value)
    return found


def test_another_torch_that_does_not_wait(python, monkeypatch):
    """An implementation that does not compute all over lists is not used for large parameters."""
    from torch.optim import rmsprop

    monkeypatch.setattr(rmsprop, "_multi_tensor_rmsprop", rmsprop._single_tensor_rmsprop)
    case, shapes = RICHEST_OF["RMSprop"], [(300, 300), (3, 5000)]
    ours = stepped(case.ours, shapes)
    with seam.only_by_the_rule():
        assert snapshot(stepped(case.ours, shapes)) == snapshot(ours)


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
        for device in ("xpu", "xpu", "mps"):
            seam.warn_of_missing_kernels(device)
    seam.forget_missing_kernels()
    assert [("xpu" in str(w.message), "mps" in str(w.message)) for w in caught] == [
        (True, False),
        (False, True),
    ]
    assert all("no kernels" in str(w.message) and "info" in str(w.message) for w in caught)


def test_info_has_a_line_for_each_device(monkeypatch):
    from fusedopt import info

    devices = [torch.device("cpu"), torch.device("mps", 0), torch.device("xpu", 1)]
    monkeypatch.setattr(info, "_devices", lambda: devices)
    lines = dict(line.split(":  ", 1) for line in info.report().splitlines() if ":  " in line)
    for device in devices:
        assert seam.missing_kernels(device) in lines[str(device)]
        assert lines[str(device)].strip().startswith("native") != bool(seam.missing_kernels(device))
