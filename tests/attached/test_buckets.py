"""How many gradients are alive at once, which of them are stepped together, and when."""

from __future__ import annotations

import copy
import random

import pytest
import seam
import torch
from cases import bits, leaf, richest, same_bits, snapshot
from torch import nn

import fusedopt
from attached import ADAMW, attach

# Of parameters of three float64 each; and one for all.
SIZES = [0, 24, 100, 2**20]


def parameters(count=10):
    return [leaf(torch.randn(3, dtype=torch.float64)) for _ in range(count)]


def gradient_of(params):
    """Reaches them from the last to the first."""
    total = torch.zeros((), dtype=torch.float64)
    for param in params:
        total = (total + (param * torch.randn(param.shape, dtype=param.dtype)).sum()).tanh()
    return total


def held(params):
    return sum(p.grad.nbytes for p in params if p.grad is not None)


def step_both(params, opt, twins, ordinary, reached=None):
    """A backward that reaches some of the parameters, in this order."""
    seed = random.randrange(2**31)
    order = range(len(params)) if reached is None else reached
    for each in (params, twins):
        torch.manual_seed(seed)
        gradient_of([each[i] for i in order]).backward()
    ordinary.step()
    ordinary.zero_grad()
    assert snapshot(opt) == snapshot(ordinary)


def pair(case=ADAMW, count=10, **options):
    params = parameters(count)
    twins = copy.deepcopy(params)
    return params, attach(case, params, **options), twins, case.ours(twins)


@richest
@pytest.mark.parametrize("bucket_bytes", SIZES)
def test_the_bits_do_not_depend_on_the_size(case, bucket_bytes, backend):
    params, opt, twins, ordinary = pair(case, bucket_bytes=bucket_bytes)
    for reached in (None, None, [1, 4, 2], [7, 4, 1, 0], None, [9], None):
        step_both(params, opt, twins, ordinary, reached)
        assert not held(params)


