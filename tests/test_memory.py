"""Memory that is not there: tensors of zeros that autograd keeps without any, and storages that are
shorter than what their tensors span. Nothing is read or written beyond a storage."""

from __future__ import annotations

import contextlib
import random

import pytest
import seam
import torch
from cases import (
    COMPLEX_CASES,
    SCALARS,
    TABLES,
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
from torch import Tensor, nn

import fusedopt

# Options and the dtype of the parameter.
STORED = {
    "plain": ({}, torch.float32),
    "double": ({}, torch.float64),
    "clipped": ({"max_grad_norm": 0.5}, torch.float32),
    "l1": ({"l1": 0.01}, torch.float32),
    "8bit": ({"state_dtype": "8bit"}, torch.float32),
    "bfloat16 state": ({"state_dtype": torch.bfloat16}, torch.float32),
    "average": ({"ema": 0.9}, torch.float32),
    "master": ({"master_weights": "fp32", "state_dtype": "8bit"}, torch.float16),
    "split": ({"master_weights": "split", "ema": 0.9}, torch.bfloat16),
    "rounding": ({"rounding": "stochastic"}, torch.bfloat16),
}
stored = pytest.mark.parametrize("stored", STORED)
SIZE = 4160  # 8-bit state has so many elements at least, and a block of scales that is not full


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch._efficientzerotensor(shape, dtype=dtype)


# Zeros without memory ---------------------------------------------------------------------------


@richest_and_stateless
def test_a_zero_gradient_of_a_backward_as_in_torch(case, backend):
    """At the first step or later, beside parameters with gradients."""
    at = random.randrange(3)
    values = [torch.randn(shape) for shape in [(64,), (3, 5), (), (0, 2), (7,)]]
    both = [[leaf(v) for v in values] for _ in range(2)]
    opts = [case.ours(both[0]), case.stock(both[1])]
    for step in range(4):
        ordinary = torch.randn(7)
        for opt, params in zip(opts, both, strict=True):
            opt.zero_grad()
            for p in params[:-1]:
                if step == at:
                    torch.sgn(p).sum().backward()
                    assert p.grad._is_zerotensor()
                else:
                    p.sum().backward()
            params[-1].grad = ordinary.clone()
            opt.step()
    for p, q in zip(*both, strict=True):
        assert_near(p, q)
        for key, value in opts[1].state[q].items():
            if isinstance(value, Tensor):
                assert_near(opts[0].state[p][key], value, key)


@richest_by_options
@stored
def test_a_zero_gradient_is_a_gradient_of_zeros(case, stored, backend):
    """Bit for bit, with every option."""
    shape = random.choice([(SIZE,), (65, 64)])
    options, dtype = STORED[stored]
    value = torch.randn(shape).to(dtype)
    params = [[leaf(value), leaf(value[:1])] for _ in range(2)]
    torch.manual_seed(5)
    opts = [case.ours(params[0], **options)]
    opts.append(case.ours(params[1], **options))
    for step in range(4):
        grads = [torch.randn(shape).to(dtype), torch.randn(value[:1].shape).to(dtype)]
        for without, (opt, (p, q)) in enumerate(zip(opts, params, strict=True)):
            p.grad, q.grad = grads[0].clone(), grads[1].clone()
            if step in (0, 2):
                p.grad = torch.zeros_like(p) if without else zeros(*shape, dtype=dtype)
            torch.manual_seed(step)  # of rounding
            opt.step()
    assert snapshot(opts[0]) == snapshot(opts[1])


@pytest.mark.parametrize("case", COMPLEX_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float16], ids=str)
def test_zero_gradients_of_other_dtypes(case, dtype, backend):
    value = (
        torch.randn(9, dtype=torch.complex64).to(dtype)
        if dtype.is_complex
        else (torch.randn(9).to(dtype))
    )
    params = [leaf(value), leaf(value)]
    opts = [case.ours(params[:1]), case.ours(params[1:])]
    for step in range(3):
        grad = torch.randn_like(value)
        for p in params:
            p.grad = grad.clone()
        if step != 1:
            params[0].grad, params[1].grad = zeros(9, dtype=dtype), torch.zeros_like(value)
        opts[0].step()
        opts[1].step()
    assert snapshot(opts[0]) == snapshot(opts[1])


