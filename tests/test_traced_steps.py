"""Large parameters without the native module: the update is seen once and made for each of them."""

from __future__ import annotations

import gc

import pytest
import torch
from cases import RICHEST, STATELESS, bits, leaf, snapshot

import fusedopt

EVERY = pytest.mark.parametrize("case", [*RICHEST, *STATELESS], ids=str)


@pytest.fixture(autouse=True)
def _python(monkeypatch):
    monkeypatch.setattr(fusedopt.backend, "native", None)


class Loss(torch.Tensor):
    """Torch's backward of a subclass runs without the dispatch to subclasses."""


@EVERY
def test_steps_in_the_backward_of_a_subclass(case):
    found = []
    for kind in (torch.Tensor, Loss):
        torch.manual_seed(0)
        params = [leaf(torch.randn(5000)), leaf(torch.randn(100))]
        opt = case.ours(params)
        course = []

        def step(param, opt=opt, params=params):
            if param is params[1]:
                opt.step()

        for hooked in (True, True, True, False, False):
            handles = [p.register_post_accumulate_grad_hook(step) for p in params if hooked]
            opt.zero_grad()
            loss = (params[0] ** 2).sum()
            loss.backward()
            (params[1] ** 3).sum().as_subclass(kind).backward()
            for handle in handles:
                handle.remove()
            if not hooked:
                opt.step()
            course.append(bits(params[0]))
        assert len({*course}) == len(course)
        found.append((course, snapshot(opt)))
    assert found[0] == found[1]


@EVERY
@pytest.mark.parametrize("columns", [600, 1200])
def test_a_parameter_with_gaps(case, columns):
    """Whose elements reach further than there are many, below and above those of a part."""
    torch.manual_seed(0)
    base = torch.randn(1000, 2000)
    params = [base[:, :columns].requires_grad_(), leaf(base[:, :columns].clone())]
    opts = [case.ours([p]) for p in params]
    for _ in range(3):
        grad = torch.randn(1000, columns)
        for p, opt in zip(params, opts, strict=True):
            p.grad = grad.clone()
            opt.step()
    torch.testing.assert_close(params[0], params[1], rtol=1e-5, atol=1e-6)


@EVERY
def test_steps_leave_no_cycles(case):
    p = leaf(torch.randn(9000))
    opt = case.ours([p])

    def steps():
        for _ in range(20):
            p.grad = torch.randn(9000)
            opt.step()

    steps()
    gc.disable()
    try:
        gc.collect()
        # What other tests have left is not counted: a collection may free what holds more of it.
        gc.freeze()
        steps()
        assert gc.collect() < 20 * 5
    finally:
        gc.unfreeze()
        gc.enable()


def test_a_group_that_is_not_differentiable_among_others():
    """Where the default is: autograd does not run through its step."""
    for name, options in (("RMSprop", {}), ("NAdam", {}), ("SGD", {}), ("SGD", {"momentum": 0.9})):
        results = []
        for more in ({}, {"differentiable": True}):
            torch.manual_seed(0)
            params = [leaf(torch.randn(5000)), leaf(torch.randn(3))]
            groups = [{"params": params, "differentiable": False}]
            opt = getattr(fusedopt, name)(groups, lr=0.1, **options, **more)
            for _ in range(3):
                for p in params:
                    p.grad = torch.randn_like(p)
                opt.step()
            results.append([bits(p) for p in params])
        assert results[0] == results[1]
