"""What the native module reads of torch's own tensor objects, and the step without knowing it."""

from __future__ import annotations

import contextlib

import pytest
import seam
import torch
from cases import bits, every_name, gradient_like, leaf, richest, snapshot

import fusedopt
from fusedopt import torch_layout

KNOWN = ("memory", "negative")  # what read_layout() says


def memory(tensor):
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128, torch.int8])
def test_every_rank_offset_and_move(module, dtype):
    """With this torch all of it is known, and it is what torch says."""
    for rank in range(6):
        base = torch.empty((3,) * rank, dtype=dtype)
        views = [base, base.detach(), base.t() if rank == 2 else base.clone()]
        if rank:
            views += [base[1:], base[..., ::2], base[:0], base.unsqueeze(0).expand(4, *base.shape)]
        if dtype.is_floating_point:
            views += [base.requires_grad_(), base * 2, torch._neg_view(base)]
        if dtype.is_complex:
            views += [base.real, base.imag, base.conj(), base.conj().imag]
        for tensor in views:
            assert module.read_layout(tensor) == (memory(tensor), tensor.is_neg())
            tensor = tensor.detach().clone()
            for size in (0, 1, 4096):
                tensor.untyped_storage().resize_(size)
                assert module.read_layout(tensor) == (memory(tensor), False)


def test_what_moves_a_tensor(module):
    tensor, other = leaf(torch.ones(3)), torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    for move in (
        lambda: setattr(tensor, "data", torch.ones(7)),
        lambda: torch.utils.swap_tensors(tensor, other),
        lambda: tensor.share_memory_(),
        lambda: tensor.detach().set_(torch.ones(2)) if tensor.dtype is torch.float32 else None,
        lambda: torch.utils.swap_tensors(tensor, other),
    ):
        move()
        for t in (tensor, other):
            assert module.read_layout(t) == (memory(t), False)


def test_learning_again_finds_the_same(module):
    for what in torch_layout.WHAT:
        module.forget_layout(what)
    assert module.read_layout(torch.ones(3)) == (None, None)
    assert torch_layout.prove(module) is None
    assert module.read_layout(torch.ones(3))[1] is False


@pytest.mark.parametrize("what", KNOWN)
def test_what_does_not_hold_is_not_used(module, what, monkeypatch):
    """A torch in which a tensor shows something else there than what it says."""
    real = torch.Tensor.is_neg
    with monkeypatch.context() as patched:
        if what == "memory":
            moves = [torch.ones(3)]
            patched.setattr(torch_layout, "_moves", lambda: iter(moves))
            patched.setattr(
                torch_layout,
                "_memory",
                lambda t: (memory(t)[0], memory(t)[1] + (t is moves[0])),
            )
        else:
            moves = [torch.ones(3)]
            patched.setattr(torch_layout, "_moves", lambda: iter(moves))
            patched.setattr(torch.Tensor, "is_neg", lambda t: t is moves[0] or real(t))
        assert "is not found" in torch_layout.prove(module)
    known = dict(zip(KNOWN, module.read_layout(torch.ones(3)), strict=True))
    assert [name for name in KNOWN if known[name] is None] == [what]


def test_the_proof_does_not_depend_on_where_objects_lie(module):
    kept = []
    for count in range(40):
        kept += [torch.empty(7) for _ in range(count % 13)]
        assert torch_layout.prove(module) is None


def test_another_torch_in_which_samples_cannot_be_made(module, monkeypatch):
    def fails():
        raise RuntimeError("no such function")

    with monkeypatch.context() as patched:
        patched.setattr(torch_layout, "_samples", fails)
        assert "no such function" in torch_layout.prove(module)
    assert module.read_layout(torch.ones(3)) == (None, None)


def test_versions_are_counted(module):
    param = leaf(torch.ones(3))
    wrapper = torch_layout._Wrapper._make_wrapper_subclass(torch_layout._Wrapper, (3,))
    view = param.detach()[1:]
    for tensor in (param, view, torch.ones(2).to_sparse(), torch.ones(2, device="meta"), wrapper):
        before = tensor._version
        module.bump_versions([tensor])
        assert tensor._version == before + 1
    before = view._version
    with torch.inference_mode():
        inference = torch.ones(3)
    module.bump_versions([inference, param])
    assert param._version == view._version == before + 1  # one counter


def test_gradients_are_found(module):
    owner = leaf(torch.ones(4))
    params = [leaf(torch.ones(3)), torch.nn.Parameter(torch.ones(2)), owner.detach()[1:]]
    params[0].register_hook(lambda grad: grad)
    params[2].requires_grad_()
    for param in params:
        assert module.read_gradient(param) is None
        param.grad = torch.full_like(param, 7.0)
        found, _ = module.read_gradient(param)
        assert found is param.grad
        param.grad = None
        assert module.read_gradient(param) is None
        assert found.tolist() == [7.0] * param.numel()  # the object holds it
        param.square().sum().backward()
        assert module.read_gradient(param) is None  # nobody in Python has seen it
        grad = param.grad
        assert module.read_gradient(param)[0] is grad
    assert module.read_gradient(torch.ones(3)) is None


