"""Python code that runs while a step looks at its tensors: what it exchanges is seen or held."""

from __future__ import annotations

import collections
import gc
import weakref
from typing import Any

import pytest
import seam
import torch
from cases import leaf
from torch.overrides import TorchFunctionMode

import fusedopt

pytestmark = pytest.mark.usefixtures("module")


def repeating(count: int = 6, **options: Any) -> tuple[list[torch.Tensor], Any]:
    params = [leaf(torch.randn(8)) for _ in range(count)]
    opt = fusedopt.Adam(params, lr=0.1, **options)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn(8)
        opt.step()
    assert seam.has_repeated(opt)
    return params, opt


class Watching(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("watched", [False, True])
def test_another_state_and_the_first_again(watched):
    """After a step that was not the last one once more."""
    params, opt = repeating()
    first = opt.state
    other = collections.defaultdict(
        dict, {p: {k: v.clone() for k, v in entries.items()} for p, entries in first.items()}
    )
    opt.state = other
    if watched:
        with Watching():
            opt.step()
    else:
        for rests in (0, 1):
            grad, params[rests].grad = params[rests].grad, None
            opt.step()
            params[rests].grad = grad
    opt.state = first
    opt.step()
    assert all(first[p]["step"] == 5 for p in params)
    assert other[params[2]]["step"] == (5 if watched else 6)


def test_finalizers_of_gradients_collect_garbage():
    """While what a step held is let go."""
    params, opt = repeating()
    ran = []

    def collect() -> None:
        gc.collect()
        ran.append([torch.zeros(3) for _ in range(4)])

    class Cloning(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function == torch.Tensor.grad.__get__ and result is not None:
                result = result.clone()
                weakref.finalize(result, collect)
            return result

    with Cloning():
        for _ in range(3):
            opt.step()
    assert ran
    assert all(opt.state[p]["step"] == 7 for p in params)


@pytest.mark.parametrize("how", ["the group", "the option", "the list"])
def test_a_number_that_replaces_what_it_is_in(how):
    params, opt = repeating()
    groups = opt.param_groups

    class Lr(float):
        def __float__(self) -> float:
            if how == "the group":
                groups[0] = dict(groups[0])
            elif how == "the option":
                groups[0]["lr"] = 0.1
            else:
                groups[:] = [dict(groups[0])]
            gc.collect()
            return 0.1

    for _ in range(3):
        groups[0]["lr"] = Lr()
        opt.step()
    assert all(opt.state[p]["step"] == 7 for p in params)


def test_clipped_steps_are_repeated_again_after_others():
    params, opt = repeating(max_grad_norm=1.0)
    for resting in (0, 1, 2, 0):
        params[resting].grad = None
        opt.step()
        params[resting].grad = torch.randn(8)
    for _ in range(40):
        opt.step()
    assert seam.has_repeated(opt)


def test_clipping_without_a_gradient():
    params, opt = repeating(max_grad_norm=1.0)
    opt.zero_grad()
    opt.add_param_group({"params": [leaf(torch.randn(3))]})
    for _ in range(3):
        opt.step()
    assert all(opt.state[p]["step"] == 4 for p in params)
