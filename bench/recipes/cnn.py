"""Classifies small images: LeNet with batch norm, augmentation, SGD with momentum, StepLR.

The images are CIFAR-10's with --data FOLDER, which holds its python files (data_batch_1 to
data_batch_5, test_batch), or else scikit-learn's digits. Those are not mirrored: the mirror image
of a digit is no digit.

The losses of stock and fusedopt agree to 100,000 rounding errors. Both compute the same formula,
but round in another order. In float64 that hardly shows. Seen: 3. In float32 it now and then
decides which of two pixels max pooling takes, and the runs part a little. Seen: 16,000; and 20,000
between two modes of torch.optim itself. Runs far longer than the default may need --roundings.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import StepLR

from bench import report
from bench.recipes import data, side_by_side
from bench.recipes.data import Samples
from bench.recipes.side_by_side import Pair, Training

ROUNDINGS = 100_000
BATCH = 64
LOWER_AFTER = 30  # epochs


def lenet(channels: int, side: int) -> nn.Sequential:
    """For images of (channels, side, side)."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 6, 5, padding=2), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5, padding=2), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(16 * (side // 4) ** 2, 120), nn.ReLU()),
        *(nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, 10),
    )


def augment(images: Tensor, mirror: bool) -> Tensor:
    """A random crop of every image, after an eighth of its side was added as a black margin; with
    `mirror`, half of them are flipped from left to right."""
    count, _, _, side = images.shape
    margin = side // 8
    padded = functional.pad(images, [margin] * 4)
    starts = torch.randint(2 * margin + 1, (2, count, 1))
    rows, columns = starts + torch.arange(side)
    if mirror:
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    which = torch.arange(count)[:, None, None]
    return padded.movedim(1, -1)[which, rows[:, :, None], columns[:, None]].movedim(-1, 1)


def train(
    optim: ModuleType, training: Samples, validation: Samples, options: Namespace
) -> Training:
    channels, side = training.inputs.shape[1:3]
    model = lenet(channels, side).to(training.inputs)
    optimizer = optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)
    scheduler = StepLR(optimizer, step_size=LOWER_AFTER, gamma=0.1)
    accuracy = []
    for _ in range(options.epochs):
        for images, labels in training.batches(BATCH):
            optimizer.zero_grad()
            scores = model(augment(images, mirror=options.data is not None))
            loss = functional.cross_entropy(scores, labels)
            loss.backward()
            optimizer.step()
            yield loss.item()
        scheduler.step()
        accuracy.append(validation.accuracy(model))
    return {"accuracy": accuracy}


def main(argv: Sequence[str] | None = None) -> list[Pair]:
    parser = side_by_side.parser(__file__, __doc__, ROUNDINGS)
    parser.add_argument("--epochs", type=side_by_side.count, default=40)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of CIFAR-10")
    options = parser.parse_args(argv)

    split = data.from_folder(data.cifar10, options.data) if options.data else data.digits(12)
    training, validation = (part.to(options) for part in split)
    steps = options.epochs * training.steps(BATCH)
    pair = side_by_side.run(options, "SGD", steps, train, training, validation, options)

    for label, side in pair.sides().items():
        report.console.print(f"{label:12} validation accuracy {side.result['accuracy'][-1]:.1%}")
    with side_by_side.png(options, columns=2) as (losses, accuracy):
        pair.draw_losses(losses)
        losses.set(title="Cross-entropy")
        pair.draw_recorded(accuracy, "accuracy")
        accuracy.set(title="Validation")
        accuracy.axvline(LOWER_AFTER, color="black", lw=1, ls=":", label="from here lr × 0.1")
    return side_by_side.conclude([pair])


if __name__ == "__main__":
    main()
