"""Tells benign tumours from malignant ones: two layers, binary cross-entropy, Adam.

The losses of stock and fusedopt agree to 1,000 rounding errors. Both compute the same formula, but
round in another order, and such a difference can grow while two layers learn. Seen: 1.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from types import ModuleType

import torch
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
    model = nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0))
    model.to(training.inputs)
    optimizer = optim.Adam(model.parameters(), lr=1e-3)
    accuracy = []
    for _ in range(options.epochs):
        for x, y in training.batches(BATCH):
            optimizer.zero_grad()
            loss = functional.binary_cross_entropy_with_logits(model(x), y)
            loss.backward()
            optimizer.step()
            yield loss.item()
        with torch.no_grad():
            benign = model(validation.inputs) > 0
        accuracy.append((benign == validation.targets).double().mean().item())
    return {"accuracy": accuracy}


def main(argv: Sequence[str] | None = None) -> list[Pair]:
    parser = side_by_side.parser(__file__, __doc__, ROUNDINGS)
    parser.add_argument("--epochs", type=side_by_side.count, default=40)
    options = parser.parse_args(argv)

    training, validation = (part.to(options) for part in data.breast_cancer())
    steps = options.epochs * training.steps(BATCH)
    pair = side_by_side.run(options, "Adam", steps, train, training, validation, options)

    for label, side in pair.sides().items():
        report.console.print(f"{label:12} validation accuracy {side.result['accuracy'][-1]:.1%}")
    with side_by_side.png(options, columns=2) as (losses, accuracy):
        pair.draw_losses(losses)
        side_by_side.log_scale(losses)
        losses.set(title="Binary cross-entropy")
        pair.draw_recorded(accuracy, "accuracy")
        accuracy.set(title="Validation")
    return side_by_side.conclude([pair])


if __name__ == "__main__":
    main()
