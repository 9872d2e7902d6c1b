"""What the native module may read of torch's tensor objects, learned and proven at import.

torch has no C interface for how long a storage is, nor for whether a tensor is negated lazily, and
asking Python costs more than the update of a small tensor. The words lie at fixed places, which
``csrc/torch_layout.cpp`` finds by looking for known values in samples; what it found must then
hold for other tensors and after everything that moves a tensor.

Together these words say what a tensor is. While they stay as they were, the native module takes the
tensor for the one that it has looked at: everything that moves one must change a word. It also
counts up the versions of what it writes, and finds the gradients that Python has seen. Where any of
this does not hold, torch is asked each time: slower, but right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# What it may forget: see csrc/python/layout.cpp.
WHAT = ("memory", "negative", "words", "version", "gradient")

_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
_DTYPES += [torch.int64, torch.int16, torch.uint8]


def _empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def _samples() -> list[Tensor]:
    """Tensors whose storages differ in address and in size. The first two share storage and version
    counter."""
    first = _empty((3, 7))
    # Many, and each with one beside it that is not: by chance, an address of an object could have a
    # bit that a few samples share.
    negative = [_empty((n,), torch.complex64).conj().imag for n in range(1, 17)]
    positive = [torch._neg_view(tensor) for tensor in negative]
    return [
        first,
        first.detach(),
        *(_empty((rank + 1,) * rank) for rank in range(8)),
        *(_empty((11 + i,), dtype) for i, dtype in enumerate(_DTYPES)),
        _empty((29, 6))[1:, ::2],
        _empty((2, 31)).t(),
        _empty((37,)).expand(5, 37),
        _empty((0, 3)),
        torch.nn.Parameter(_empty((41, 1))),
        torch.frombuffer(bytearray(92), dtype=torch.float32),  # not from torch's allocator
        *(tensor for pair in zip(negative, positive, strict=True) for tensor in pair),
        torch._neg_view(_empty((2, 3, 4, 5, 6), torch.float64)),
    ]


def _gradients() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Leaves, their gradients, leaves that have none, and tensors like them of which autograd knows
    nothing."""
    samples = []
    for n in range(1, 17):
        leaf, grad, without, other = (_empty((n,)) for _ in range(4))
        leaf.requires_grad_().grad = grad
        without.requires_grad_()
        if n % 2:  # it had one
            without.grad = _empty((n,))
            without.grad = None
        samples.append((leaf, grad, without, other))
    return samples


def _alike(module: Any, rank: int) -> list[Tensor]:
    """Tensors of one kind, made where the memory was full of other things before."""
    tensors = []
    for byte in (0x00, 0xFF, 0x55, 0xAA):
        module.fill_free_memory(byte)
        tensors += [_empty((2,) * rank) for _ in range(8)]
    return tensors


def _moves() -> Iterator[Tensor]:
    """A tensor after each thing that can happen to it, and others."""
    tensor = _empty((64,)).requires_grad_()
    yield tensor
    tensor.data = _empty((64,))
    yield tensor
    tensor.data = _empty((5, 3), torch.bfloat16)
    yield tensor
    tensor.data = _empty((5, 3), torch.float16)
    yield tensor
    tensor.set_(_empty((4, 4, 2), torch.float16))  # type: ignore[call-overload]
    yield tensor
    storage = tensor.requires_grad_(False).untyped_storage()
    for offset, shape, strides in (
        (0, (4, 2, 4), (8, 4, 1)),
        (0, (4, 2, 4), (1, 4, 8)),
        (2, (4, 2, 3), (1, 4, 8)),
        (2, (3,), (1,)),
    ):
        yield tensor.set_(storage, offset, shape, strides)
    yield tensor.resize_(7, 13)
    yield tensor.t_()
    for size in (200, 0, 1000, 182):
        tensor.untyped_storage().resize_(size)
        yield tensor
    yield tensor.share_memory_()
    memory = _empty((256,), torch.uint8).untyped_storage()
    for dtype in _DTYPES:  # of one shape, in one storage
        yield _empty((0,), dtype).set_(memory, 0, (3,), (1,))
        yield _empty((0,), dtype).set_(memory, 0, (2, 2), (2, 1))
    other = torch.nn.Parameter(_empty((9,)))
    yield other
    torch.utils.swap_tensors(tensor, other)
    yield from (tensor, other)
    owner = _empty((19,))
    yield owner
    lazy = torch._lazy_clone(owner)  # from now on both share memory until one is written
    yield from (owner, lazy)
    yield lazy.fill_(0.0)
    yield torch.frombuffer(bytearray(48), dtype=torch.float32)
    complex_ = _empty((6, 2), torch.complex128)
    yield from (complex_, complex_.conj(), complex_.conj().imag, complex_.real, complex_.imag)
    yield torch.view_as_real(complex_)
    negated = _empty((3, 2))
    yield negated
    negated.data = torch._neg_view(negated)
    yield negated
    yield torch._neg_view(negated)
    with torch.inference_mode():
        yield _empty((21,))


