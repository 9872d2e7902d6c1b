"""``state``, its entries, param groups and their lists of parameters may be of other classes than
those that torch makes: the step is the same, and what a user holds stays in use."""

from __future__ import annotations

import torch
from cases import assert_near, gradient_like
from torch import nn

SHAPES = [(3, 2), (5,), ()]


class OwnDict(dict):
    pass


class Upper(dict):
    """Keeps its entries elsewhere than where the C interface of dicts looks."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.inner = dict(*args, **kwargs)

    def __getitem__(self, key):
        return self.inner[key]

    def __setitem__(self, key, value):
        self.inner[key] = value

    def __contains__(self, key):
        return key in self.inner

    def __iter__(self):
        return iter(self.inner)

    def __len__(self):
        return len(self.inner)

    def __delitem__(self, key):
        del self.inner[key]

    def keys(self):
        return self.inner.keys()

    def values(self):
        return self.inner.values()

    def items(self):
        return self.inner.items()

    def get(self, key, default=None):
        return self.inner.get(key, default)

    def setdefault(self, key, default=None):
        return self.inner.setdefault(key, default)

    def update(self, *args, **kwargs):
        self.inner.update(*args, **kwargs)

    def pop(self, *args):
        return self.inner.pop(*args)

    def clear(self):
        self.inner.clear()

    def copy(self):
        return Upper(self.inner)


def build(case, **options):
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    return params, case.ours([{"params": params[:2]}, {"params": params[2:]}], **options)


def step_both(opts, both, times: int = 1) -> None:
    for _ in range(times):
        for p, q in zip(*both, strict=True):
            p.grad = gradient_like(p)
            q.grad = p.grad.clone()
        for opt in opts:
            opt.step()


def pair(case, change, **options):
    """Ours with containers of other classes, and ours with torch's."""
    both, opts = [], []
    seed = torch.seed()
    for _ in range(2):
        torch.manual_seed(seed)
        params, opt = build(case, **options)
        both.append(params)
        opts.append(opt)
    change(opts[0])
    return opts, both


def assert_same(opts, both) -> None:
    """But for the last bit: some containers take the Python rule."""
    for p, q in zip(*both, strict=True):
        assert_near(p, q)
        mine, theirs = (opt.state.get(t, {}) for opt, t in zip(opts, (p, q), strict=True))
        assert_same_entries(mine, theirs)


def assert_same_entries(mine, theirs) -> None:
    assert sorted(mine) == sorted(theirs)
    for key, value in theirs.items():
        assert mine[key].dtype is value.dtype
        assert_near(mine[key], value, key)
