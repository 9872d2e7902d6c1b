"""How parameters and state are stored, apart from the rules that compute on them.

The rules see values; what is here turns them into what a state dict holds and back. The native
module does the same in ``csrc/storage/``, bit for bit. No tensor is made on torch's default device
or in its default dtype, nor are integers multiplied with a float: the result has that dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import dtensor, tensor_kinds

if TYPE_CHECKING:
    from .rule import Group, Slot

# Elements of one scale of 8-bit state, and the tensors that are too small for it: their state is a
# small part of a model, and often the part that is sensitive (norms, biases).
SCALE_ELEMENTS = 64
SMALLEST_8BIT = 4096

# Key of the random numbers that 8-bit codes are rounded with (csrc/storage/philox.h).
_CODE_KEY = 0x66757365646F7074

EXTRAS = ("master", "master_remainder", "rounding_state", "ema")
HALVES = (torch.bfloat16, torch.float16)


class Extras(NamedTuple):
    """Keys of what a parameter has beside the state of its rule; None for what it has not."""

    master: str | None
    rounding: str | None
    ema: str | None

    @property
    def names(self) -> list[str]:
        return [key for key in self if key is not None]


def extras(group: Group, param: Tensor) -> Extras:
    master = group.get("master_weights") if param.dtype in HALVES else None
    return Extras(
        {None: None, "split": "master_remainder", "fp32": "master"}[master],
        "rounding_state" if param.dtype in HALVES and group.get("rounding") else None,
        "ema" if group.get("ema") is not None else None,
    )


def state_dtype(group: Group, param: Tensor, slot: Slot) -> torch.dtype | None:
    """The dtype that a group declares for a state tensor; None if any will do."""
    declared: torch.dtype | str | None = group.get("state_dtype")
    if declared is None or param.dtype not in (torch.float32, *HALVES):
        return None
    if isinstance(declared, torch.dtype):
        return declared
    if param.numel() < SMALLEST_8BIT or not slot.fits_8bit(group):
        return torch.float32
    return code_dtype(slot)


def code_dtype(slot: Slot) -> torch.dtype:
    return torch.uint8 if slot.unsigned else torch.int8


def is_code(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype in (torch.int8, torch.uint8)


# 8 bits ------------------------------------------------------------------------------------------


def encode(
    value: Tensor, dtype: torch.dtype, step: float = 0, slot: int = 0
) -> tuple[Tensor, Tensor]:
    """Codes of the shape and layout of ``value``, and their scales, in the order of memory."""
    codes = torch.empty_like(value, dtype=dtype, memory_format=torch.preserve_format)
    dense = torch.empty_like(codes, dtype=torch.float32).copy_(value)
    flat = _in_memory(dtensor.local(dense))
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % SCALE_ELEMENTS))
    blocks = padded.view(-1, SCALE_ELEMENTS)
    scales = blocks.abs().amax(1) if blocks.numel() else blocks.new_empty(0)
    # As products, as the native module has it; a small scale has no finite reciprocal.
    raised = torch.ones_like(scales).masked_fill(scales < 2.0**-60, 2.0**64)
    reciprocal = (1 / (scales * raised)).where((scales > 0) & scales.isfinite(), 0)
    ratio = (blocks.abs() * raised[:, None] * reciprocal[:, None]).nan_to_num(0).clamp(max=1)
    if dtype == torch.int8:
        code = (127 * _sqrt(ratio) + 0.5).floor().copysign(blocks)
    else:
        noise = random_bits(_CODE_KEY + slot, int(step), padded.numel()).to(padded)
        exact = 255 * _sqrt(_sqrt(ratio))
        near, noisy = (exact + 0.5).floor(), (exact + noise.view_as(blocks) * 2.0**-16).floor()
        code = torch.where((exact - near).abs() < 2.0**-12, near, noisy)
        code = torch.maximum(code, (blocks > 0).to(code))
    _in_memory(dtensor.local(codes)).copy_(code.view(-1)[: flat.numel()])
    padding = num_scales(dtensor.longest_shard(value)) - scales.numel()
    return codes, dtensor.row_per_shard(torch.nn.functional.pad(scales, (0, padding)), value)


def _sqrt(value: Tensor) -> Tensor:
    """Rounded to nearest, as the native module has it. torch's on the CPU may be MKL's, which is
    off by a bit now and then (of 10^8 codes, 2 were other ones)."""
    return value.double().sqrt().float() if value.device.type == "cpu" else value.sqrt()


def num_scales(numel: int) -> int:
    return (numel + SCALE_ELEMENTS - 1) // SCALE_ELEMENTS


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 values of the shape and layout of the codes."""
    value = torch.empty_like(codes, dtype=torch.float32, memory_format=torch.preserve_format)
    flat = _in_memory(dtensor.local(codes)).float()
    scale = dtensor.local(scales).view(-1).repeat_interleave(SCALE_ELEMENTS)[: flat.numel()]
    if codes.dtype == torch.int8:
        root = flat * torch.tensor(1 / 127, dtype=torch.float32, device="cpu")
        decoded = root * root.abs() * scale
    else:
        square = (flat * torch.tensor(1 / 255, dtype=torch.float32, device="cpu")).square()
        decoded = square * square * scale
    _in_memory(dtensor.local(value)).copy_(decoded)
    return value


