"""Six learning-rate schedules for the same linear regression, all by torch.optim.lr_scheduler,
which takes an optimizer of fusedopt as one of its own.

With a fixed rate the noise of the minibatches keeps the model away from the least squares; with a
rate that falls it gets there.

The losses of stock and fusedopt agree to 1,000 rounding errors. Both compute the same formula, but
round in another order; on a convex loss such a difference shrinks from step to step. Seen: 6.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from itertools import chain, islice, repeat
from types import ModuleType

import torch
from torch import nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LambdaLR,
    LRScheduler,
    PolynomialLR,
)

from bench import report
from bench.recipes import data, side_by_side
from bench.recipes.data import Samples
from bench.recipes.side_by_side import Pair, Training

ROUNDINGS = 1_000
BATCH = 16
LR = 0.1
EVERY = 50  # steps, the loss of all samples is computed

# What step t of T multiplies the learning rate with.
SCHEDULES: dict[str, Callable[[Optimizer, int], LRScheduler]] = {
    # 1
    "fixed": lambda optimizer, T: LambdaLR(optimizer, lambda t: 1.0),
    # 0.96^(t // 1000)
    "staircase": lambda optimizer, T: LambdaLR(optimizer, lambda t: 0.96 ** (t // 1000)),
    # (1 - t/T)^2
    "polynomial": lambda optimizer, T: PolynomialLR(optimizer, total_iters=T, power=2),
    # 1 / (1 + t/s), where s = T/20
    "inverse time": lambda optimizer, T: LambdaLR(optimizer, lambda t: 1 / (1 + t / (T / 20))),
    # (1 + cos(pi t/T)) / 2
    "cosine annealing": lambda optimizer, T: CosineAnnealingLR(optimizer, T_max=T),
    # the same over one, two and four sevenths of T
    "warm restarts": lambda optimizer, T: CosineAnnealingWarmRestarts(optimizer, -(-T // 7), 2),
}


def train(optim: ModuleType, schedule: str, training: Samples, options: Namespace) -> Training:
    model = nn.Sequential(nn.Linear(10, 1), nn.Flatten(0)).to(training.inputs)
    optimizer = optim.SGD(model.parameters(), lr=LR)
    scheduler = SCHEDULES[schedule](optimizer, options.steps)
    rates, excess, lowest = [], [], least_squares(training)
    endless = chain.from_iterable(training.batches(BATCH) for _ in repeat(None))
    for step, (x, y) in enumerate(islice(endless, options.steps), start=1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        yield loss.item()
        if step % EVERY == 0:
            with torch.no_grad():
                of_all = functional.mse_loss(model(training.inputs), training.targets).item()
            excess.append(of_all - lowest)
    return {"rates": rates, "excess": excess}


def least_squares(samples: Samples) -> float:
    """The lowest loss that a linear model can have."""
    ones = torch.ones_like(samples.targets[:, None])
    inputs, targets = torch.hstack([samples.inputs, ones]), samples.targets[:, None]
    best = torch.linalg.lstsq(inputs, targets).solution
    return functional.mse_loss(inputs @ best, targets).item()


def main(argv: Sequence[str] | None = None) -> list[Pair]:
    parser = side_by_side.parser(__file__, __doc__, ROUNDINGS)
    parser.add_argument("--steps", type=side_by_side.count, default=3500)
    options = parser.parse_args(argv)

    training = data.diabetes()[0].to(options)
    pairs = [
        side_by_side.run(options, schedule, options.steps, train, schedule, training, options)
        for schedule in SCHEDULES
    ]

    colors = ["#333333", *report.OPTIMIZER_COLORS.values()]
    with side_by_side.png(options, columns=2) as (rates, excess):
        for pair, color in zip(pairs, colors[: len(pairs)], strict=True):
            rates.plot(pair.ours.result["rates"], color=color, lw=1.5)
            pair.draw_recorded(excess, "excess", pair.name, color, every=EVERY)
        rates.set(title="Learning rate", xlabel="step", ylabel="lr")
        excess.set(title="Training", xlabel="step", yscale="log")
        excess.set(ylabel="loss above the least squares")
    return side_by_side.conclude(pairs)


if __name__ == "__main__":
    main()
