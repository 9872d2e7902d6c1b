"""The data of the recipes: sets that scikit-learn brings along, and files of MNIST and CIFAR-10.

Nothing is downloaded. Every function returns the samples for training and those for validation.
"""

from __future__ import annotations

import argparse
import codecs
import gzip
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.recipes import needed


class Samples(NamedTuple):
    inputs: Tensor
    targets: Tensor

    def batches(self, size: int) -> Iterator[Samples]:
        """All samples once, in a new random order; no batch is larger than `size`, and none much
        smaller, whose gradient would be a wild one."""
        for chosen in torch.randperm(len(self.targets)).tensor_split(self.steps(size)):
            yield Samples(self.inputs[chosen], self.targets[chosen])

    def steps(self, size: int) -> int:
        """How many batches that makes."""
        return -(-len(self.targets) // size)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """The share of samples whose label gets the highest score."""
        model.eval()
        parts = zip(self.inputs.split(1000), self.targets.split(1000), strict=True)
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in parts)
        model.train()
        return right / len(self.targets)

    def to(self, options: argparse.Namespace) -> Samples:
        """On the device and in the dtype of the run; labels stay integers."""
        device, dtype = options.device, options.dtype
        targets = self.targets.to(dtype) if self.targets.is_floating_point() else self.targets
        return Samples(self.inputs.to(device, dtype), targets.to(device))


Split = tuple[Samples, Samples]

# From scikit-learn ----------------------------------------------------------------------------


def digits(side: int = 8) -> Split:
    """1,797 handwritten digits, (1, side, side), 0 to 1; interpolated if not 8 x 8 as scanned."""
    bunch = needed("sklearn.datasets").load_digits()
    images = torch.from_numpy(bunch.images).unsqueeze(1) / 16
    if side != 8:
        images = functional.interpolate(images, (side, side), mode="bilinear")
    return shuffled_split(images, torch.from_numpy(bunch.target))


def breast_cancer() -> Split:
    """569 tumours by 30 measurements; the target is 1.0 if benign, else 0.0."""
    bunch = needed("sklearn.datasets").load_breast_cancer()
    return standardized(bunch.data, bunch.target.astype(float))


def diabetes() -> Split:
    """442 patients by 10 measurements; the target is how far the disease went within a year."""
    bunch = needed("sklearn.datasets").load_diabetes()
    targets = (bunch.target - bunch.target.mean()) / bunch.target.std()
    return standardized(bunch.data, targets)


def standardized(inputs: np.ndarray, targets: np.ndarray) -> Split:
    """Every column of the inputs with mean 0 and standard deviation 1."""
    inputs = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    return shuffled_split(torch.from_numpy(inputs), torch.from_numpy(targets))


def shuffled_split(inputs: Tensor, targets: Tensor) -> Split:
    """Four fifths for training; the same ones in every run."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    train, validation = order.tensor_split([len(order) * 4 // 5])
    return (
        Samples(inputs[train], targets[train]),
        Samples(inputs[validation], targets[validation]),
    )


# From files -----------------------------------------------------------------------------------


def from_folder(load: Callable[[Path], Split], folder: Path) -> Split:
    """What `load` finds in a folder the user named; if it finds none or bad data, the program ends
    with the reason."""
    try:
        return load(folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--data: {error}") from None


def mnist(folder: Path) -> Split:
    """MNIST from its four idx files, as distributed (.gz) or unpacked: (1, 28, 28), 0 to 1."""
    return _mnist_part(folder, "train"), _mnist_part(folder, "t10k")


def _mnist_part(folder: Path, part: str) -> Samples:
    images = read_idx(folder / f"{part}-images-idx3-ubyte", dimensions=3)
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte", dimensions=1)
    return image_samples(folder, images.unsqueeze(1), labels, shape=(1, 28, 28))


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The bytes of an idx file: two zeros, 8 for uint8, the number of dimensions, their sizes as
    big-endian int32, then the values."""
    packed = path.with_name(f"{path.name}.gz")
    if path.exists():
        content = path.read_bytes()
    elif packed.exists():
        try:
            content = gzip.decompress(packed.read_bytes())
        except (EOFError, OSError) as error:
            raise ValueError(f"{packed} cannot be unpacked: {error}") from None
    else:
        raise FileNotFoundError(f"there is no {path} and no {packed.name}")
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(f"{path} is not an idx file of bytes in {dimensions} dimensions")
    sizes = np.frombuffer(content, ">i4", dimensions, offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=header)
    if min(sizes) < 1 or values.size != np.prod(sizes):
        raise ValueError(f"{path} announces {sizes} values and holds {values.size}")
    return torch.from_numpy(values.reshape(sizes).copy())


def cifar10(folder: Path) -> Split:
    """CIFAR-10 from its python files, as in cifar-10-batches-py: (3, 32, 32), 0 to 1."""
    train = [_cifar10_batch(folder / f"data_batch_{number}") for number in range(1, 6)]
    inputs, targets = map(torch.cat, zip(*train, strict=True))
    return Samples(inputs, targets), _cifar10_batch(folder / "test_batch")


def _cifar10_batch(path: Path) -> Samples:
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}; it should be the folder cifar-10-batches-py, with data_batch_1 "
            "to data_batch_5 and test_batch"
        )
    try:
        with path.open("rb") as file:
            batch = ArrayUnpickler(file, encoding="bytes").load()
        images, labels = np.asarray(batch[b"data"]), torch.as_tensor(batch[b"labels"])
    except KeyError as error:
        raise ValueError(f"{path} has no entry {error}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{path} is not a batch of CIFAR-10: {error}") from None
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        raise ValueError(
            f"{path}: data should be uint8 of shape (images, 3072), "
            f"but is {images.dtype} of shape {images.shape}"
        )
    return image_samples(path, torch.from_numpy(images.reshape(-1, 3, 32, 32)), labels, (3, 32, 32))


class ArrayUnpickler(pickle.Unpickler):
    """A pickle may call any function; this one only those that make arrays."""

    arrays = {
        "_reconstruct": np.empty(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "encode": codecs.encode,  # how Python 3 writes bytes for Python 2
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] not in ("numpy", "_codecs") or name not in self.arrays:
            raise ValueError(f"it asks for {module}.{name}")
        return self.arrays[name]


def image_samples(
    where: Path, images: Tensor, labels: Tensor, shape: tuple[int, int, int]
) -> Samples:
    if images.shape[1:] != shape:
        raise ValueError(f"{where}: images of shape {tuple(images.shape[1:])}, expected {shape}")
    if labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(
            f"{where}: {len(images)} images, but labels of shape {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"{where}: a label is not one of 0 to 9")
    return Samples(images.float() / 255, labels.long())