def prove(module: Any) -> str | None:
    """Lets the native module learn the layout, and takes from it what does not hold. Returns what
    was wrong, or None."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            return _prove(module)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        # Another torch, in which a sample cannot be made: nothing is known, which is no error.
        for what in WHAT:
            module.forget_layout(what)
        return f"{type(error).__name__}: {error}"


def _prove(module: Any) -> str | None:
    samples = _samples()
    if any(type(t) not in (Tensor, torch.nn.Parameter) for t in samples):
        return "imported inside of a mode that makes tensors of another kind"
    for i, tensor in enumerate(samples):
        torch._C._increment_version([tensor] * (3 + 5 * i))
    gradients = _gradients()  # held until everything is learned
    module.learn_layout(
        [
            (t, t._cdata, t.untyped_storage()._cdata, *_memory(t), t.is_neg(), t._version)
            for t in samples
        ],
        [tuple(tensor._cdata for tensor in sample) for sample in gradients],
    )
    for rank in range(6):
        alike = _alike(module, rank)
        module.learn_counts([(t._cdata, t.untyped_storage()._cdata) for t in alike], rank)
    problem = None
    for tensor in (*_samples(), *_moves()):
        memory, is_negative = module.read_layout(tensor)
        if memory != _memory(tensor):
            module.forget_layout("memory")
            problem = "the storage of a tensor is not found"
        if is_negative != tensor.is_neg():
            module.forget_layout("negative")
            problem = "the negative bit of a tensor is not found"
        if not _counts_versions(module, tensor):
            module.forget_layout("version")
            problem = "the version of a tensor is not found"
    wrapper = Tensor._make_wrapper_subclass(_Wrapper, (3,))
    if not _counts_versions(module, wrapper):
        module.forget_layout("version")
        problem = "the version of a tensor without memory is not found"
    if not all(_finds_gradient(module, owners) for owners in range(1, 5)):
        module.forget_layout("gradient")
        problem = "the gradient of a tensor is not found"
    if problem is None:
        module.trust_words()
        if not all(map(_changes_words(module), _moves())):
            module.forget_layout("words")
            problem = "a tensor moves without a word that changes"
    return problem


class _Wrapper(Tensor):
    """As DTensors are."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, *rest: Any) -> Any:
        raise NotImplementedError(f"{func} of a tensor without memory")


def _counts_versions(module: Any, tensor: Tensor) -> bool:
    if tensor.is_inference():  # has none, and must not get one
        module.bump_versions([tensor])
        return True
    before = tensor._version
    module.bump_versions([tensor, tensor])
    return tensor._version == before + 2


def _finds_gradient(module: Any, owners: int) -> bool:
    """Of leaves, as many as here are owners, which have one gradient. That nobody in Python holds
    it and its object is an owner all the same says that the object lives as long as it does."""
    leaves = [torch.nn.Parameter(_empty((5,))), *(_empty((5,)) for _ in range(owners - 1))]
    if module.read_gradient(leaves[-1]) is not None or module.read_gradient(leaves[0]) is not None:
        return False
    grad = _empty((5,))
    for leaf in leaves:
        leaf.requires_grad_().grad = grad
    address = id(grad)
    del grad
    found, owned = module.read_gradient(leaves[-1]) or (None, 0)
    if id(found) != address or owned != owners + 1:
        return False
    for leaf in leaves:
        leaf.grad = None
    return module.read_gradient(leaves[0]) is None


def _changes_words(module: Any) -> Callable[[Tensor], bool]:
    """Whether, with each tensor that comes, those that have moved have other words."""
    seen: dict[int, tuple[Tensor, Any, tuple[Any, ...]]] = {}

    def check(tensor: Tensor) -> bool:
        fine = all(
            _facts(t) == facts or not remembered.is_equal(t)
            for t, remembered, facts in seen.values()
        ) and all(
            _is_moved(facts, now, remembered.distance_to(tensor))
            for now in [_facts(tensor)]
            for _, remembered, facts in seen.values()
        )
        for t in (tensor, *(t for t, _, _ in seen.values())):
            seen[id(t)] = t, module.RememberedTensor(t), _facts(t)
        return fine

    return check


def _is_moved(before: tuple[Any, ...], now: tuple[Any, ...], distance: int | None) -> bool:
    """Whether a tensor is another one by nothing but the place of its memory, if there is a
    distance."""
    if distance is None:
        return True
    (*kind, memory), (*other, moved) = before, now
    if memory is not None:
        memory = memory[0] + distance, memory[1]
    return kind == other and memory == moved


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    """What a step must know of a tensor. (Of memory that is shared until one writes to it the
    address cannot be asked without parting it.)"""
    kind = (tensor.dtype, tensor.device, tensor.layout, tensor.is_neg(), tensor.is_conj())
    place = (tensor.shape, tensor.stride(), tensor.storage_offset())
    is_shared = torch._C._is_cow_tensor(tensor)  # type: ignore[attr-defined]
    return (*kind, *place, is_shared, None if is_shared else _memory(tensor))


def _memory(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
