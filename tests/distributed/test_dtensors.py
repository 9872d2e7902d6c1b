"""DTensors made by hand: all placements, gradients that are placed otherwise, and bad input."""

from __future__ import annotations

import copy
import itertools
from unittest import mock

import pytest
import torch
from cases import RICHEST, bits, each_class_or_backend, gradient_like, leaf, richest
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    zeros,
)
from training import (
    assert_close,
    assert_laid_out_as_parameters,
    assert_ranks_agree,
    local,
    snapshot,
    square_mesh,
    world_mesh,
)
from worlds import mesh, on_ranks

import fusedopt

SHAPES = [(5, 4), (1, 3), (3, 6)]


def parameter(values, on, placements):
    return distribute_tensor(values, on, placements).detach().requires_grad_()


def placed(values, on, placements):
    """Of partial values every rank gets something else, which together are these."""
    if any(p.is_partial() for p in placements):
        whole = [Replicate() if p.is_partial() else p for p in placements]
        shard = local(distribute_tensor(values, on, whole)).clone()
        for dim, placement in enumerate(placements):
            if placement.is_partial():
                parts = torch.randn(on.size(dim), dtype=values.dtype).softmax(0)
                shard *= parts[on.get_local_rank(dim)]
        return DTensor.from_local(shard, on, placements, shape=values.shape, stride=values.stride())
    return distribute_tensor(values, on, placements)


def train_both(case, values, grads, on, placements, grad_placements, **options):
    """Ours on DTensors, and stock on ordinary tensors."""
    params = [parameter(v, on, placements) for v in values]
    expected = [leaf(v) for v in values]
    opt, stock = case.ours(params, **options), case.stock(expected)
    for now in grads:
        for p, q, grad in zip(params, expected, now, strict=True):
            p.grad, q.grad = placed(grad, on, grad_placements), grad.clone()
        if "max_grad_norm" in options:
            torch.nn.utils.clip_grad_norm_(expected, options["max_grad_norm"])
        before = [(p.grad.placements, bits(local(p.grad))) for p in params]
        opt.step()
        stock.step()
        assert before == [(p.grad.placements, bits(local(p.grad))) for p in params]
    what = f"{case.name}: {placements}, gradients {grad_placements}"
    for p, q in zip(params, expected, strict=True):
        assert_close(p, q, what)
        for key, value in opt.state[p].items():
            assert_close(value, stock.state[q][key], f"{what}, {key}")
    assert_laid_out_as_parameters(opt)
    assert_ranks_agree(params)


clipped = pytest.mark.parametrize("options", [{}, {"max_grad_norm": 2.0}], ids=["plain", "clipped"])


@on_ranks(2)
@clipped
def test_placements(options, backend):
    """All pairs of them, the optimizers taking turns."""
    values = [torch.randn(s, dtype=torch.float64) for s in SHAPES]
    grads = [[gradient_like(v) for v in values] for _ in range(3)]
    kinds = [Shard(0), Shard(1), Replicate()]
    pairs = itertools.product(kinds, [*kinds, Partial()])
    for case, (one, other) in zip(itertools.cycle(RICHEST), pairs, strict=False):
        train_both(case, values, grads, world_mesh("cpu"), [one], [other], **options)


@on_ranks(4)
@clipped
def test_placements_on_two_dimensions(options, backend):
    values = [torch.randn(s, dtype=torch.float64) for s in SHAPES]
    grads = [[gradient_like(v) for v in values] for _ in range(3)]
    pairs = (
        ([Shard(0), Shard(0)], [Shard(0), Shard(0)]),
        ([Shard(0), Shard(1)], [Shard(1), Shard(0)]),
        ([Shard(1), Replicate()], [Shard(1), Partial()]),
        ([Replicate(), Shard(0)], [Partial(), Partial()]),
        ([Replicate(), Replicate()], [Shard(0), Shard(1)]),
    )
    for case, (one, other) in zip(RICHEST, pairs, strict=True):
        train_both(case, values, grads, square_mesh("cpu"), one, other, **options)


@on_ranks(2)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64], ids=str)
def test_dtypes_and_strides(dtype, backend):
    """Shards in channels_last, with gradients that are not: not a bit is different from what the
    shard would become as an ordinary tensor."""
    on = world_mesh("cpu")
    for case in RICHEST:
        if dtype.is_complex and case.options.get("amsgrad"):
            continue  # torch.maximum takes no complex numbers
        shard = torch.randn(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last)
        plain = leaf(shard)
        param = DTensor.from_local(shard.clone(), on, [Shard(0)]).detach().requires_grad_()
        opt, expected = case.ours([param]), case.ours([plain])
        for _ in range(3):
            plain.grad = gradient_like(shard.contiguous())
            param.grad = DTensor.from_local(plain.grad.clone(), on, [Shard(0)])
            opt.step()
            expected.step()
        assert bits(local(param)) == bits(plain)
        assert opt.state[param].keys() == expected.state[plain].keys()
        for key, value in expected.state[plain].items():
            assert bits(local(opt.state[param][key])) == bits(value), (case, key)