@richest_and_stateless
def test_zero_gradients_in_another_layout(case, backend):
    """Expanded, transposed, and of a parameter that is no ordinary memory block."""
    params = [leaf(torch.ones(4, 6).t()), torch.ones(4, 6)[:, ::2].requires_grad_()]
    params.append(leaf(torch.ones(3, 3)))
    expected = [leaf(p) for p in params]
    opts = [case.ours(params), case.stock(expected)]
    for _ in range(3):
        params[0].grad = zeros(6, 4)
        params[1].grad = zeros(4, 3)
        params[2].grad = zeros(3, 3).t()
        for q in expected:
            q.grad = torch.zeros_like(q)
        opts[0].step()
        opts[1].step()
    for p, q in zip(params, expected, strict=True):
        assert_near(p, q)


@richest_and_stateless
@pytest.mark.parametrize("what", ["parameter", "state"])
def test_zero_gradients_where_something_else_has_changed(case, what, backend):
    """A layout or a dtype, since the step before: nothing turns out in the middle of a step."""
    params = [leaf(torch.ones(2, 3, 4, 5)) for _ in range(2)]
    opts = [case.ours(params[:1]), case.stock(params[1:])]
    for kind in ("ordinary", "zero", "zero"):
        for p, opt, make in zip(params, opts, (zeros, torch.zeros), strict=True):
            p.grad = torch.full((2, 3, 4, 5), 2.0) if kind == "ordinary" else make(2, 3, 4, 5)
            opt.step()
        p, state = params[0], opts[0].state.get(params[0], {})
        if what == "parameter":
            p.data = p.detach().clone(memory_format=torch.channels_last)
        for key in state:
            if what == "state" and key not in SCALARS:
                value = state[key].clone(memory_format=torch.channels_last)
                state[key] = value.double() if kind == "zero" else value
    assert_near(*params)


@richest_and_stateless
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_zero_gradients_beside_one_that_is_not_finite(case, dtype, backend):
    """The norm is not, and its product with zero is no number, as of zeros in memory."""
    params = [[leaf(torch.ones(8, dtype=dtype)) for _ in range(2)] for _ in range(2)]
    opts = [case.ours(p, max_grad_norm=1.0) for p in params]
    for opt, make, (p, q) in zip(opts, (zeros, torch.zeros), params, strict=True):
        p.grad, q.grad = make(8, dtype=dtype), torch.full((8,), float("nan"), dtype=dtype)
        opt.step()
    for p, q in zip(*params, strict=True):
        assert p.isnan().all() and q.isnan().all()


@every_name
def test_zero_gradients_of_differentiable_steps(name, backend):
    def through(cls, **more):
        scale = torch.ones(5, requires_grad=True)
        param = scale.clone()
        opt = cls([param], lr=0.1, differentiable=True, **more)
        for _ in range(2):
            param.grad = zeros(5)
            opt.step()
        return torch.autograd.grad(param.square().sum(), scale)[0]

    expected = through(TABLES[name].stock, foreach=False)
    assert_near(through(getattr(fusedopt, name)), expected)


@richest_and_stateless
@pytest.mark.parametrize("clipped", [None, 0.5])
def test_zero_gradients_that_the_step_unscales(case, clipped, backend):
    """And in a step that is skipped. (torch's GradScaler refuses them, and its bookkeeping is done
    here by hand.)"""
    params = [[leaf(torch.ones(8)) for _ in range(2)] for _ in range(2)]
    opts = [case.ours(p, amp_fused=True, max_grad_norm=clipped) for p in params]
    for step in range(4):
        for opt, make, (p, q) in zip(opts, (zeros, torch.zeros), params, strict=True):
            p.grad, q.grad = make(8), torch.full((8,), 3.0 + step)
            opt.found_inf, opt.grad_scale = torch.tensor(float(step == 1)), torch.tensor(8.0)
            opt.step()
    assert snapshot(opts[0]) == snapshot(opts[1])


