"""Reads handwritten digits: 784 pixels, 10 hidden units, 10 classes; softmax, cross-entropy, Adam.

The digits are scikit-learn's, or MNIST's with --data FOLDER, which holds its four files
(train-images-idx3-ubyte and so on, also as .gz).

The losses of stock and fusedopt agree to 1,000 rounding errors. Both compute the same formula, but
round in another order, and such a difference can grow while two layers learn. Seen: 3; runs far
longer than the default may drift further apart, and --roundings allows for it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from torch import nn
from torch.nn import functional

from bench import report
from bench.recipes import data, side_by_side
from bench.recipes.data import Samples
from bench.recipes.side_by_side import Pair, Training

ROUNDINGS = 1_000
BATCH = 32


def train(
    optim: ModuleType, training: Samples, validation: Samples, options: Namespace
) -> Training:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.ReLU(), nn.Linear(10, 10))
    model.to(training.inputs)
    optimizer = optim.Adam(model.parameters(), lr=1e-3)
    accuracy: dict[str, list[float]] = {"training": [], "validation": []}
    for _ in range(options.epochs):
        for x, y in training.batches(BATCH):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)  # the softmax is in here
            loss.backward()
            optimizer.step()
            yield loss.item()
        accuracy["training"].append(training.accuracy(model))
        accuracy["validation"].append(validation.accuracy(model))
    return accuracy


def main(argv: Sequence[str] | None = None) -> list[Pair]:
    parser = side_by_side.parser(__file__, __doc__, ROUNDINGS)
    parser.add_argument("--epochs", type=side_by_side.count, default=30)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of MNIST")
    options = parser.parse_args(argv)

    split = data.from_folder(data.mnist, options.data) if options.data else data.digits(28)
    training, validation = (part.to(options) for part in split)
    steps = options.epochs * training.steps(BATCH)
    pair = side_by_side.run(options, "Adam", steps, train, training, validation, options)

    for label, side in pair.sides().items():
        last = ", ".join(f"{part} {values[-1]:.1%}" for part, values in side.result.items())
        report.console.print(f"{label:12} accuracy: {last}")
    with side_by_side.png(options, columns=3) as (losses, *accuracy):
        pair.draw_losses(losses)
        losses.set(title="Cross-entropy")
        for axis, part in zip(accuracy, ("training", "validation"), strict=True):
            pair.draw_recorded(axis, part)
            axis.set(title=f"Accuracy in {part}", ylabel="accuracy")
    return side_by_side.conclude([pair])


if __name__ == "__main__":
    main()
