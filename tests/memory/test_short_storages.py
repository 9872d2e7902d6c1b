"""Storages that were cut short: nothing is read or written beyond them."""

from __future__ import annotations

import pytest
import torch
from cases import (
    Case,
    assert_near,
    bits,
    every_name,
    every_sparse,
    leaf,
    richest_and_stateless,
    richest_by_options,
    snapshot,
)
from torch import Tensor

import fusedopt
from memory import SIZE, STORED, cut, stored


def whole_storage(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def tensors_of(opt, param: Tensor) -> dict[str, Tensor]:
    own = {"parameter": param.detach(), "grad": param.grad}
    return own | {f"state['{key}']": value for key, value in opt.state.get(param, {}).items()}


@richest_and_stateless
@stored
def test_storages_cut_short_between_steps(case, stored, backend):
    """Each in turn, emptied or by a byte; resized back, the optimizer goes on as if nothing had
    happened."""
    options, dtype = STORED[stored]
    values = [torch.randn(SIZE).to(dtype), torch.randn(6).to(dtype)]

    def build():
        torch.manual_seed(7)
        params = [leaf(v) for v in values]
        return params, case.ours(params, **options)

    def step(params, opt, at):
        torch.manual_seed(at)
        for p in params:
            p.grad = torch.randn(p.shape).to(dtype)
        opt.step()

    params, opt = build()
    step(params, opt, 0)
    step(params, opt, 1)
    tensors = tensors_of(opt, params[0])
    for what, tensor in tensors.items():
        full = tensor.untyped_storage().nbytes()
        for left in (0, full // 2, full - 1):
            before, kept = snapshot(opt), whole_storage(tensor).clone()
            cut(tensor, left)
            name = r"it has" if what == "parameter" else rf"{what.translate(ESCAPED)} has"
            with pytest.raises(RuntimeError, match=rf"parameter 0 .*{name} a storage of {left} b"):
                opt.step()
            assert torch.equal(whole_storage(tensor), kept[:left])
            cut(tensor, full)
            whole_storage(tensor).copy_(kept)
            assert snapshot(opt) == before
    step(params, opt, 2)
    others, undisturbed = build()
    for at in range(3):
        step(others, undisturbed, at)
    assert snapshot(opt) == snapshot(undisturbed)


ESCAPED = str.maketrans({"[": r"\[", "]": r"\]"})


@richest_and_stateless
@pytest.mark.parametrize("what", ["parameter", "grad"])
@pytest.mark.parametrize("left", [0, 7])
def test_storages_cut_short_before_the_first_step(case, what, left, backend):
    params = [leaf(torch.ones(3)) for _ in range(2)]
    opt = case.ours(params)
    for p in params:
        p.grad = torch.ones(3)
    before = [bits(params[0]), len(opt.state), *map(bits, opt.state.get(params[0], {}).values())]
    cut(params[1].detach() if what == "parameter" else params[1].grad, left)
    with pytest.raises(RuntimeError, match="parameter 1 .* has a storage of"):
        opt.step()
    now = [bits(params[0]), len(opt.state), *map(bits, opt.state.get(params[0], {}).values())]
    assert now == before
    cut(params[1].detach(), 12)
    params[1].data.fill_(1.0)
    params[1].grad = torch.ones(3)
    opt.step()
    assert bits(params[0]) == bits(params[1])


@richest_and_stateless
@stored
def test_what_a_step_does_not_touch_may_be_gone(case, stored, backend):
    """Weights and state that are set free while their layer is not trained."""
    options, dtype = STORED[stored]
    params = [leaf(torch.ones(SIZE, dtype=dtype)) for _ in range(2)]
    opt = case.ours(params, **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones(SIZE, dtype=dtype)
        opt.step()
    params[0].grad = None
    for tensor in (params[0].detach(), *opt.state[params[0]].values()):
        if isinstance(tensor, Tensor):
            cut(tensor, 0)
    before = bits(params[1])
    for _ in range(2):
        opt.step()
    assert bits(params[1]) != before


@richest_and_stateless
@pytest.mark.parametrize("role", ["grad", "parameter"])
def test_views_in_a_storage_that_is_cut_behind_them(case, role, backend):
    """Near its end, strided, expanded and without elements: what counts is what they span."""
    for make, needed in [
        (lambda base: base[10:20], 20),
        (lambda base: base[10:20:3], 20),
        (lambda base: base[2:].view(9, 2)[:, ::2], 19),
        (lambda base: base[4:19].view(5, 3).t(), 19),
        (lambda base: base[20:], 0),
        (lambda base: base[4:5].expand(7), 5),
    ]:
        base = torch.randn(20)
        values = make(base).clone()
        if role == "parameter":
            if needed == 5:
                continue
            param = make(base).detach().requires_grad_()
            param.grad = torch.ones_like(param)
        else:
            param = leaf(values)
            param.grad = make(base)
        expected = leaf(values)
        expected.grad = param.grad.clone()
        opts = [case.ours([param]), case.stock([expected])]
        for _ in range(2):
            for opt in opts:
                opt.step()
        kept = base[:needed].clone()
        cut(base, 4 * needed)  # enough
        base.set_(base.untyped_storage(), 0, (needed,))
        for opt in opts:
            opt.step()
        assert_near(param, expected)
        if not needed:
            continue
        kept = base.clone()
        cut(base, 4 * needed - 1)
        state = [bits(v) for v in opts[0].state[param].values() if isinstance(v, Tensor)]
        with pytest.raises(RuntimeError, match=f"has a storage of {4 * needed - 1} bytes, but"):
            opts[0].step()
        assert state == [bits(v) for v in opts[0].state[param].values() if isinstance(v, Tensor)]
        cut(base, 4 * needed)
        base.copy_(kept)
        for opt in opts:
            opt.step()
        assert_near(param, expected)


@every_sparse
def test_sparse_gradients_whose_values_are_cut_short(name, backend):
    case = Case(name, {"lr": 0.1})
    param = leaf(torch.ones(5, 2))
    opt = case.ours([param])
    for _ in range(2):
        param.grad = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 2), (5, 2), is_coalesced=True)
        opt.step()
    before = snapshot(opt)
    values, indices = param.grad._values(), param.grad._indices()
    for part, full in ((values, 16), (indices, 16)):
        cut(part, full - 4)
        with pytest.raises(RuntimeError, match="parameter 0 .* grad has a storage of 12 bytes"):
            opt.step()
        assert snapshot(opt) == before
        cut(part, full)
        part.fill_(1)
        opt.step()
        before = snapshot(opt)


def test_norms_of_gradients_that_are_cut_short(backend):
    params = [leaf(torch.ones(40)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones(40)
    cut(params[1].grad, 8)
    opt = fusedopt.SGD(params, lr=0.1, max_grad_norm=1.0)
    for call in (opt.step, lambda: fusedopt.clip_grad_norm_(params, 1.0)):
        with pytest.raises(RuntimeError, match="a storage of 8 bytes"):
            call()
        assert torch.equal(params[0], torch.ones(40))
        assert torch.equal(params[0].grad, torch.ones(40))


@pytest.mark.parametrize("name", ["found_inf", "grad_scale"])
@pytest.mark.parametrize("clipped", [None, 1.0])
def test_scaling_tensors_that_are_cut_short(name, clipped, backend):
    param = leaf(torch.ones(4))
    opt = fusedopt.Adam([param], lr=0.1, amp_fused=True, max_grad_norm=clipped)
    for left in (4, 0, 3):
        param.grad = torch.ones(4)
        opt.found_inf, opt.grad_scale = torch.zeros(1), torch.ones(1)
        cut(getattr(opt, name), left)
        if left == 4:
            opt.step()
            continue
        before = snapshot(opt)
        with pytest.raises(RuntimeError, match=f"{name} has a storage of {left} bytes"):
            opt.step()
        assert snapshot(opt) == before


@richest_by_options
@pytest.mark.parametrize("steps", [0, 2])
def test_options_that_are_cut_short(case, steps, backend):
    """Tensors among the options; the message does not print what cannot be read."""
    param = leaf(torch.ones(4))
    names = ["lr", "weight_decay", *(["betas"] if "betas" in case.table.numbers else [])]
    for name in names:
        value = torch.tensor(0.5)
        opt = case.ours([param], **{name: (value, value.clone()) if name == "betas" else value})
        for _ in range(steps):
            param.grad = torch.ones(4)
            opt.step()
        cut(value, 0)
        param.grad = torch.ones(4)
        expected = bits(param)
        with pytest.raises(RuntimeError, match=f"group 0: '{name}' has a storage of 0 bytes"):
            opt.step()
        assert bits(param) == expected
        cut(value, 4)
        value.fill_(0.5)
        opt.step()


@every_name
def test_a_storage_cut_short_in_the_backward(name, backend):
    param = leaf(torch.ones(16))
    opt = fusedopt.attach([param], getattr(fusedopt, name), lr=0.1)
    for _ in range(2):
        param.sum().backward()
    tensors = [v for v in opt.state[param].values() if isinstance(v, Tensor)]
    for tensor in tensors:
        full, before = tensor.untyped_storage().nbytes(), bits(param)
        kept = tensor.clone()
        cut(tensor, full - 1)
        with pytest.raises(RuntimeError, match=f"has a storage of {full - 1} bytes"):
            param.sum().backward()
        assert bits(param) == before
        cut(tensor, full)
        tensor.copy_(kept)
        param.grad = None
        param.sum().backward()
