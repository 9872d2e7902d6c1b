"""Swapping ``torch.optim.`` for ``fusedopt.`` changes nothing that a program can see."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings

import pytest
import seam
import torch
from cases import (
    CASES,
    EXTRAS,
    NAMES,
    RICHEST_OF,
    TABLES,
    Case,
    assert_near,
    assert_trained_alike,
    bits,
    draw,
    every_name,
    every_torch_name,
    gradient_like,
    leaf,
    richest,
    richest_by_options,
    snapshot,
    step_through,
    train,
)
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fusedopt

PLAIN = [case for case in CASES if not set(case.options) & set(EXTRAS)]


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


# Construction ---------------------------------------------------------------------------------


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


# What can be inspected ------------------------------------------------------------------------


@pytest.mark.parametrize("case", PLAIN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_groups_and_state_look_like_stock(case, dtype, backend):
    values = [torch.randn(4, 3, 2, 5).to(dtype), torch.randn(()).to(dtype), torch.randn(3)]
    values[0] = values[0].to(memory_format=torch.channels_last)
    grads = [[gradient_like(values[0]), None, torch.randn(3)]] * 3
    _, ours = train(case.ours, values, grads)
    _, stock = train(case.stock, values, grads, foreach=None)
    assert ours.defaults == stock.defaults
    assert list(ours.defaults) == list(stock.defaults)
    assert repr(ours) == repr(stock)
    for group, expected in zip(ours.param_groups, stock.param_groups, strict=True):
        assert list(group) == list(expected)
        assert {**group, "params": 0} == {**expected, "params": 0}
    saved, expected = ours.state_dict(), stock.state_dict()
    assert saved.keys() == expected.keys()
    assert saved["param_groups"] == expected["param_groups"]
    assert saved["state"].keys() == expected["state"].keys()
    for i, state in expected["state"].items():
        assert saved["state"][i].keys() == state.keys()
        for key, value in state.items():
            mine = saved["state"][i][key]
            assert (mine.dtype, mine.shape, mine.device) == (value.dtype, value.shape, value.device)
            assert mine.stride() == value.stride(), key
            assert mine.requires_grad == value.requires_grad and mine.is_leaf


@richest
def test_state_before_the_first_step(case):
    params = [leaf(torch.ones(2)), leaf(torch.ones(2, dtype=torch.complex64))]
    more = {"initial_accumulator_value": 0.25} if case.table.makes_state_at_once else {}
    ours, stock = case.ours(params, **more), case.stock(params, **more)
    assert len(ours.state) == len(stock.state)
    for p in params if stock.state else []:
        assert [*map(bits, ours.state[p].values())] == [*map(bits, stock.state[p].values())]


@richest
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_state_of_parameters_that_came_later(case, dtype, backend):
    """By add_param_group; Adagrad makes the state of these in step(), not in the constructor."""
    more = {"initial_accumulator_value": 0.25} if case.table.makes_state_at_once else {}
    runs = []
    values = [torch.randn(5).to(dtype) for _ in range(2)]
    grads = [[gradient_like(v) for v in values] for _ in range(3)]
    for build in (case.ours, case.stock):
        params = [leaf(v) for v in values]
        opt = build(params[:1], **more)
        step_through(opt, params[:1], [now[:1] for now in grads[:1]])
        opt.add_param_group({"params": params[1:]})
        assert len(opt.state) == 1
        step_through(opt, params, grads[1:])
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1])


@richest
def test_default_dtype_float64(case, backend):
    torch.set_default_dtype(torch.float64)
    try:
        values, grads = draw([(3,)], 2)
        (p,), ours = train(case.ours, values, grads)
        (q,), stock = train(case.stock, values, grads)
        assert {k: v.dtype for k, v in ours.state[p].items()} == {
            k: v.dtype for k, v in stock.state[q].items()
        }
        assert_near(p, q)
    finally:
        torch.set_default_dtype(torch.float32)


# Methods --------------------------------------------------------------------------------------


@richest
def test_closure(case, backend):
    runs = []
    for build in (case.ours, case.stock):
        p = leaf(torch.linspace(1, 2, 5))
        opt, losses = build([p]), []

        def closure(opt=opt, p=p):
            assert torch.is_grad_enabled()
            opt.zero_grad()
            loss = (p**3).sum()
            loss.backward()
            return loss

        with torch.no_grad():
            for _ in range(4):
                losses.append(opt.step(closure).item())
        assert opt.step() is None
        runs.append((losses, p))
    torch.testing.assert_close(*(losses for losses, _ in runs), rtol=1e-4, atol=1e-4)
    assert_near(runs[0][1], runs[1][1])


@richest
def test_a_closure_that_raises_changes_nothing(case, backend):
    (_,), opt = train(case.ours, *draw([(5,)], 2))
    before = snapshot(opt)

    def closure():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        opt.step(closure)
    assert snapshot(opt) == before


@richest
def test_step_hooks(case, backend):
    param = leaf(torch.ones(3))
    opt, calls = case.ours([param]), []
    handles = [
        opt.register_step_pre_hook(lambda o, a, k: calls.append(("pre", o is opt, a[1:], k))),
        opt.register_step_post_hook(lambda o, a, k: calls.append(("post", o is opt, a[1:], k))),
        register_optimizer_step_pre_hook(lambda o, a, k: calls.append(("global pre",))),
        register_optimizer_step_post_hook(lambda o, a, k: calls.append(("global post",))),
    ]
    try:
        opt.step()
        assert [c[0] for c in calls] == ["global pre", "pre", "post", "global post"] or [
            c[0] for c in calls
        ] == ["pre", "global pre", "post", "global post"]
        assert [c[1:] for c in calls if c[0] in ("pre", "post")] == [(True, (), {})] * 2
    finally:
        for handle in handles:
            handle.remove()
    calls.clear()
    opt.step()
    assert not calls


@richest
def test_a_pre_hook_may_replace_gradients(case, backend):
    values, grads = draw([(33,)], 3)
    runs = []
    for build in (case.ours, case.stock):
        params = [leaf(v) for v in values]
        opt = build(params)

        def clip(o, args, kwargs, params=params):
            for p in params:
                p.grad = p.grad.clamp(-1, 1)

        opt.register_step_pre_hook(clip)
        step_through(opt, params, grads)
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1])


@richest
def test_state_dict_and_load_hooks(case, backend):
    logs, results = [], []
    for build in (case.ours, case.stock):
        _, opt = train(build, *draw([(3,)], 2))
        log = []
        opt.register_state_dict_pre_hook(lambda o, log=log: log.append("pre"))
        opt.register_state_dict_post_hook(
            lambda o, d, log=log: log.append("post") or {**d, "extra": 1}
        )
        opt.register_load_state_dict_pre_hook(
            lambda o, d, log=log: (
                log.append("load pre")
                or {**d, "param_groups": [{**d["param_groups"][0], "lr": 0.625}]}
            )
        )
        opt.register_load_state_dict_post_hook(lambda o, log=log: log.append("load post"))
        saved = opt.state_dict()
        assert saved["extra"] == 1
        opt.load_state_dict(saved)
        logs.append(log)
        results.append(opt.param_groups[0]["lr"])
    assert logs[0] == logs[1] == ["pre", "post", "load pre", "load post"]
    assert results == [0.625, 0.625]


@richest
def test_named_parameters(case, backend):
    runs = []
    for build in (case.ours, case.stock):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        opt = build(model.named_parameters())
        opt.add_param_group({"params": [("extra", leaf(torch.ones(2)))]})
        for _ in range(2):
            opt.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            opt.step()
        runs.append((opt, [*model.parameters()]))
    saved = [opt.state_dict()["param_groups"] for opt, _ in runs]
    assert [g["param_names"] for g in saved[0]] == [["weight", "bias"], ["extra"]]
    assert [g["param_names"] for g in saved[0]] == [g["param_names"] for g in saved[1]]
    assert [list(g) for g in saved[0]] == [list(g) for g in saved[1]]
    assert_trained_alike(*runs[0], *runs[1])


@richest
def test_add_param_group(case):
    ours, stock = (build([leaf(torch.ones(1))]) for build in (case.ours, case.stock))
    twice = ours.param_groups[0]["params"][0]
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        ours.add_param_group({"params": twice})
    with pytest.raises(TypeError, match=r"param_group must be a dict|param group must be a dict"):
        ours.add_param_group([twice])
    for opt in (ours, stock):
        opt.add_param_group({"params": leaf(torch.ones(2)), "lr": 0.5})
    assert [list(g) for g in ours.param_groups] == [list(g) for g in stock.param_groups]
    assert ours.param_groups[1]["lr"] == 0.5


@richest
def test_zero_grad(case, backend):
    (p,), opt = train(case.ours, *draw([(5,)], 1))
    opt.zero_grad(set_to_none=False)
    assert p.grad is not None and not p.grad.any()
    opt.step()
    opt.zero_grad()
    assert p.grad is None
    opt.step()


@richest
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["deepcopy", "pickle"],
)
def test_copies_go_on_alone(case, duplicate, backend):
    values, grads = draw([(5,), (3, 4)], 4)
    params, opt = train(case.ours, values, grads[:2])
    twin_params, twin = duplicate((params, opt))
    assert type(twin) is type(opt) and snapshot(twin) == snapshot(opt)
    before = snapshot(opt)
    step_through(twin, twin_params, grads[2:])
    assert snapshot(opt) == before
    step_through(opt, params, grads[2:])
    assert snapshot(twin) == snapshot(opt)
    assert repr(twin) == repr(opt)


def test_torch_save_of_the_whole_optimizer(backend):
    _, opt = train(fusedopt.Adam, *draw([(5,)], 2))
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    assert snapshot(torch.load(file, weights_only=False)) == snapshot(opt)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"ema": 0.9}, torch.float32),
        ({"state_dtype": "8bit"}, torch.float32),
        ({"state_dtype": torch.float32, "initial_accumulator_value": 0.1}, torch.bfloat16),
        ({"master_weights": "split", "ema": 0.9}, torch.bfloat16),
        ({"master_weights": "fp32"}, torch.float16),
        ({"rounding": "stochastic"}, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [0, 1])
def test_adagrad_share_memory(options, dtype, steps, backend):
    """All that is kept for a parameter is shared, but the count, also before the first step; and no
    bit is another than without."""
    values, grads = draw([(70, 71), (5,)], 3, dtype)
    runs = []
    for shares in (False, True):
        torch.manual_seed(0)
        params, opt = train(fusedopt.Adagrad, values, grads[:steps], lr=0.1, **options)
        if shares:
            opt.share_memory()
            keys = [[*opt.state[p]] for p in params]
            opt.share_memory()
            assert keys == [[*opt.state[p]] for p in params]
        step_through(opt, params, grads[steps:])
        runs.append((snapshot(opt), [opt.state[p] for p in params]))
    assert runs[0][0] == runs[1][0]
    for before, state in zip(*(states for _, states in runs), strict=True):
        assert before.keys() == state.keys()
        assert {key for key, value in state.items() if not value.is_shared()} == {"step"}


@pytest.mark.parametrize("change", [{"ema": 2.0}, {"lr": "fast"}, {"master_weights": "split"}])
def test_adagrad_share_memory_with_wrong_options(change, backend):
    params = [leaf(torch.ones(5, dtype=torch.float16)) for _ in range(2)]
    opt = fusedopt.Adagrad([{"params": [p]} for p in params], ema=0.9)
    opt.param_groups[1].update(change)
    with pytest.raises((TypeError, ValueError), match=r"param group 1"):
        opt.share_memory()
    assert not opt.state


@every_name
def test_a_user_subclass(name, backend):
    class Mine(getattr(fusedopt, name)):
        def step(self, closure=None):
            self.seen = True
            return super().step(closure)

    values, grads = draw([(5,)], 2)
    (p,), opt = train(Mine, values, grads, lr=0.1)
    (q,), _ = train(getattr(fusedopt, name), values, grads, lr=0.1)
    assert opt.seen and bits(p) == bits(q)


# With the rest of torch -----------------------------------------------------------------------


@richest
def test_grad_scaler(case, backend):
    """Scales, skips the step with an overflow, and goes on as stock does."""
    runs = []
    for build in (case.ours, case.stock):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        opt = build(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        for at in range(5):
            opt.zero_grad()
            loss = model(torch.ones(2, 4) + at).square().sum()
            scaler.scale(loss).backward()
            if at == 2:
                model.weight.grad[0, 0] = float("inf")
                before = snapshot(opt)
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            scaler.step(opt)
            scaler.update()
            if at == 2:
                assert snapshot(opt) == before
        runs.append((scaler.get_scale(), opt, [*model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert_trained_alike(*runs[0][1:], *runs[1][1:])


SCHEDULERS = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, step_size_up=3),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (epoch + 1)),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [5]
    ),
}


@richest
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=list(SCHEDULERS))
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_schedulers(case, scheduler, lr, backend):
    case = Case(case.name, {**case.options, "lr": lr})
    values, grads = draw([(33,), (2, 3)], 20)
    runs, seen = [], []
    for build in (case.ours, case.stock):
        params = [leaf(v) for v in values]
        opt = build(params)
        try:
            schedule = scheduler(opt)
        except ValueError as error:
            assert "momentum" in str(error)  # Adagrad has none to cycle
            seen.append(str(error))
            continue
        log = []
        for now in grads:
            step_through(opt, params, [now])
            schedule.step()
            group = opt.param_groups[0]
            log.append([float(group["lr"]), group.get("betas"), group.get("momentum")])
        runs.append((opt, params))
        seen.append(log)
    assert seen[0] == seen[1]
    if runs:
        assert_trained_alike(*runs[0], *runs[1])


NUMERIC = [
    case
    for case in CASES
    if not any(isinstance(v, (torch.Tensor, tuple)) for v in case.options.values())
]


def _one_step(build, p, grad, *state):
    """The tensors after a step that starts in a given state."""
    p = p.clone()
    opt = build([p], differentiable=True)
    p.grad = grad.clone()
    table = TABLES[type(opt).__name__]
    names = [*table.slots]
    if state:
        opt.state[p] = {k: v.clone() for k, v in zip(names, state, strict=True)}
        if table.counts_steps:
            opt.state[p]["step"] = torch.tensor(3.0)
    opt.step()
    return (p, *(opt.state[p][name] for name in names[: len(state)]))


@richest_by_options
def test_differentiable_step_has_the_gradients_of_stock(case, backend):
    """With respect to the parameter, the gradient and each state tensor."""
    start = [torch.rand(6, dtype=torch.float64) for _ in range(2 + len(case.table.slots))]
    results = []
    for build in (case.ours, case.stock):
        inputs = [t.clone().requires_grad_() for t in start]
        outputs = _one_step(build, *inputs)
        loss = sum((i + 1) * out.square().sum() for i, out in enumerate(outputs))
        results.append(torch.autograd.grad(loss, inputs))
    for ours, stock in zip(*results, strict=True):
        assert_near(ours, stock, dtype=torch.float32)


def test_differentiable_first_step_of_momentum(backend):
    """Stock's first momentum buffer is a constant; so is ours."""
    start = [torch.rand(6, dtype=torch.float64) for _ in range(2)]
    results = []
    for build in (RICHEST_OF["SGD"].ours, RICHEST_OF["SGD"].stock):
        inputs = [t.clone().requires_grad_() for t in start]
        (p,) = _one_step(build, *inputs)
        results.append(torch.autograd.grad(p.square().sum(), inputs))
    for ours, stock in zip(*results, strict=True):
        assert_near(ours, stock, dtype=torch.float32)


