"""The methods of an optimizer, its hooks, copies and subclasses, as of torch.optim."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import (
    assert_near,
    assert_trained_alike,
    bits,
    draw,
    every_name,
    leaf,
    richest,
    snapshot,
    step_through,
    train,
)
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fusedopt


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