def _in_memory(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory."""
    return torch.as_strided(tensor, (tensor.numel(),), (1,))


# Masters and rounding ----------------------------------------------------------------------------


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master of a bfloat16 parameter (csrc/storage/split_master.h)."""
    high = param.view(torch.int16).int() << 16
    master = (high + remainder.int()).view(torch.float32)
    # No master splits like this: a zero or an infinity that somebody else wrote.
    return torch.where(master.isnan(), high.view(torch.float32), master)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """The parameter and the remainder of a float32 master."""
    bits = master.view(torch.int32).long()
    high = (((bits + 0x8000) >> 16) & 0xFFFF).where(~master.isnan(), 0x7FC0)
    low = (bits & 0xFFFF).where(~master.isnan(), 0)
    return _int16(high).view(torch.bfloat16), _int16(low)


def _int16(bits: Tensor) -> Tensor:
    return torch.where(bits >= 0x8000, bits - 0x10000, bits).to(torch.int16)


def round_stochastically(value: Tensor, rounding_state: Tensor) -> Tensor:
    """bfloat16, up or down at random so that the mean is exact (csrc/storage/stochastic.h)."""
    seed, count = 0, 0  # of a fake tensor
    if not tensor_kinds.is_fake(rounding_state):
        seed, count = dtensor.local(rounding_state).view(-1).tolist()
    dense = torch.empty_like(value, memory_format=torch.preserve_format).copy_(value)
    flat = _in_memory(dense)
    bits = flat.view(torch.int32).long() & 0xFFFFFFFF
    rounded = torch.where(
        flat.isfinite(), bits + random_bits(seed, count, flat.numel()).to(bits.device), bits
    )
    high = ((rounded >> 16) & 0xFFFF).where(~flat.isnan(), 0x7FC0)
    result = torch.empty_like(dense, dtype=torch.bfloat16)
    _in_memory(result).copy_(_int16(high).view(torch.bfloat16))
    return result


def random_bits(key: int, step: int, count: int) -> Tensor:
    """16 random bits for each of ``count`` elements (csrc/storage/philox.h), as int64."""
    mask = 0xFFFFFFFF
    block = torch.arange((count + 7) // 8, dtype=torch.int64, device="cpu")
    c0, c1 = block & mask, block >> 32
    c2, c3 = torch.full_like(block, step & mask), torch.full_like(block, step >> 32)
    key0, key1 = key & mask, key >> 32 & mask
    for _ in range(10):
        # Products of 64 bits: the sign is wrong, the bits are right.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (product1 >> 32 & mask) ^ c1 ^ key0, product1 & mask
        c2, c3 = (product0 >> 32 & mask) ^ c3 ^ key1, product0 & mask
        key0, key1 = key0 + 0x9E3779B9 & mask, key1 + 0xBB67AE85 & mask
    words = torch.stack([c0, c1, c2, c3], 1)
    return torch.stack([words & 0xFFFF, words >> 16], 2).view(-1)[:count]


def same_layout(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order in memory."""
    sizes_and_strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(n == 1 or stride == also for n, stride, also in sizes_and_strides)


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill their memory without gaps."""
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() in (0, reach + 1)