@pytest.mark.parametrize("case", [c for c in NUMERIC if "momentum" not in c.options], ids=str)
def test_differentiable_through_two_steps(case, backend):
    """Against finite differences. Stock cannot do this for every option."""

    def train(x, slopes, lr):
        p = x.clone()
        opt = case.ours([p], differentiable=True, lr=lr)
        for slope in slopes:
            p.grad = slope.clone()
            opt.step()
        return p

    x = torch.rand(3, dtype=torch.float64) + 1
    slopes = torch.rand(2, 3, dtype=torch.float64) + 2
    inputs = [x, slopes, torch.tensor(0.1, dtype=torch.float64)]
    assert torch.autograd.gradcheck(train, [t.requires_grad_() for t in inputs], atol=1e-4)


@every_name
def test_inference_and_no_grad_modes(name, backend):
    cls = getattr(fusedopt, name)
    values, grads = draw([(5,)], 3)
    expected, _ = train(cls, values, grads, lr=0.1)
    params = [leaf(v) for v in values]
    opt = cls(params, lr=0.1)
    for now, mode in zip(grads, (torch.no_grad, torch.enable_grad, torch.no_grad), strict=True):
        with mode():
            step_through(opt, params, [now])
    assert bits(params[0]) == bits(expected[0])
    assert params[0].requires_grad and params[0].is_leaf


def test_a_model_learns(backend):
    torch.manual_seed(0)
    inputs, weights = torch.randn(64, 5), torch.randn(5, 1)
    for name in NAMES:
        model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))
        opt = getattr(fusedopt, name)(model.parameters(), lr=0.02)
        losses = []
        for _ in range(60):
            opt.zero_grad()
            loss = (model(inputs) - inputs @ weights).square().mean()
            loss.backward()
            opt.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0], name


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_group_without_parameters(case, place, backend):
    values, grads = draw([(3,), (4, 5)], 3)
    params = [leaf(v) for v in values]
    groups = [{"params": params}]
    groups.insert(place, {"params": []})
    opt = case.ours(groups)
    step_through(opt, params, grads)
    exact, oracle = train(case.stock, values, grads)
    assert_trained_alike(opt, params, oracle, exact)
