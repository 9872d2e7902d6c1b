"""All of it together, and with clipping, scaling, the backward and exports."""

from __future__ import annotations

import copy
import io
from unittest import mock

import pytest
import seam
import torch
from cases import (
    TABLES,
    assert_near,
    bits,
    draw,
    every_case,
    every_loop,
    every_torch_name,
    leaf,
    richest,
    snapshot,
    step_through,
    train,
)
from conftest import SEED
from stored import (
    BF16,
    F16,
    F32,
    INF,
    KINDS,
    SIZES,
    WAYS,
    assert_bits,
    assert_same_outcome,
    every_kind,
    every_way,
    numbers,
    value_of,
)
from torch import nn

import fusedopt

# Bit for bit the same as without options, which torch would compute.
pytestmark = pytest.mark.usefixtures("only_by_the_rule")


@every_loop
@every_way
def test_the_kernels_store_the_bits_of_the_cpu(case, way, dtype, kernels):
    """With clipping, a loss scale, a skipped step, late gradients; also counting on the device."""
    values, grads = draw([*SIZES, (16_385,)], 4, dtype)
    grads[0][4] = grads[0][6] = grads[1][1] = None
    ends = []
    for module, capturable in ((fusedopt.backend.native, False), (kernels, False), (kernels, True)):
        torch.manual_seed(SEED)
        with mock.patch.object(fusedopt.backend, "native", module):
            params = [leaf(v) for v in values]
            more = {"capturable": True} if capturable else {}
            opt = case.ours(params, max_grad_norm=40.0, amp_fused=True, **more, **WAYS[way][0])
            opt.grad_scale = torch.tensor(2.0)
            for at, now in enumerate(grads):
                opt.found_inf = torch.tensor(float(at == 2))
                step_through(opt, params, [now])
        ends.append(opt)
    assert_same_outcome(ends[1], ends[0])
    assert_same_outcome(ends[2], ends[0])


@richest
@every_kind
def test_no_step_takes_the_python_rule(case, way, dtype, kernels):
    """Of dense parameters: all of them go in the one call."""
    for module in (fusedopt.backend.native, kernels):
        with mock.patch.object(fusedopt.backend, "native", module):
            values, grads = draw(SIZES, 3, dtype)
            params = [leaf(v) for v in values]
            opt = case.ours(params, **WAYS[way][0])
            with seam.no_python_steps(opt):
                step_through(opt, params, grads)
            assert seam.has_plan(opt)
            launches = kernels.num_launches()
            opt.step()
            # One for what is stored as it is, and one for the rest.
            assert kernels.num_launches() - launches <= 2 * (module is kernels)


@every_case
@pytest.mark.parametrize(("kind", "dtype"), [("split", BF16), ("fp32", F16)], ids=str)
def test_clipping(case, kind, dtype, backend):
    """With masters it is that of a float32 copy, bit for bit."""
    values, grads = draw([(33,), (67, 65)], 3, dtype)
    wide = [[g.float() for g in now] for now in grads]
    copies, plain = train(case.ours, [v.float() for v in values], wide, max_grad_norm=50.0)
    options = {"master_weights": kind, "state_dtype": F32}
    params, opt = train(case.ours, values, grads, max_grad_norm=50.0, **options)
    assert plain.grad_norm > 50
    assert bits(opt.grad_norm) == bits(plain.grad_norm)
    for p, q in zip(params, copies, strict=True):
        assert_bits(value_of(p, opt.state.get(p, {})), q.detach())


@richest
@every_kind
def test_a_skipped_step_moves_nothing(case, way, dtype, backend):
    """No codes, masters, averages, and no random bits are used up."""
    values, grads = draw([(5,), (67, 65)], 4, dtype)
    params = [leaf(v) for v in values]
    opt = case.ours(params, amp_fused=True, **WAYS[way][0])
    opt.found_inf = torch.tensor(1.0)
    first = [bits(p) for p in params]
    step_through(opt, params, grads[:1])
    assert [bits(p) for p in params] == first
    for now in grads:
        opt.found_inf = torch.tensor(0.0)
        step_through(opt, params, [now])
        before = snapshot(opt)
        opt.found_inf = torch.tensor(1.0)
        opt.grad_scale = torch.tensor(4.0)
        step_through(opt, params, [[g * INF for g in now]])
        assert snapshot(opt) == before
        opt.grad_scale = None
    if "stochastic" not in way:
        _, plain = train(case.ours, values, grads, **WAYS[way][0])
        assert_same_outcome(opt, plain)