@every_name
def test_zero_gradients_in_the_backward(name, backend):
    cls = getattr(fusedopt, name)
    params, expected = [leaf(torch.ones(6)) for _ in range(2)], leaf(torch.ones(6))
    opt = fusedopt.attach(params, cls, lr=0.1)
    stock = TABLES[name].stock([expected], lr=0.1, foreach=False)
    for _ in range(3):
        torch.sgn(params[0]).sum().backward()
        assert params[0].grad is None
        expected.grad = torch.zeros(6)
        stock.step()
    assert_near(params[0], expected)
    assert len(opt.state[params[0]]) == len(stock.state[expected])


def test_a_norm_with_zero_gradients(backend):
    for others in (0, 1, 3):
        params = [leaf(torch.ones(4)) for _ in range(1 + others)]
        torch.sgn(params[0]).sum().backward()
        for p in params[1:]:
            p.grad = torch.full((4,), 3.0)
        for foreach in (None, False):
            norm = fusedopt.clip_grad_norm_(params, 1.0, foreach=foreach)
            assert_near(norm, torch.tensor(6.0 * others**0.5 if foreach is None else others > 0.0))
            assert not params[0].grad.any()


def test_scaling_tensors_without_memory(backend):
    """That there was no overflow is a zero, too."""
    params = [leaf(torch.ones(4)) for _ in range(2)]
    opts = [fusedopt.Adam(params[:1], lr=0.1, amp_fused=True), fusedopt.Adam(params[1:], lr=0.1)]
    for _ in range(3):
        for p in params:
            p.grad = torch.ones(4)
        opts[0].found_inf, opts[0].grad_scale = zeros(1), torch.ones(1)
        opts[0].step()
        opts[1].step()
    assert bits(params[0]) == bits(params[1])


@richest_by_options
@stored
def test_parameters_and_state_without_memory_cannot_be_written(case, stored, backend):
    options, dtype = STORED[stored]
    params = [leaf(torch.randn(SIZE).to(dtype)) for _ in range(2)]
    opt = case.ours(params, **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(SIZE).to(dtype)
        opt.step()
    state = opt.state[params[1]]
    for key, value in [*state.items()]:
        state[key] = zeros(*value.shape, dtype=value.dtype)
        before = snapshot(opt)
        with pytest.raises(RuntimeError, match=rf"parameter 1 .*{key}.* is a ZeroTensor"):
            opt.step()
        assert snapshot(opt) == before
        state[key] = value
        opt.step()
    param = zeros(3).requires_grad_()
    param.grad = torch.ones(3)
    opt.add_param_group({"params": [param]})
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match="param group 1, parameter 0 .*is a ZeroTensor"):
        opt.step()
    assert snapshot(opt) == before


@richest_and_stateless
def test_a_learning_rate_without_memory_is_zero(case, backend):
    param = leaf(torch.ones(4))
    opt = case.ours([param], lr=zeros())
    param.grad = torch.ones(4)
    opt.step()
    opt.step()
    assert torch.equal(param, torch.ones(4))


# Storages cut short -----------------------------------------------------------------------------


def cut(tensor: Tensor, num_bytes: int) -> None:
    tensor.untyped_storage().resize_(num_bytes)


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


# Inside of transformations ----------------------------------------------------------------------


@richest_by_options
@pytest.mark.parametrize("role", ["grad", "step", "state"])
def test_one_functional_tensor_among_others(case, role, backend):
    """torch lets it not be written into others: where its loop raises, nothing is written."""
    params = [leaf(torch.randn(4)), leaf(torch.randn(3))]
    opt = case.ours(params)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    opt.step()
    before, state = snapshot(opt), opt.state[params[1]]
    kept, grad = dict(state), params[1].grad

    def inside(zeros):
        if role == "grad":
            params[1].grad = grad + zeros
        for key in kept if role != "grad" else ():
            if (key in SCALARS) == (role == "step"):
                state[key] = kept[key] + zeros.sum().to(kept[key].dtype)
        with contextlib.suppress(RuntimeError):
            opt.step()
            assert role == "step"  # which is read
        return zeros + 1

    torch.func.functionalize(inside)(torch.zeros(3))
    state.update(kept)
    params[1].grad = grad
    if role != "step":
        assert snapshot(opt) == before
    opt.step()