@pytest.mark.parametrize("bucket_bytes", SIZES[:3])
def test_gradients_never_exist_all_at_once(bucket_bytes, backend):
    """Whichever come, and in whichever order."""
    params, alive = parameters(), []
    for param in params:
        param.register_post_accumulate_grad_hook(lambda _: alive.append(held(params)))
    opt = attach(ADAMW, params, bucket_bytes=bucket_bytes)
    for _ in range(3):
        gradient_of(params).backward()
    fill = 24 * -(-max(bucket_bytes, 1) // 24)  # what makes a bucket full
    assert max(alive) == fill
    for _ in range(20):
        gradient_of(random.sample(params, random.randint(1, 10))).backward()
        assert not held(params)
    assert max(alive) == fill and len(opt.state) == len(params)


def test_what_fills_a_bucket_alone(backend):
    """A gradient of its size, and one that is sparse, whose size is not known."""
    small, large = parameters(3), leaf(torch.randn(100, dtype=torch.float64))
    table = nn.Embedding(5, 2, sparse=True).double()
    opt = fusedopt.attach([*small, large, table.weight], fusedopt.SGD, lr=0.1, bucket_bytes=800)
    for _ in range(2):
        with seam.attached_steps(opt) as steps:
            gradient_of([small[0], large, small[1]]).backward()
            (gradient_of(small[2:]) + table(torch.tensor([1, 1])).sum()).backward()
        assert [sorted(map(len, ps)) for ps in steps] == [[3, 100], [3], [5], [3]]


def test_who_is_stepped_together(backend):
    """Those whose gradients came one after the other at first, in one call, with one plan, also if
    some of them have none."""
    params, opt, twins, ordinary = pair(count=10, bucket_bytes=72)
    step_both(params, opt, twins, ordinary)
    step_both(params, opt, twins, ordinary)
    with seam.attached_steps(opt) as steps, seam.new_plans() as plans:
        step_both(params, opt, twins, ordinary)
        assert [*map(len, steps)] == [3, 3, 3, 1]
        together = {id(p): at for at, ps in enumerate(steps) for p in ps}
        for reached in ([0, 1, 4, 8, 9], [2, 5], [3], None):
            steps.clear()
            step_both(params, opt, twins, ordinary, reached)
            assert all(len({together[id(p)] for p in ps}) == 1 for ps in steps)
            assert len(steps) <= len({together[id(params[i])] for i in reached or range(10)})
    assert not plans


@richest
def test_gradients_that_are_not_of_this_backward_stay(case, backend):
    """In the bucket of parameters that are stepped."""
    params, opt, twins, ordinary = pair(case)
    step_both(params, opt, twins, ordinary)
    step_both(params, opt, twins, ordinary)
    first, second = torch.randn(2, 3, dtype=torch.float64)
    params[0].grad, params[5].grad = first.clone(), second.clone()
    for _ in range(2):
        step_both(params, opt, twins, ordinary, [1, 2, 3, 4, 9])
    twins[0].grad = first
    step_both(params, opt, twins, ordinary, [0, 2])  # it is part of the sum
    assert params[0].grad is None and same_bits(params[5].grad, second)
    twins[5].grad = second
    for each in (opt, ordinary):
        each.step()
    assert snapshot(opt) == snapshot(ordinary)


@pytest.mark.usefixtures("only_by_the_rule")
@pytest.mark.parametrize("steps", [0, 2])
def test_nor_beside_what_needs_more_than_a_native_call(steps, backend):
    """A gradient in another layout; state that is not complete. (What goes alone is stepped by the
    rule, whose last bit may be another than that of torch's implementations.)"""

    def transpose(param):
        param.grad = param.grad.t().contiguous().t()

    params = [leaf(torch.randn(4, 3, dtype=torch.float64)) for _ in range(4)]
    params[1].register_post_accumulate_grad_hook(transpose)
    twins = copy.deepcopy(params)
    opt, ordinary = attach(ADAMW, params), ADAMW.ours(twins)
    for _ in range(steps):
        step_both(params, opt, twins, ordinary)
    gradient_of(params).backward(inputs=params)  # all are in one bucket
    ordinary.load_state_dict(copy.deepcopy(opt.state_dict()))
    for param, twin in zip(params, twins, strict=True):
        twin.data.copy_(param.data)
    params[0].grad = by_hand = torch.randn(4, 3, dtype=torch.float64)
    kept = opt.state[params[0]].pop("exp_avg")
    before = bits(params[0])
    for reached in ([1, 2], [2, 3], [3, 1]):
        ordinary.state[twins[0]].pop("exp_avg", None)
        step_both(params, opt, twins, ordinary, reached)
        assert bits(params[0]) == before and params[0].grad is by_hand
    for each, of in ((opt, params), (ordinary, twins)):
        each.state[of[0]]["exp_avg"] = kept.clone()
        of[0].grad = by_hand.clone()
        each.step()
    assert snapshot(opt) == snapshot(ordinary)


@richest
@pytest.mark.parametrize("waits", [False, True])
def test_a_gradient_where_a_parameter_was_that_has_no_part(case, waits, backend):
    """Its memory may belong to somebody else by now; it is neither stepped nor looked at, be it
    that a gradient waits at it."""
    params = parameters(3)
    places = {}

    def put_elsewhere(param):
        if param in places:
            param.grad = places[param].copy_(param.grad)

    for param in params:
        param.register_post_accumulate_grad_hook(put_elsewhere)
    opt = attach(case, params)
    for _ in range(3):
        gradient_of(params).backward()
    absent, other, _ = params
    places[other] = absent.data
    absent.data = absent.data.clone()
    if waits:
        absent.grad = torch.ones_like(absent)

    def all_of(param):
        return [bits(param), {k: bits(v) for k, v in opt.state.get(param, {}).items()}]

    before, of_other = all_of(absent), all_of(other)
    for _ in range(3):
        gradient_of(params[1:]).backward()
        assert all_of(absent) == before
        assert all_of(other) != of_other