@on_ranks(2)
@each_class_or_backend
def test_parameters_that_come_and_go(case, backend):
    """Parameters are written, or exchanged as FSDP2 does when a model is moved; gradients come late
    or not at all."""
    on = world_mesh("cpu")
    values = [torch.randn(s, dtype=torch.float64) for s in SHAPES]
    params, expected = [parameter(v, on, [Shard(0)]) for v in values], [leaf(v) for v in values]
    opt, stock = case.ours(params), case.stock(expected)
    for at in range(6):
        for p, q, value in zip(params, expected, values, strict=True):
            if at == 3:
                torch.utils.swap_tensors(p, parameter(value, on, [Shard(0)]))
                torch.utils.swap_tensors(q, leaf(value))
            if at == 4:
                with torch.no_grad():
                    p.mul_(2)
                    q.mul_(2)
        for i, (p, q) in enumerate(zip(params, expected, strict=True)):
            q.grad = None if (at + i) % 3 == 0 else gradient_like(values[i])
            p.grad = None if q.grad is None else distribute_tensor(q.grad, on, [Shard(0)])
        versions = [p._version for p in params]
        opt.step()
        stock.step()
        for p, version in zip(params, versions, strict=True):
            assert (p._version > version) == (p.grad is not None)  # autograd knows of the step
    for p, q in zip(params, expected, strict=True):
        assert_close(p, q, "parameter")


@on_ranks(2)
@richest
def test_shardings_that_are_made_anew(case, native):
    """By code that others put into DTensors: nobody but the step holds what it is given."""
    run, clipped = Run(case, 2), Run(case, 2, max_grad_norm=1e9)
    slot = DTensor.__dict__["_spec"]
    anew = property(lambda self: copy.copy(slot.__get__(self, DTensor)), slot.__set__)
    with mock.patch.object(DTensor, "_spec", anew):
        run.goes_on()
        clipped.goes_on()
    shard = DTensor.__dict__["_local_tensor"]
    anew = property(lambda self: shard.__get__(self, DTensor).detach(), shard.__set__)
    with mock.patch.object(DTensor, "_local_tensor", anew):
        with pytest.raises(RuntimeError, match="_local_tensor of a .* is made anew each time"):
            run.opt.step()


# Bad input --------------------------------------------------------------------------------------


class Run:
    """Three named parameters; the second is the bad one. ``other`` has the same past as stock."""

    def __init__(self, case, steps, **options):
        self.case, self.on = case, world_mesh("cpu")
        self.values = [torch.randn(s, dtype=torch.float64) for s in SHAPES]
        self.params = [parameter(v, self.on, [Shard(0)]) for v in self.values]
        self.plain = [leaf(v) for v in self.values]
        self.opt = case.ours([*zip("abc", self.params, strict=True)], **options)
        self.stock = case.stock(self.plain)
        self.bad = self.params[1]
        for _ in range(steps):
            self.draw()
            self.opt.step()
            self.stock.step()
        self.draw()

    def draw(self):
        for p, q in zip(self.params, self.plain, strict=True):
            q.grad = gradient_like(q.detach())
            p.grad = distribute_tensor(q.grad, self.on, [Shard(0)])

    def fails(self, act, *words, error=ValueError):
        before = snapshot(self.opt)
        for _ in range(2):
            with pytest.raises(error) as caught:
                act()
            for word in (f"fusedopt.{self.case.name}", *words):
                assert word in str(caught.value), str(caught.value)
            assert snapshot(self.opt) == before

    def goes_on(self):
        for _ in range(2):
            self.opt.step()
            self.stock.step()
            self.draw()
        for p, q in zip(self.params, self.plain, strict=True):
            assert_close(p, q, "parameter")


def another_mesh():
    return mesh("cpu", (1, 2), ("one", "two"))


steps = pytest.mark.parametrize("steps", [0, 2], ids=["at the first step", "later"])
WHERE = ("group 0", "parameter 1 'b'", "(1, 3)", "Shard(dim=0)")


