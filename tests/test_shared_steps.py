"""Which parameters take the slow rule, and for how long: those that became ordinary leave it, and
one step count for many parameters is no reason for it."""

from __future__ import annotations

import contextlib
import copy
import io
from collections import OrderedDict

import pytest
import seam
import torch
from cases import (
    SCALARS,
    Case,
    assert_near,
    counting,
    gradient_like,
    leaf,
    richest_and_stateless,
)
from torch import Tensor, nn


@pytest.fixture
def watch():
    """What an optimizer leaves to the Python rule from now on, and the plans that it makes."""
    with contextlib.ExitStack() as stack:

        def start(opt):
            steps, plans = seam.python_steps(opt), seam.new_plans(opt)
            return stack.enter_context(steps), stack.enter_context(plans)

        yield start


def step(opts, both, without=()) -> None:
    for i, (p, q) in enumerate(zip(*both, strict=True)):
        p.grad = None if i in without else gradient_like(p)
        q.grad = None if i in without else p.grad.clone()
    for opt in opts:
        opt.step()


def pair(case, values):
    both = [[v.clone(memory_format=torch.preserve_format).requires_grad_() for v in values]]
    both.append([leaf(v) for v in values])
    return [case.ours(both[0]), case.stock(both[1])], both


def assert_alike(both) -> None:
    for p, q in zip(*both, strict=True):
        assert_near(p, q)


# Parameters that become ordinary ----------------------------------------------------------------


def misaligned(value: Tensor) -> Tensor:
    buffer = bytearray(value.numel() * 4 + 1)
    inside = torch.frombuffer(buffer, dtype=torch.float32, offset=1, count=value.numel())
    return inside.copy_(value.reshape(-1)).view(value.shape)


def with_gaps(value: Tensor) -> Tensor:
    return torch.stack([value, value], -1)[..., 0]


UNUSUAL = {
    "with gaps": with_gaps,
    "at odd bytes": misaligned,
    "negated": lambda v: torch._neg_view(-v),
}


@richest_and_stateless
@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("whose", ["parameter", "state"])
def test_an_ordinary_tensor_again(case, kind, whose, native, watch):
    if whose == "state" and not case.options.keys() - {"lr"}:
        return  # it has none
    opts, both = pair(case, [torch.randn(4, 3), torch.randn(5)])
    step(opts, both)
    rule, plans = watch(opts[0])
    param = both[0][0]
    tensors = [v for k, v in opts[0].state[param].items() if k not in SCALARS]
    tensors = [param] if whose == "parameter" else tensors
    for _ in range(3):
        for tensor in tensors:
            tensor.data = UNUSUAL[kind](tensor.detach())
        rule.clear()
        plans.clear()
        step(opts, both)
        step(opts, both)
        assert_alike(both)
        # (Gaps in state are closed: it gets the layout of its parameter.)
        assert len(rule) == (0 if whose == "state" and kind == "with gaps" else 2)
        for tensor in tensors:
            tensor.data = tensor.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
        rule.clear()
        plans.clear()
        for _ in range(4):
            step(opts, both)
        assert not rule
        assert len(plans) <= 1
    assert_alike(both)


@richest_and_stateless
def test_parameters_that_no_longer_overlap(case, native, watch):
    base = torch.randn(12)
    params = [base[:7].requires_grad_(), base[5:].detach().requires_grad_(), leaf(torch.randn(3))]
    opt = case.ours(params)
    rule, plans = watch(opt)
    for apart in (False, True):
        if apart:
            params[0].data = params[0].detach().clone()
        rule.clear()
        plans.clear()
        for _ in range(4):
            for p in params:
                p.grad = gradient_like(p)
            opt.step()
        assert len(rule) == (0 if apart else 8)
        assert len(plans) <= 1


@richest_and_stateless
def test_a_plan_is_not_made_for_ever_new_memory(case, native, watch):
    """What moves and stays unusual, or stays ordinary, needs no other plan."""
    opts, both = pair(case, [torch.randn(4, 3), torch.randn(5)])
    both[0][0].data = with_gaps(both[0][0].detach())
    step(opts, both)
    step(opts, both)
    rule, plans = watch(opts[0])
    for _ in range(5):
        both[0][0].data = with_gaps(both[0][0].detach())
        both[0][1].data = both[0][1].detach().clone()
        step(opts, both)
    assert len(rule) == 5 and not plans
    assert_alike(both)


# One step count for several parameters ----------------------------------------------------------

SHARING = {
    "all": [0, 1, 2, 3, 4],
    "two": [1, 3],
    "of two groups": [2, 3, 4],
}


def share(opt, params, members) -> None:
    step_count = opt.state[params[members[0]]]["step"]
    for i in members:
        opt.state[params[i]]["step"] = step_count


def grouped(case, values):
    both = [[leaf(v) for v in values] for _ in range(2)]
    parts = [[{"params": p[:3]}, {"params": p[3:], "lr": 0.03}] for p in both]
    return [case.ours(parts[0]), case.stock(parts[1])], both


