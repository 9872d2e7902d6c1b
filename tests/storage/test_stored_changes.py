"""Stored values between steps that move, come late, are many, or are stepped elsewhere."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from cases import (
    RICHEST_OF,
    Case,
    bits,
    draw,
    every_name,
    gradient_like,
    leaf,
    richest,
    snapshot,
    step_through,
    train,
)
from stored import (
    BF16,
    F32,
    F64,
    KINDS,
    WAYS,
    assert_bits,
    assert_same_outcome,
    every_kind,
    nearest_away,
    outcome,
    step_and_check,
)

import fusedopt

# Bit for bit the same as without options, which torch would compute.
pytestmark = pytest.mark.usefixtures("only_by_the_rule")


def _replace(opt, state):
    for key, value in state.items():
        state[key] = value.clone()


def _swap_data(opt, state):
    for value in state.values():
        value.data = value.data.clone()


def _move_to_a_shared_buffer(opt, state):
    """Misaligned, next to each other."""
    for key, value in state.items():
        buffer = torch.zeros(value.numel() + 3, dtype=value.dtype)
        state[key] = buffer[1:-2].view(value.shape).copy_(value)


def _reorder(opt, state):
    for key in sorted(state):
        state[key] = state.pop(key)


@richest
@every_kind
@pytest.mark.parametrize(
    "change", [_replace, _swap_data, _move_to_a_shared_buffer, _reorder], ids=lambda f: f.__name__
)
def test_state_that_moves_between_steps(case, way, dtype, change, backend):
    values, grads = draw([(33,), (67, 65)], 4, dtype)
    params, opt = train(case.ours, values, grads[:2], **WAYS[way][0])
    twin = copy.deepcopy(opt)
    for p in params:
        change(opt, opt.state[p])
    step_through(opt, params, grads[2:])
    step_through(twin, twin.param_groups[0]["params"], grads[2:])
    for p, q in zip(params, twin.param_groups[0]["params"], strict=True):
        assert_bits(p, q)
        for key, value in twin.state[q].items():
            assert_bits(opt.state[p][key], value, key)


@richest
@every_kind
def test_autograd_hears_of_every_tensor_that_is_written(case, way, dtype, backend):
    params, opt = train(case.ours, *draw([(33,), (67, 65)], 2, dtype), **WAYS[way][0])
    versions = [{k: v._version for k, v in state.items()} for state in outcome(opt)]
    grads = [(bits(p.grad), p.grad._version) for p in params]
    opt.step()
    for before, state in zip(versions, outcome(opt), strict=True):
        assert all(value._version > before[key] for key, value in state.items())
    assert grads == [(bits(p.grad), p.grad._version) for p in params]


@pytest.mark.parametrize(
    "case", [RICHEST_OF["SGD"], RICHEST_OF["Adam"]], ids=lambda case: case.name
)
@every_kind
def test_flags_of_torch_change_nothing(case, way, dtype, backend):
    values, grads = draw([(5,), (67, 65)], 3, dtype)
    ends = []
    for flags in ({}, {"foreach": True}, {"foreach": False}, {"fused": True}):
        torch.manual_seed(1)
        ends.append(train(case.ours, values, grads, **flags, **WAYS[way][0])[1])
    for opt in ends[1:]:
        assert_same_outcome(opt, ends[0])


@richest
@every_kind
def test_groups_and_gradients_that_come_late(case, way, dtype, backend):
    """Each begins at its own first step."""
    options = WAYS[way][0]
    values, grads = draw([(33,), (67, 65), (4100,)], 4, dtype)
    params = [leaf(v) for v in values]
    opt = case.ours([{"params": params[:2]}], **options)
    for at, now in enumerate(grads):
        if at == 2:
            opt.add_param_group({"params": params[2:]})
        for p, g in zip(params, now, strict=True):
            p.grad = g.clone()
        params[1].grad = params[1].grad if at else None
        opt.step()
    assert opt.param_groups[1].keys() == opt.param_groups[0].keys()
    for i, late in ((1, 1), (2, 2)):
        if "rounding" in options:
            assert opt.state[params[i]]["rounding_state"][1] == 4 - late
            continue
        (alone,), other = train(
            case.ours, values[i : i + 1], [now[i : i + 1] for now in grads[late:]], **options
        )
        assert_bits(params[i], alone)
        for key, value in other.state[alone].items():
            assert_bits(opt.state[params[i]][key], value, key)


@pytest.mark.parametrize("way", ["split", "master", "stochastic", "ema"])
def test_a_late_first_gradient_under_sgd_without_momentum(way, backend):
    """The rule keeps no state, the way to store does."""
    values, grads = draw([(33,), (65,)], 4, BF16)
    for now in grads[:2]:
        now[1] = None
    case = Case("SGD", {"lr": 0.1})
    params = [leaf(v) for v in values]
    opt = case.ours(params, **WAYS[way][0])
    for now in grads:
        step_and_check(case, opt, params, now)
    assert len(opt.state[params[1]]) == 1


@every_name
def test_sparse_gradients_are_an_error(name, backend):
    for way, dtype in KINDS:
        p, q = leaf(torch.ones(6, 4, dtype=dtype)), leaf(torch.ones(9, dtype=dtype))
        opt = getattr(fusedopt, name)([q, p], lr=0.1, **WAYS[way][0])
        for dense in (True, False):
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
            if not dense:
                p.grad = torch.sparse_coo_tensor([[0, 3]], torch.ones(2, 4, dtype=dtype), (6, 4))
            before = snapshot(opt)
            if dense:
                opt.step()
                continue
            with pytest.raises(RuntimeError, match="sparse"):
                opt.step()
            assert snapshot(opt) == before


@richest
def test_several_dtypes_in_one_group(case, backend):
    dtypes = [F32, BF16, F64, BF16, torch.complex64, F32, BF16]
    values = [torch.randn(67, 65, dtype=torch.complex128).to(d) for d in dtypes]
    grads = [[gradient_like(v, scale=1.0) for v in values] for _ in range(3)]
    options = {"state_dtype": "8bit", "master_weights": "split", "ema": 0.9}
    params, opt = train(case.ours, values, grads, **options)
    for i, p in enumerate(params):
        (alone,), other = train(
            case.ours, values[i : i + 1], [now[i : i + 1] for now in grads], **options
        )
        assert_bits(p, alone)
        for key, value in other.state[alone].items():
            assert_bits(opt.state[p][key], value, key)


@richest
def test_duplicates_and_overlaps(case, backend):
    """A parameter listed twice is updated twice, and views of one memory one after the other."""
    values, grads = draw([(67, 65)], 2)
    with pytest.warns(UserWarning, match="duplicate"):
        p = leaf(values[0])
        opt = case.ours([p, p], ema=0.5, state_dtype="8bit")
    step_through(opt, [p], grads)
    if "step" in opt.state[p]:
        assert opt.state[p]["step"] == 4
    base = torch.randn(6000).bfloat16()
    params = [base[:4500].detach().requires_grad_(), base[1500:].detach().requires_grad_()]
    opt = case.ours(params, rounding="stochastic", state_dtype="8bit", ema=0.5)
    step_through(opt, params, [[torch.ones(4500).bfloat16()] * 2] * 2)
    assert all(opt.state[p]["rounding_state"][1] == 2 for p in params)
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize(
    ("number", "capturable"),
    [(n, False) for n in (312, 313, 314, 700)] + [(n, True) for n in (289, 290, 291, 700)],
)
def test_more_tensors_than_a_launch_takes(number, capturable, kernels):
    """Eleven pointers of each go with the launch, or twelve, which has 32 KB for them."""
    values, grads = draw([(3,)] * number, 2, BF16)
    options = {"master_weights": "split", "ema": 0.5, "state_dtype": F32}
    _, plain = train(fusedopt.Adam, values, grads, **options)
    with mock.patch.object(fusedopt.backend, "native", kernels):
        params, opt = train(fusedopt.Adam, values, grads[:1], capturable=capturable, **options)
        launches = kernels.num_launches()
        step_through(opt, params, grads[1:])
        taken = kernels.num_launches() - launches
    assert_same_outcome(opt, plain)
    assert taken == 3 if number == 700 else taken in (1, 2)


def test_ten_thousand_small_tensors(backend):
    number = 10_000 if backend != "python" else 1000
    base = torch.randn(number, 3).bfloat16()
    params = [row.clone().requires_grad_() for row in base]
    opt = fusedopt.SGD(params, lr=0.5, master_weights="split", ema=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        opt.step()
    masters = base.float() - 1.0
    assert_bits(torch.stack([p.detach() for p in params]), nearest_away(masters))
    averages = torch.stack(list(opt.ema_parameters()))
    torch.testing.assert_close(averages, base.float() - 0.625, rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", ["split, 8bit, ema", "stochastic, 8bit, ema"])
def test_threads_do_not_matter(way, native, step_threads):
    values, grads = draw([(200_001,), (7,), (70_000,)], 2, BF16)
    ends = []
    for threads in (1, 3):
        step_threads(threads)
        torch.manual_seed(7)
        ends.append(train(fusedopt.Adam, values, grads, **WAYS[way][0])[1])
    assert_same_outcome(*ends)
