"""Larger batches, fewer steps: why the learning rate grows with the batch.

A batch of twice the size means half as many steps per epoch. With twice the learning rate the
model gets as far in each epoch (the linear scaling rule); with the same one it falls behind.

The losses of stock and fusedopt agree to 1,000 rounding errors. Both compute the same formula, but
round in another order, and such a difference can grow while two layers learn. Seen: 3.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from itertools import chain
from types import ModuleType

import torch
from torch import nn
from torch.nn import functional

from bench import report
from bench.recipes import data, side_by_side
from bench.recipes.data import Samples
from bench.recipes.side_by_side import Pair, Training

ROUNDINGS = 1_000
SIZES = (16, 32, 64, 128)
LR = 0.05  # of the smallest batch


def train(
    optim: ModuleType, size: int, lr: float, training: Samples, options: Namespace
) -> Training:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    model.to(training.inputs)
    optimizer = optim.SGD(model.parameters(), lr=lr)
    by_epoch = []
    for _ in range(options.epochs):
        for x, y in training.batches(size):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            yield loss.item()
        with torch.no_grad():
            of_all = functional.cross_entropy(model(training.inputs), training.targets)
        by_epoch.append(of_all.item())
    return {"training loss": by_epoch}


def main(argv: Sequence[str] | None = None) -> list[Pair]:
    parser = side_by_side.parser(__file__, __doc__, ROUNDINGS)
    parser.add_argument("--epochs", type=side_by_side.count, default=20)
    options = parser.parse_args(argv)

    training = data.digits()[0].to(options)
    settings = {
        "lr grows with the batch": [(size, LR * size / SIZES[0]) for size in SIZES],
        "lr stays the same": [(size, LR) for size in SIZES],
    }
    pairs = {}
    for size, lr in chain(*settings.values()):
        if (size, lr) not in pairs:  # the smallest batch is in both
            name, steps = f"batch {size}, lr {lr:g}", options.epochs * training.steps(size)
            pair = side_by_side.run(options, name, steps, train, size, lr, training, options)
            pairs[size, lr] = pair

    with side_by_side.png(options, columns=2) as axes:
        for axis, (title, chosen) in zip(axes, settings.items(), strict=True):
            for setting, color in zip(chosen, report.OPTIMIZER_COLORS.values(), strict=False):
                label = f"batch {setting[0]}"
                pairs[setting].draw_recorded(axis, "training loss", label, color)
            axis.set(title=title)
            side_by_side.log_scale(axis)
    return side_by_side.conclude(list(pairs.values()))


if __name__ == "__main__":
    main()
