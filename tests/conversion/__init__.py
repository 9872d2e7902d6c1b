"""Moving over: a live optimizer changes its library, and nothing else."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from cases import draw, step_through

import fusedopt

convert_to = pytest.mark.parametrize("to", ["fusedopt", "torch"])


def stock(case, params):
    """As users build it: torch chooses among its implementations."""
    return getattr(torch.optim, case.name)(params, **copy.deepcopy(case.options))


def build(case, library, params):
    return case.ours(params) if library == "fusedopt" else stock(case, params)


def convert(opt, *schedulers):
    """To the other library."""
    ours = type(opt).__module__.startswith("fusedopt")
    return (fusedopt.to_torch if ours else fusedopt.from_torch)(opt, *schedulers)


def other(library):
    return "torch" if library == "fusedopt" else "fusedopt"


def class_in(library, name):
    return getattr(fusedopt if library == "fusedopt" else torch.optim, name)


class Run:
    """Two groups of float64 tensors that are stepped through given gradients."""

    def __init__(self, case, library, values):
        self.params = [v.clone() for v in values]
        groups = [{"params": self.params[:1]}, {"params": self.params[1:], "weight_decay": 0.01}]
        self.opt = build(case, library, groups)

    def go(self, grads):
        with torch.no_grad():
            step_through(self.opt, self.params, grads)
        return self


def drawn(steps, dtype=torch.float64, case=None):
    """Values, and gradients: the second tensor has none at first, the third none in between."""
    values, grads = draw([(3, 4), (7,), ()], steps, dtype)
    for at, now in enumerate(grads):
        now[1] = now[1] if at >= 3 or fails_on_late_gradients(case) else None
        now[2] = now[2] if at % 2 == 0 else None
    return values, grads


def fails_on_late_gradients(case):
    """torch 2.13: ``TypeError: expected Tensor as element 0 in argument 2, but got NoneType``."""
    return case is not None and case.name == "SGD" and case.options.get("fused")


def assert_alike(run, expected):
    """Parameters, state and options, to the roundings of a few steps in float64. torch's Adam takes
    the count of a differentiable step in float32, fusedopt's does not."""
    in_float32 = run.opt.defaults["differentiable"] and "betas" in run.opt.defaults
    near = 1e-5 if in_float32 else 1e-12
    close = functools.partial(torch.testing.assert_close, rtol=near, atol=near)
    close(run.params, expected.params)
    for p, q in zip(run.params, expected.params, strict=True):
        assert (p in run.opt.state) == (q in expected.opt.state)
        here, there = run.opt.state.get(p, {}), expected.opt.state.get(q, {})
        assert here.keys() == there.keys()
        for key, value in there.items():
            close(here[key], value, msg=lambda m, key=key: f"{key}: {m}")
    for here, there in zip(run.opt.param_groups, expected.opt.param_groups, strict=True):
        assert here.keys() == there.keys()
        for key in there.keys() - {"params"}:
            assert here[key] == there[key], key