@richest
@pytest.mark.parametrize(
    ("way", "dtype", "fused"),
    [*((way, dtype, True) for way, dtype in KINDS), ("split, 8bit, ema", BF16, False)],
    ids=str,
)
def test_grad_scaler(case, way, dtype, fused, backend):
    """A scale that is a power of two changes no bit, except of float16 gradients, for whose sake
    there are scales."""
    runs = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2), None):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(65, 67), nn.Tanh(), nn.Linear(67, 2)).to(dtype)
        more = {"amp_fused": fused} if scaler else {}
        opt = case.ours(model.parameters(), **more, **WAYS[way][0])
        torch.manual_seed(5)
        for at in range(5):
            opt.zero_grad()
            loss = model(torch.randn(4, 65).to(dtype)).float().square().mean()
            if scaler is None:
                loss.backward()
                if at != 2:
                    opt.step()
                continue
            scaler.scale(loss).backward()
            if at == 2:
                model[0].weight.grad[0, 0] = INF
            scaler.step(opt)
            scaler.update()
        runs.append(opt)
    if dtype != F16:
        assert_same_outcome(*runs)
    for p, q in zip(*(opt.param_groups[0]["params"] for opt in runs), strict=True):
        assert_near(p, q)


@richest
@every_kind
def test_attached_to_the_backward(case, way, dtype, backend):
    """As an ordinary step after it."""
    runs = []
    for attach in (False, True):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(65, 67), nn.Tanh(), nn.Linear(67, 2)).to(dtype)
        build = getattr(fusedopt, case.name)
        options = {**copy.deepcopy(case.options), **WAYS[way][0]}
        if attach:
            opt = fusedopt.attach(model, build, **options)
        else:
            opt = build(model.parameters(), **options)
        for at in range(3):
            torch.manual_seed(at)
            model(torch.randn(4, 65).to(dtype)).float().square().mean().backward()
            opt.step()
            opt.zero_grad()
        runs.append(opt)
    if "stochastic" in way:  # seeds are drawn in the order of the backward
        counts = [opt.state[p]["rounding_state"][1] for p in model.parameters()]
        assert counts == [3] * len(counts)
    else:
        assert_same_outcome(runs[1], runs[0])


def test_a_backward_within_a_swap(backend):
    model = nn.Linear(3, 3)
    opt = fusedopt.attach(model, fusedopt.SGD, lr=0.1, ema=0.5)
    model(torch.ones(1, 3)).sum().backward()
    before = snapshot(opt)
    with opt.swap_ema(), pytest.raises(RuntimeError, match="swap_ema"):
        model(torch.ones(1, 3)).sum().backward()
    assert snapshot(opt) == before


@every_torch_name
def test_options_that_torch_does_not_have(name, backend):
    for way, dtype in KINDS:
        _, opt = train(getattr(fusedopt, name), *draw([(5,)], 1, dtype), **WAYS[way][0])
        before = snapshot(opt)
        with pytest.raises(ValueError) as caught:
            fusedopt.to_torch(opt)
        assert all(option in str(caught.value) for option in WAYS[way][0])
        assert snapshot(opt) == before and type(opt) is getattr(fusedopt, name)
    values, grads = draw([(67, 65)], 3)
    (p,), stock = train(TABLES[name].stock, values, grads[:1])
    opt = fusedopt.from_torch(stock)
    opt.param_groups[0].update(ema=0.5, state_dtype="8bit")
    step_through(opt, [p], grads[1:])
    assert "ema" in opt.state[p]


@richest
@every_kind
def test_an_export_for_stock_torch(case, way, dtype, backend):
    """It loads there, has what torch's own has and nothing else, and training goes on."""
    values, grads = draw([(5,), (67, 65), (3,)], 4, dtype)
    for now in grads:
        now[2] = None
    params, opt = train(case.ours, values, grads[:2], **WAYS[way][0])
    before = snapshot(opt)
    file = io.BytesIO()
    torch.save(opt.state_dict(stock=True), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert snapshot(opt) == before
    copies = [leaf(p) for p in params]
    stock = case.stock(copies)
    _, trained = train(case.stock, values, grads[:2])
    theirs = trained.state_dict()
    assert [g.keys() for g in saved["param_groups"]] == [g.keys() for g in theirs["param_groups"]]
    assert saved["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        assert saved["state"][key].keys() == state.keys()
        assert all(saved["state"][key][k].shape == v.shape for k, v in state.items())
        assert all(v.is_floating_point() for v in saved["state"][key].values())
    stock.load_state_dict(saved)
    for p, q in zip(params, copies, strict=True):
        for key, value in numbers(opt.state.get(p, {})).items():
            assert_bits(stock.state[q][key], value.to(dtype), key)
    step_through(stock, copies, grads[2:])
    assert bits(copies[1]) != bits(params[1])
    assert all(q.isfinite().all() for q in copies)
    stock_again = case.ours([leaf(p) for p in params])
    stock_again.load_state_dict(saved)
    step_through(stock_again, stock_again.param_groups[0]["params"], grads[2:])