class Doubling(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        value = func(*args, **(kwargs or {}))
        return value * 2 if func == torch.Tensor.grad.__get__ else value


def test_code_of_others_decides_what_grad_is(module, monkeypatch):
    """Also from one step to the next."""

    def run(times, *contexts):
        param = leaf(torch.ones(3))
        param.grad = torch.ones(3)
        opt = fusedopt.SGD([param], lr=0.25, max_grad_norm=100.0)
        opt.step()
        for enter in contexts:
            with enter():
                opt.step()
        return 1 - 0.25 * (1 + times) == param[0].item()

    attribute = torch.Tensor.grad

    @contextlib.contextmanager
    def patched():
        tripled = property(lambda t: attribute.__get__(t) * 3, attribute.__set__)
        with monkeypatch.context() as context:
            context.setattr(torch.Tensor, "grad", tripled, raising=False)
            yield

    assert run(2, Doubling)
    assert run(3, patched)
    assert run(6, Doubling, contextlib.nullcontext, patched)


@pytest.mark.parametrize("what", ["version", "gradient"])
def test_another_torch_in_which_these_are_elsewhere(module, what, monkeypatch):
    name = {"version": "_counts_versions", "gradient": "_finds_gradient"}[what]
    with monkeypatch.context() as patched:
        patched.setattr(torch_layout, name, lambda *_: False)
        assert f"the {what} of a tensor" in torch_layout.prove(module)
    param = leaf(torch.ones(3))
    param.grad = torch.ones(3)
    if what == "gradient":
        assert module.read_gradient(param) is None
    opt, before = fusedopt.SGD([param], lr=0.25), param._version
    for step in range(1, 4):
        opt.step()
        assert param._version == before + step
        assert param.tolist() == [1 - 0.25 * step] * 3


def test_tensors_of_a_kind(module):
    """Their words differ only in where they are; what else differs is another kind."""
    for shape in [(), (5,), (2, 3), (1, 2, 1, 3, 4)]:
        tensor = torch.randn(shape)
        kind = module.RememberedTensor(tensor)
        module.fill_free_memory(0xA5)
        for other in (torch.randn(shape), torch.ones_like(tensor)):
            assert kind.distance_to(other) == other.data_ptr() - tensor.data_ptr()
            assert not kind.is_equal(other)
        base = torch.randn(2, *shape)
        for other in (
            torch.randn(7, *shape),
            torch.randn(shape, dtype=torch.float64),
            torch.ones(shape, dtype=torch.int32),
            base[0],
            base[1],
            torch.randn(shape).requires_grad_(),
            torch._neg_view(torch.randn(shape)),
            torch.from_numpy(torch.randn(shape).numpy()),
            torch.ones(()).expand(2, *shape),
        ):
            assert kind.distance_to(other) is None
        torch._C._increment_version([tensor])
        assert kind.is_equal(tensor) and kind.distance_to(tensor) == 0


def test_a_kind_that_hides_what_moves(module, monkeypatch):
    """A torch in which tensors that seem to be of one kind are not."""

    def different(_, rank):
        return [torch.empty((2,) * rank, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]

    with monkeypatch.context() as patched:
        patched.setattr(torch_layout, "_alike", different)
        assert "moves without a word" in torch_layout.prove(module)
    param = leaf(torch.ones(3))
    opt = fusedopt.SGD([param], lr=0.25)
    for dtype in (torch.float32, torch.float32, torch.float32, torch.bfloat16):
        param.grad = None
        param.grad_dtype = None
        param.grad = torch.ones(3, dtype=dtype)
        opt.step()
        assert not seam.has_repeated(opt)
    assert param.tolist() == [0.0] * 3


FORGOTTEN = pytest.mark.parametrize(
    "forgotten",
    [("memory",), ("negative",), ("version", "gradient"), torch_layout.WHAT],
    ids=str,
)


@FORGOTTEN
@richest
def test_the_same_steps_without(module, case, forgotten):
    """Bit for bit, with everything that is read: storages, negative bits, overlaps."""

    def run():
        torch.manual_seed(1)
        base = torch.randn(5)
        params = [leaf(torch.randn(shape)) for shape in [(64,), (3, 2), (), (0,)]]
        params += [base[:3].detach().requires_grad_(), base[1:].detach().requires_grad_()]
        opt = case.ours(params, ema=0.9)
        for at in range(4):
            for p in params:
                p.grad = gradient_like(p)
            params[1].grad = torch._neg_view(params[1].grad)
            if at == 2:
                params[0].grad = torch._efficientzerotensor((64,), dtype=torch.float32)
                params[1].data = params[1].data.clone()
            opt.step()
        return snapshot(opt)

    expected = run()
    for what in forgotten:
        module.forget_layout(what)
    assert run() == expected


@FORGOTTEN
@every_name
def test_storages_cut_short_without(module, name, forgotten):
    for what in forgotten:
        module.forget_layout(what)
    param = leaf(torch.ones(8))
    opt = getattr(fusedopt, name)([param], lr=0.1)
    for _ in range(2):
        param.grad = torch.ones(8)
        opt.step()
    before = bits(param)
    for tensor in (param.grad, *opt.state.get(param, {}).values()):
        full, kept = tensor.untyped_storage().nbytes(), tensor.clone()
        tensor.untyped_storage().resize_(full - 1)
        with pytest.raises(RuntimeError, match=f"a storage of {full - 1} bytes"):
            opt.step()
        tensor.untyped_storage().resize_(full)
        tensor.copy_(kept)
        assert bits(param) == before
    opt.step()
    assert bits(param) != before
