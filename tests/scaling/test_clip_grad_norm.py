"""``fusedopt.clip_grad_norm_`` is torch's."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from cases import LAYOUTS, assert_near, bits, draw, every_dtype, gradient_like, leaf
from torch import nn

import fusedopt
from scaling import INF, NAN

CLIPS = (fusedopt.clip_grad_norm_, nn.utils.clip_grad_norm_)


def params_with(grads):
    params = [
        torch.zeros_like(g).requires_grad_() if g is not None else leaf(torch.ones(2))
        for g in grads
    ]
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()
    return params


def assert_clips_alike(grads, *args, pick=lambda params: params, coarsest=None, **kwargs):
    runs = []
    for clip in CLIPS:
        params = params_with(grads)
        norm = clip(pick(params), *args, **kwargs)
        runs.append((norm, [p.grad for p in params]))
    (ours, grads_), (theirs, expected) = runs
    assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device)
    assert not ours.requires_grad
    assert_near(ours, theirs, dtype=coarsest)
    for g, h in zip(grads_, expected, strict=True):
        assert (g is None) == (h is None)
        if g is not None:
            assert_near(g, h, dtype=torch.float16 if g.dtype.itemsize == 2 else coarsest)


def test_clip_grad_norm_signature():
    ours, theirs = (inspect.signature(clip).parameters for clip in CLIPS)
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


@pytest.mark.parametrize("foreach", [None, True, False], ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 2, 1, 1.5, 0, INF, -INF, "2", "inf"], ids=str)
@pytest.mark.parametrize("max_norm", [0.0, 1, 2.5, INF, 1e9], ids=str)
def test_clip_grad_norm_(norm_type, foreach, max_norm, backend):
    _, (grads,) = draw([(33,), (2, 3), (), (3, 1, 5)], 1)
    assert_clips_alike([*grads, None], max_norm, norm_type, foreach=foreach)
    assert_clips_alike(grads, max_norm=max_norm, norm_type=norm_type, foreach=foreach)


@pytest.mark.parametrize(
    "pick",
    [lambda ps: ps[0], tuple, lambda ps: (p for p in ps), lambda ps: nn.ParameterList(ps), iter],
    ids=["tensor", "tuple", "generator", "ParameterList", "iterator"],
)
@every_dtype
def test_clip_grad_norm_of(pick, dtype, backend):
    _, (grads,) = draw([(33,), (2, 3)], 1, dtype)
    assert_clips_alike(grads, 2.0, pick=pick)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float64, torch.float32),
        (torch.complex64, torch.float64),
        (torch.complex64, torch.float32),
        (torch.complex128,),
    ],
    ids=str,
)
def test_clip_grad_norm_of_mixed_dtypes(dtypes, backend):
    grads = [gradient_like(torch.randn(5, dtype=dtype)) for dtype in dtypes]
    half = [dtype for dtype in dtypes if dtype.itemsize == 2]
    assert_clips_alike(grads, 2.0, coarsest=half[0] if half else torch.float32)


def test_clip_grad_norm_of_nothing(backend):
    assert_clips_alike([None, None], 1.0)
    assert_clips_alike([], 1.0)
    assert_clips_alike([torch.ones(0), torch.ones(2, 0)], 1.0)
    assert_clips_alike([torch.ones(0), torch.ones(3)], 1.0)


def test_clip_grad_norm_of_an_empty_generator(backend):
    """torch warns."""
    seen = []
    for clip in CLIPS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert clip((p for p in ()), 1.0).item() == 0.0
        seen.append([(w.category, str(w.message)) for w in caught])
    assert seen[0] == seen[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_clip_grad_norm_of_layouts(layout, backend):
    runs = []
    values = torch.randn(4, 3, 2, 5)
    for clip in CLIPS:
        p = leaf(torch.zeros_like(values))
        p.grad, around = LAYOUTS[layout](values)
        before = [bits(t) for t in around]
        runs.append((clip(p, 1.0), p.grad))
        assert [bits(t) for t in around] == before
    for ours, theirs in zip(*runs, strict=True):
        assert_near(ours, theirs)


@pytest.mark.parametrize("bad", [INF, -INF, NAN], ids=str)
@pytest.mark.parametrize("max_norm", [1.0, INF], ids=str)
def test_clip_grad_norm_not_finite(bad, max_norm, backend):
    _, (grads,) = draw([(33,), (2, 3)], 1)
    grads[0][3] = bad
    assert_clips_alike(grads, max_norm)
    raised = []
    for clip in CLIPS:
        params = params_with(grads)
        with pytest.raises(RuntimeError) as caught:
            clip(params, max_norm, error_if_nonfinite=True)
        assert [bits(p.grad) for p in params] == [bits(g) for g in grads]
        raised.append(str(caught.value))
    assert raised[0] == raised[1]
    assert_clips_alike([torch.ones(3)], max_norm, error_if_nonfinite=True)


@pytest.mark.parametrize("arguments", [("x",), (1.0, "x"), (1.0, None), (None,)], ids=str)
def test_clip_grad_norm_bad_arguments(arguments, backend):
    raised = []
    for clip in CLIPS:
        with pytest.raises((TypeError, ValueError)) as caught:
            clip(params_with([torch.ones(3)]), *arguments)
        raised.append(caught.type)
    assert raised[0] is raised[1]


def test_clip_grad_norm_of_sparse_gradients(backend):
    """torch cannot; here it is the norm of the same gradients as dense ones."""
    sparse = torch.sparse_coo_tensor([[0, 2, 0]], 2 + torch.rand(3, 2), (3, 2))
    dense = [sparse.to_dense(), torch.rand(4)]
    p, q = torch.zeros(3, 2).requires_grad_(), torch.zeros(4).requires_grad_()
    p.grad, q.grad = sparse.clone(), dense[1].clone()
    norm = fusedopt.clip_grad_norm_([p, q], 1.5)
    expected = params_with(dense)
    assert_near(norm, nn.utils.clip_grad_norm_(expected, 1.5))
    assert_near(p.grad.to_dense(), expected[0].grad)
    assert_near(q.grad, expected[1].grad)


def test_clip_grad_norm_in_place_and_without_a_graph(backend):
    p = leaf(torch.ones(3))
    loss = (p**3).sum()
    (p.grad,) = torch.autograd.grad(loss, [p], create_graph=True)
    grad = p.grad
    runs = [fusedopt.clip_grad_norm_(p, 1.0)]
    assert p.grad is grad and not runs[0].requires_grad
    assert_near(grad, torch.full((3,), 3**-0.5))
