"""Stops when the loss on a validation set no longer falls, and goes back to the best weights.

A network that is far too large for its data learns the training samples by heart: their loss goes
on falling, while that of samples it has not seen rises.

The losses of stock and fusedopt agree to 1,000 rounding errors, and they stop after the same epoch.
Both compute the same formula, but round in another order, and such a difference can grow while
three layers learn. Seen: 2.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from copy import deepcopy
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


class EarlyStopping:
    """Remembers the weights with the lowest loss so far."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.epoch = self.best_epoch = 0
        self.best_loss = float("inf")
        self.best_weights: dict[str, torch.Tensor] = {}

    def should_stop(self, loss: float, model: nn.Module) -> bool:
        """Call it after every epoch. True if `patience` epochs have brought nothing better."""
        self.epoch += 1
        if loss < self.best_loss:
            self.best_loss, self.best_epoch = loss, self.epoch
            self.best_weights = deepcopy(model.state_dict())
        return self.epoch - self.best_epoch >= self.patience


def train(
    optim: ModuleType, training: Samples, validation: Samples, options: Namespace
) -> Training:
    model = nn.Sequential(
        *(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)),
        nn.Flatten(0),
    ).to(training.inputs)
    optimizer = optim.Adam(model.parameters(), lr=1e-3)
    stopping = EarlyStopping(options.patience)
    curves: dict[str, list[float]] = {"training": [], "validation": []}
    for _ in range(options.epochs):
        for x, y in training.batches(BATCH):
            optimizer.zero_grad()
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            yield loss.item()
        curves["training"].append(mean_loss(model, training))
        curves["validation"].append(mean_loss(model, validation))
        if stopping.should_stop(curves["validation"][-1], model):
            break
    model.load_state_dict(stopping.best_weights)
    return {**curves, "best": stopping.best_epoch, "loss": mean_loss(model, validation)}


@torch.no_grad()
def mean_loss(model: nn.Module, samples: Samples) -> float:
    return functional.mse_loss(model(samples.inputs), samples.targets).item()


def main(argv: Sequence[str] | None = None) -> list[Pair]:
    parser = side_by_side.parser(__file__, __doc__, ROUNDINGS)
    parser.add_argument("--epochs", type=side_by_side.count, default=200, help="at most")
    parser.add_argument("--patience", type=side_by_side.count, default=20, metavar="EPOCHS")
    options = parser.parse_args(argv)

    training, validation = (part.to(options) for part in data.diabetes())
    steps = options.epochs * training.steps(BATCH)
    pair = side_by_side.run(options, "Adam", steps, train, training, validation, options)

    for label, side in pair.sides().items():
        epochs, best, loss = len(side.result["training"]), side.result["best"], side.result["loss"]
        ended = f"{epochs} epochs; the best was number {best}, with validation loss {loss:.6f}"
        report.console.print(f"{label:12} {ended}")
    best, their_best = pair.ours.result["best"], pair.stock.result["best"]
    with side_by_side.png(options, columns=2) as axes:
        for axis, part in zip(axes, ("training", "validation"), strict=True):
            pair.draw_recorded(axis, part)
            axis.axvline(best, color="black", lw=1, ls=":", label=f"best epoch: {best}")
            axis.set(title=f"Loss in {part}", ylabel="mean squared error")
    other = f"the best epoch is {their_best} with torch.optim and {best} with fusedopt"
    return side_by_side.conclude([pair], other if best != their_best else None)


if __name__ == "__main__":
    main()