@counting
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("without", [(), (0, 3), (1, 2)], ids=str)
def test_a_shared_step_count(case, sharing, without, backend, watch):
    """Counts each of its parameters, in their order, as torch's loop does."""
    values = [torch.randn(shape) for shape in [(3,), (2, 2), (), (5,), (4,)]]
    opts, both = grouped(case, values)
    step(opts, both)
    for opt, params in zip(opts, both, strict=True):
        share(opt, params, SHARING[sharing])
    rule, plans = watch(opts[0])
    for at in range(4):
        step(opts, both, without if at % 2 else ())
    assert_alike(both)
    for p, q in zip(*both, strict=True):
        assert float(opts[0].state[p]["step"]) == float(opts[1].state[q]["step"])
    if backend == "native":
        assert not rule and len(plans) <= 1


@counting
def test_a_shared_step_count_that_is_saved(case, native, watch):
    """torch.save keeps what is shared, and so does a deep copy."""
    values = [torch.randn(3), torch.randn(2, 2), torch.randn(4)]
    opts, both = pair(case, values)
    step(opts, both)
    for opt, params in zip(opts, both, strict=True):
        share(opt, params, [0, 1, 2])
    for load in (
        lambda state: torch.load(io.BytesIO(_saved(state)), weights_only=True),
        copy.deepcopy,
    ):
        for opt in opts:
            opt.load_state_dict(load(opt.state_dict()))
        rule, plans = watch(opts[0])
        for _ in range(3):
            step(opts, both)
        assert_alike(both)
        assert [float(s["step"]) for s in opts[0].state.values()] == [
            float(s["step"]) for s in opts[1].state.values()
        ]
        assert not rule


def _saved(state) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_a_shared_step_count_beside_sparse_gradients(backend):
    case = Case("Adagrad", {"lr": 0.1, "lr_decay": 0.1})
    opts, both = pair(case, [torch.randn(4, 2), torch.randn(4, 2), torch.randn(3)])
    for opt, params in zip(opts, both, strict=True):
        share(opt, params, [0, 1, 2])
    for _ in range(3):
        for params in zip(*both, strict=True):
            grad = gradient_like(params[0])
            for p in params:
                p.grad = grad.to_sparse(1) if p is both[0][1] or p is both[1][1] else grad.clone()
        for opt in opts:
            opt.step()
    assert_alike(both)


@counting
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_empty_parameters_that_share_a_step_count(case, empty, backend, watch):
    shapes: list[tuple[int, ...]] = [(3,), (2, 2), (4,)]
    shapes[empty] = (2, 0)
    opts, both = pair(case, [torch.randn(shape) for shape in shapes])
    step(opts, both)
    for opt, params in zip(opts, both, strict=True):
        share(opt, params, [0, 1, 2])
    rule, plans = watch(opts[0])
    for _ in range(3):
        step(opts, both)
    assert_alike(both)
    assert [float(opt.state[p[0]]["step"]) for opt, p in zip(opts, both, strict=True)] == [10, 10]
    if backend == "native":
        assert not rule


def of_another_dtype(opt, p: Tensor) -> None:
    p.grad_dtype = None
    p.grad = p.grad.double()


def parameter_as_gradient(opt, p: Tensor) -> None:
    p.grad = nn.Parameter(p.grad.t().contiguous().t())


def state_of_another_class(opt, p: Tensor) -> None:
    if p in opt.state:
        opt.state[p] = OrderedDict(opt.state[p])


@counting
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("leave", [of_another_dtype, parameter_as_gradient, state_of_another_class])
def test_a_shared_step_count_beside_what_python_steps(case, leave, place, backend):
    """The count of each is that of its turn."""
    opts, both = pair(case, [torch.randn(3, 2) for _ in range(3)])
    step(opts, both)
    for opt, params in zip(opts, both, strict=True):
        share(opt, params, [0, 1, 2])
    for _ in range(4):
        for p, q in zip(*both, strict=True):
            p.grad = gradient_like(p)
            q.grad = p.grad.clone()
        leave(opts[0], both[0][place])
        for opt in opts:
            opt.step()
    assert_alike(both)


@counting
@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 1e9}, {"ema": 0.9}, {"state_dtype": "8bit"}], ids=str
)
def test_a_shared_step_count_with_options(case, options, backend):
    """The same as counts of their own with the same values."""
    params = [leaf(torch.ones(4)) for _ in range(4)]
    opts = [case.ours(params[:2], **options), case.ours(params[2:], **options)]
    for at in range(4):
        grad = torch.randn(4)
        for p in params:
            p.grad = grad.clone()
        opts[0].step()
        if at == 0:
            share(opts[0], params, [0, 1])
        for p, add in zip(params[2:], (0.0, 1.0), strict=True):
            if at:
                opts[1].state[p]["step"].fill_(2.0 * at - 1 + add)
        opts[1].step()
    for p, q in zip(params[:2], params[2:], strict=True):
        assert_near(p, q)