@on_ranks(2)
@each_class_or_backend
@steps
def test_bad_gradients(case, steps, backend):
    for options in ({}, {"max_grad_norm": 1e9}):
        run = Run(case, steps, **options)
        good, grad = run.bad.grad, run.plain[1].grad
        run.bad.grad = distribute_tensor(grad, another_mesh(), [Replicate(), Shard(0)])
        run.fails(run.opt.step, *WHERE, "its grad is", "(Replicate(), Shard(dim=0))", "two=2")
        run.bad.grad = good
        run.goes_on()


@on_ranks(2)
@each_class_or_backend
@steps
def test_ordinary_gradients_of_dtensors_and_the_reverse(case, steps, backend):
    run = Run(case, steps)
    good = run.bad.grad
    try:
        run.bad.grad = torch.ones(1, 3, dtype=torch.float64)
    except (RuntimeError, TypeError):
        pytest.skip("this torch does not let it be set")
    run.fails(run.opt.step, *WHERE, "its grad is no DTensor")
    run.bad.grad = good
    run.goes_on()
    plain = leaf(torch.randn(2, 3))
    plain.grad = distribute_tensor(torch.ones(2, 3), run.on, [Replicate()])
    opt = case.ours([plain])
    before = bits(plain)
    with pytest.raises(ValueError, match=r"it is no DTensor, but its grad is a DTensor.*Replicate"):
        opt.step()
    assert bits(plain) == before


@on_ranks(2)
@each_class_or_backend
@steps
def test_partial_parameters(case, steps, backend):
    run = Run(case, 0)
    run.bad = DTensor.from_local(torch.ones(4, 2), run.on, [Partial()]).detach().requires_grad_()
    run.opt.add_param_group({"params": [("d", run.bad)]})
    for _ in range(steps):  # without a gradient, it is no matter
        run.opt.step()
        run.stock.step()
        run.draw()
    run.bad.grad = zeros(4, 2, device_mesh=run.on, placements=[Replicate()])
    run.fails(run.opt.step, "group 1", "parameter 0 'd'", "Partial(sum)")
    run.bad.grad = None
    run.goes_on()


def _misplaced(value):
    """State tensors that do not fit a parameter in Shard(0), and how messages call them."""
    value = value.full_tensor()
    return [
        (distribute_tensor(value, world_mesh("cpu"), [Replicate()]), "(Replicate(),)"),
        (distribute_tensor(value, world_mesh("cpu"), [Shard(1)]), "(Shard(dim=1),)"),
        (distribute_tensor(value, another_mesh(), [Replicate(), Shard(0)]), "two=2"),
        (value, "no DTensor"),
    ]


@on_ranks(2)
@each_class_or_backend
def test_misplaced_state(case, backend):
    run = Run(case, 2)
    key = case.table.required
    good = run.opt.state[run.bad][key]
    for bad, words in _misplaced(good):
        run.opt.state[run.bad][key] = bad
        run.fails(run.opt.step, *WHERE, f"state[{key!r}]", words)
    run.opt.state[run.bad][key] = good
    run.goes_on()


@on_ranks(2)
@each_class_or_backend
def test_loading_misplaced_state(case, backend):
    """Is found when it is loaded."""
    run = Run(case, 2)
    key = case.table.required
    good = run.opt.state_dict()
    for bad, words in _misplaced(good["state"][1][key]):
        saved = copy.deepcopy(good)
        saved["state"][1][key] = bad
        run.fails(lambda saved=saved: run.opt.load_state_dict(saved), *WHERE, key, words)
    saved = copy.deepcopy(good)
    saved["state"][1][key] = zeros(3, 1, device_mesh=run.on, placements=[Shard(0)])
    run.fails(lambda: run.opt.load_state_dict(saved), "another model", "(3, 1)")
    run.opt.load_state_dict(good)
    run.goes_on()


@on_ranks(2)
@each_class_or_backend
def test_attach_with_a_gradient_on_another_mesh(case, backend):
    """The backward raises, and the parameter and its state are as they were."""
    on = world_mesh("cpu")
    param = parameter(torch.randn(4, 2), on, [Shard(0)])
    opt = fusedopt.attach([param], getattr(fusedopt, case.name), **case.options)
    param.sum().backward()
    elsewhere = distribute_tensor(torch.ones(4, 2), another_mesh(), [Replicate(), Shard(0)])
    param.grad = None
    before = snapshot(opt)
    param.register_hook(lambda grad: elsewhere)
    with pytest.raises(ValueError, match=r"its grad is .*Replicate"):
        param.sum().backward()
    param.grad = None
    assert snapshot(opt) == before
