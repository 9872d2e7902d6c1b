"""Conversions that are refused leave the optimizer as it was."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from cases import RICHEST_OF, TORCH_NAMES, Case, every_torch_name, leaf, snapshot
from torch import nn
from torch.optim import lr_scheduler

import fusedopt
from conversion import build, class_in, convert, convert_to, other


def everything(opt):
    """Class, attributes, what is in them, and every tensor bit for bit."""
    attributes = vars(opt)
    return (
        type(opt),
        {name: id(value) for name, value in attributes.items()},
        {name: repr(value) for name, value in attributes.items()},
        [id(value) for state in opt.state.values() for value in state.values()],
        snapshot(opt),
    )


def assert_refused(conversion, opt, *schedulers, error, match):
    before = everything(opt)
    with pytest.raises(error, match=match):
        conversion(opt, *schedulers)
    assert everything(opt) == before


@every_torch_name
def test_of_the_wrong_class(name):
    ours, theirs = (class_in(library, name) for library in ("fusedopt", "torch"))

    class Ours(ours):
        pass

    class Theirs(theirs):
        pass

    Theirs.__name__ = Ours.__name__ = name
    for conversion, classes, package in [
        (fusedopt.from_torch, (ours, Ours, Theirs, torch.optim.ASGD), r"torch\.optim"),
        (fusedopt.to_torch, (theirs, Ours, Theirs, torch.optim.ASGD), "fusedopt"),
    ]:
        for cls in classes:
            opt = cls([param := leaf(torch.ones(3))])
            lr_scheduler.StepLR(opt, 1)
            param.grad = torch.ones(3)
            opt.step()
            match = (
                f"takes an optimizer of a class of {package}'s itself .*got a .*{cls.__qualname__}"
            )
            assert_refused(conversion, opt, error=TypeError, match=match)
        for nonsense in (None, "AdamW", ours, theirs, nn.Linear(1, 1), {"state": {}}):
            with pytest.raises(TypeError, match="takes an optimizer"):
                conversion(nonsense)


def test_twice():
    opt = fusedopt.from_torch(torch.optim.Adam([leaf(torch.ones(3))]))
    assert_refused(fusedopt.from_torch, opt, error=TypeError, match=r"got a fusedopt\.adam\.Adam$")
    fusedopt.to_torch(opt)
    assert_refused(fusedopt.to_torch, opt, error=TypeError, match=r"got a torch\.optim\.adam\.Adam")


def replaced(opt):
    opt.step = lambda closure=None: None


def replaced_below_a_scheduler(opt):
    """What the scheduler wraps is not the step of the class."""
    opt.step = types.MethodType(lambda self, closure=None: None, opt)
    lr_scheduler.StepLR(opt, 1)


def replaced_above_a_scheduler(opt):
    """``functools.wraps`` copies the mark of the scheduler, too."""
    lr_scheduler.StepLR(opt, 1)
    opt.step = functools.wraps(opt.step)(lambda *args: None)


@convert_to
@every_torch_name
@pytest.mark.parametrize(
    "replace", [replaced, replaced_below_a_scheduler, replaced_above_a_scheduler]
)
def test_a_step_that_was_replaced(name, to, replace):
    opt = build(Case(name, {}), other(to), [leaf(torch.ones(3))])
    replace(opt)
    match = rf"step\(\) of this {name} has been replaced by .*; convert the optimizer before"
    assert_refused(convert, opt, error=ValueError, match=match)


@convert_to
def test_schedulers_of_others(to):
    opt, another = (build(RICHEST_OF["SGD"], other(to), [leaf(torch.ones(3))]) for _ in range(2))
    mine, foreign = (lr_scheduler.StepLR(each, 1) for each in (opt, another))
    plateau = lr_scheduler.ReduceLROnPlateau(another)
    for schedulers, name in [
        ((foreign,), "StepLR"),
        ((mine, plateau), "ReduceLROnPlateau"),
        ((None,), "NoneType"),
        ((opt,), "SGD"),
    ]:
        match = f"{name} is a scheduler of another optimizer"
        assert_refused(convert, opt, *schedulers, error=ValueError, match=match)
    assert convert(opt, mine) is opt


TORCH_LACKS = [
    *((name, {"l1": 0.1}) for name in TORCH_NAMES),
    *((name, {"max_grad_norm": 1.0}) for name in TORCH_NAMES),
    *((name, {"max_grad_norm": 0.0}) for name in TORCH_NAMES),
    *((name, {"amp_fused": True}) for name in TORCH_NAMES),
    ("RMSprop", {"eps_inside_sqrt": True}),
    ("SGD", {"capturable": True}),
    ("Adagrad", {"capturable": True}),
    ("Adagrad", {"l1": 0.1, "capturable": True, "max_grad_norm": 1.0, "amp_fused": True}),
]


@pytest.mark.parametrize(("name", "options"), TORCH_LACKS, ids=str)
def test_options_that_torch_lacks(name, options):
    opt = getattr(fusedopt, name)([leaf(torch.ones(3))], **options)
    match = rf"torch.optim.{name} has no {', '.join(options)}; switch that off first"
    assert_refused(fusedopt.to_torch, opt, error=ValueError, match=match)
    for group in (opt.defaults, *opt.param_groups):
        group.update({key: False for key in options if key in group})
    opt.max_grad_norm, opt.amp_fused = None, False
    expected = getattr(torch.optim, name)([leaf(torch.ones(3))])
    assert repr(fusedopt.to_torch(opt)) == repr(expected)
    assert vars(opt).keys() == vars(expected).keys() and opt.defaults == expected.defaults


def test_an_option_of_one_group():
    params = [leaf(torch.ones(1)), leaf(torch.ones(1))]
    opt = fusedopt.AdamW([{"params": params[0]}, {"params": params[1], "l1": 0.1}])
    assert_refused(fusedopt.to_torch, opt, error=ValueError, match="has no l1;")


def test_an_attached_optimizer():
    opt = fusedopt.attach([leaf(torch.ones(3))], fusedopt.AdamW)
    match = r"attached to a backward; detach\(\)"
    assert_refused(fusedopt.to_torch, opt, error=ValueError, match=match)
    fusedopt.detach(opt)
    assert type(fusedopt.to_torch(opt)) is torch.optim.AdamW