@richest_by_options
@pytest.mark.parametrize("name", ["found_inf", "grad_scale"])
def test_functional_scaling_tensors(case, name, backend):
    params = [leaf(torch.ones(4)) for _ in range(2)]
    opts = [case.ours(params[:1], amp_fused=True), case.stock(params[1:])]

    for at in range(4):
        grad = torch.randn(4)
        grads = [4.0 * grad, grad]
        scaling = {"found_inf": torch.tensor(0.0), "grad_scale": torch.tensor(4.0)}
        for p, g in zip(params, grads, strict=True):
            p.grad = g

        def run(zeros, scaling=scaling):
            scaling[name] = scaling[name] + zeros.sum()
            opts[0].found_inf, opts[0].grad_scale = scaling["found_inf"], scaling["grad_scale"]
            opts[0].step()
            return zeros + 1

        (torch.func.functionalize(run) if at in (1, 2) else run)(torch.zeros(2))
        opts[1].step()
    assert_near(*params)


@richest_by_options
@pytest.mark.parametrize("transform", [torch.func.functionalize, torch.func.vmap])
def test_a_norm_measured_inside_of_a_transformation_leaves_nothing_behind(case, transform, backend):
    params = [leaf(torch.ones(4)) for _ in range(2)]
    opts = [case.ours(params[:1]), case.stock(params[1:])]
    for at in range(4):
        for opt, p in zip(opts, params, strict=True):
            p.grad = torch.full((4,), 2.0)
            if opt is opts[0]:
                opt.max_grad_norm = 1.0
            else:
                torch.nn.utils.clip_grad_norm_([p], 1.0)

            def run(x, opt=opt):
                opt.step()
                return x * 2

            (transform(run) if at == 1 else run)(torch.ones(4))
        if at == 0:
            seam.forget_norm(opts[0])
    assert_near(*params)
    assert_near(opts[0].grad_norm, torch.tensor(4.0))


# Shards -----------------------------------------------------------------------------------------


@pytest.fixture
def one_rank(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@richest_by_options
def test_shards_without_memory(case, backend, one_rank):
    from torch.distributed.tensor import DTensor, Shard

    def shard(value):
        return DTensor.from_local(value, one_rank, [Shard(0)])

    value = torch.randn(8)
    param, twin = nn.Parameter(shard(value.clone())), leaf(value)
    opts = [case.ours([param]), case.ours([twin])]
    for step in range(4):
        grad = torch.randn(8)
        param.grad, twin.grad = shard(grad.clone()), grad.clone()
        if step in (0, 2):
            param.grad, twin.grad = shard(zeros(8)), torch.zeros(8)
        for opt in opts:
            opt.step()
    assert bits(param._local_tensor) == bits(twin)
    for tensor in (param, param.grad, *opts[0].state[param].values()):
        local = getattr(tensor, "_local_tensor", tensor)
        full, before = local.untyped_storage().nbytes(), bits(local)
        cut(local, full - 1)
        with pytest.raises(RuntimeError, match=f"has a storage of {full - 1} bytes"):
            opts[0].step()
        cut(local, full)
        assert bits(local)[:3] == before[:3]


def test_nested_parameters_whose_memory_is_cut_short(backend):
    param = nn.Parameter(torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]))
    opt = fusedopt.SGD([param], lr=0.1, momentum=0.9)
    for _ in range(2):
        opt.zero_grad()
        torch.nested.to_padded_tensor(param, 0.0).sum().backward()
        opt.step()
    for tensor in (param, param.grad, opt.state[param]["momentum_buffer"]):
        values = tensor.detach().values()
        kept = values.clone()
        cut(values, 71)
        with pytest.raises(RuntimeError, match="parameter 0 .*nested tensor"):  # torch sees it
            opt.step()
        cut(values, 72)
        values.copy_(kept)
    opt.step()
