"""Shapes of the parameters that the step benchmark updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

Shape = tuple[int, ...]


def gpt2_124m() -> Iterator[Shape]:
    """GPT-2 small; the output layer is tied to the token embedding."""
    width = 768
    yield (50257, width)
    yield (1024, width)
    for _ in range(12):
        yield from norm(width)
        yield from ((width, 3 * width), (3 * width,))
        yield from ((width, width), (width,))
        yield from norm(width)
        yield from ((width, 4 * width), (4 * width,))
        yield from ((4 * width, width), (width,))
    yield from norm(width)


def resnet50() -> Iterator[Shape]:
    """torchvision's ResNet-50: convolutions without bias, each with its batch norm."""
    yield from convolution(3, 64, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from convolution(channels, width, 1)
            yield from convolution(width, width, 3)
            yield from convolution(width, 4 * width, 1)
            if block == 0:
                yield from convolution(channels, 4 * width, 1)
            channels = 4 * width
    yield from ((1000, channels), (1000,))


def llama_1b() -> Iterator[Shape]:
    """Llama 3.2 1B; the output layer is tied to the token embedding."""
    width, keys, hidden = 2048, 512, 8192
    yield (128256, width)
    for _ in range(16):
        yield from ((width, width), (keys, width), (keys, width), (width, width))
        yield from ((hidden, width), (hidden, width), (width, hidden))
        yield from ((width,), (width,))
    yield (width,)


def lora_2048() -> Iterator[Shape]:
    """Adapters of rank 8 for 1,024 matrices of 4,096 by 4,096."""
    for _ in range(1024):
        yield from ((8, 4096), (4096, 8))


def convolution(channels_in: int, channels_out: int, kernel: int) -> Iterator[Shape]:
    yield (channels_out, channels_in, kernel, kernel)
    yield from norm(channels_out)


def norm(width: int) -> Iterator[Shape]:
    yield (width,)
    yield (width,)


def repeated(count: int, numel: int) -> Callable[[], Iterator[Shape]]:
    return lambda: iter([(numel,)] * count)


WORKLOADS: dict[str, Callable[[], Iterator[Shape]]] = {
    "many_small": repeated(1_000, 64),
    "tiny_10k": repeated(10_000, 16),
    "mlp_100x10k": repeated(100, 10_000),
    "resnet50": resnet50,
    "gpt2_124m": gpt2_124m,
    "one_large": repeated(1, 64 * 2**20),
    "llama_1b": llama_1b,
    "groups_465": repeated(465, 65_536),
    "small_10k": repeated(10_000, 64),
    "lora_2048": lora_2048,
}
# On a CPU only when asked for. There the first takes 75 GB and minutes; for the others, others have
# figures of GPUs.
FOR_A_GPU = ("llama_1b", "groups_465", "small_10k", "lora_2048")
OWN_GROUPS = ("groups_465",)  # a param group for each tensor
# What others have reported of torch's fused mode. It may be of another GPU: a hint, no comparison.
REPORTED = {
    "groups_465": "58.8 ms on an L4 (rf-detr #1409, a step of 465 param groups)",
    "small_10k": "20.8 ms on an H200 (pytorch #178641)",
}
LARGE = ("gpt2_124m", "one_large", "llama_1b")

TENSORS_AND_PARAMETERS = {
    "many_small": (1_000, 64_000),
    "tiny_10k": (10_000, 160_000),
    "mlp_100x10k": (100, 1_000_000),
    "resnet50": (161, 25_557_032),
    "gpt2_124m": (148, 124_439_808),
    "one_large": (1, 67_108_864),
    "llama_1b": (146, 1_235_814_400),
    "groups_465": (465, 30_474_240),
    "small_10k": (10_000, 640_000),
    "lora_2048": (2_048, 67_108_864),
}


def shapes(workload: str) -> list[Shape]:
    """The shapes of `workload`, checked against the size of the real model."""
    result = list(WORKLOADS[workload]())
    size = len(result), sum(map(math.prod, result))
    assert size == TENSORS_AND_PARAMETERS[workload], f"{workload}: {size}"
    return result
