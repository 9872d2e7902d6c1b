"""Devices without float64, as MPS and some XPUs: the CPU takes their place, where any operator that
makes some raises what MPS raises."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import seam
import torch
from cases import RICHEST_OF, leaf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedopt


class NoFloat64(TorchDispatchMode):
    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            if isinstance(t, torch.Tensor) and t.dtype == torch.float64:
                if t.device.type == self.device:
                    raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype: {function}")
        return made


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(fusedopt.backend, "native", None)
    with seam.without_float64("cpu"):
        yield


def test_the_fixture_forbids_it(narrow):
    for make in (lambda: torch.zeros(4, dtype=torch.float64), lambda: torch.ones(()).double()):
        with pytest.raises(TypeError, match="float64"), NoFloat64("cpu"):
            make()


WAYS = {
    "clipped": {"max_grad_norm": 1.5},
    "scaled": {"amp_fused": True},
    "both": {"max_grad_norm": 1.5, "amp_fused": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_steps_are_right(name, way, narrow):
    case, start = RICHEST_OF[name], [torch.randn(n) for n in (5, 300, 0)]
    params, exact = [leaf(p) for p in start], [leaf(p, torch.float64) for p in start]
    opt, stock = case.ours(params, **WAYS[way]), case.exact(exact)
    for _ in range(3):
        for p, q in zip(params, exact, strict=True):
            q.grad = torch.randn(len(q)).double()
            p.grad = q.grad.float() * (8 if opt.amp_fused else 1)
        if opt.amp_fused:
            opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        with NoFloat64("cpu"):
            opt.step()
            norm = opt.grad_norm
        if "max_grad_norm" in WAYS[way]:
            expected = torch.nn.utils.clip_grad_norm_(exact, 1.5)
            assert norm.dtype == torch.float32
            torch.testing.assert_close(norm.double(), expected, rtol=1e-5, atol=0)
        stock.step()
    for p, q in zip(params, exact, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=1e-5)


def test_clip_grad_norm_(narrow):
    params, others = [[leaf(torch.ones(n)) for n in (5, 300)] for _ in range(2)]
    for p, q in zip(params, others, strict=True):
        p.grad = torch.randn(len(p))
        q.grad = p.grad.clone()
    with NoFloat64("cpu"):
        norm = fusedopt.clip_grad_norm_(params, 1.0)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(others, 1.0))
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_norm_that_moves_there():
    """It loses its digits before it leaves a device that has them."""
    norm = torch.tensor(2.0, dtype=torch.float64)
    with seam.without_float64("meta"), NoFloat64("meta"):
        assert seam.moved(norm, torch.device("meta")).dtype == torch.float32


def test_which_devices_have_none(monkeypatch):
    for has in (True, False):
        monkeypatch.setattr(
            torch.xpu, "get_device_properties", lambda _, has=has: SimpleNamespace(has_fp64=has)
        )
        xpu = seam.widest_float(torch.device("xpu", int(has)))
        assert xpu == (torch.float64 if has else torch.float32)
    assert seam.widest_float(torch.device("mps", 0)) == torch.float32
    assert seam.widest_float(torch.device("cuda", 0)) == torch.float64
