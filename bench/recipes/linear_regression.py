"""Finds the line y = 2x + 1 behind noisy points: linear regression in minibatches, SGD and Adam.

The losses of stock and fusedopt agree to 1,000 rounding errors. Both compute the same formula, but
round in another order; on a convex loss such a difference shrinks from step to step. Seen: 6.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from types import ModuleType

import torch
from matplotlib.axes import Axes
from torch import nn
from torch.nn import functional

from bench import report
from bench.recipes import side_by_side
from bench.recipes.data import Samples
from bench.recipes.side_by_side import Pair, Training

ROUNDINGS = 1_000
BATCH = 32
LEARNING_RATES = {"SGD": 0.05, "Adam": 0.02}


def noisy_line(count: int, seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(count, 1, generator=generator) - 2
    return Samples(x, 2 * x + 1 + 0.5 * torch.randn(count, 1, generator=generator))


def train(optim: ModuleType, name: str, points: Samples, options: Namespace) -> Training:
    model = nn.Linear(1, 1).to(points.inputs)
    optimizer = getattr(optim, name)(model.parameters(), lr=LEARNING_RATES[name])
    for _ in range(options.epochs):
        for x, y in points.batches(BATCH):
            optimizer.zero_grad()
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            yield loss.item()
    return {"slope": model.weight.item(), "intercept": model.bias.item()}


def main(argv: Sequence[str] | None = None) -> list[Pair]:
    parser = side_by_side.parser(__file__, __doc__, ROUNDINGS)
    parser.add_argument("--epochs", type=side_by_side.count, default=30)
    options = parser.parse_args(argv)

    points = noisy_line(512, options.seed).to(options)
    steps = options.epochs * points.steps(BATCH)
    pairs = [
        side_by_side.run(options, name, steps, train, name, points, options)
        for name in LEARNING_RATES
    ]

    for pair in pairs:
        for label, side in pair.sides().items():
            line = "slope {slope:.6f}, intercept {intercept:.6f}".format(**side.result)
            report.console.print(f"{pair.name:5}{label:12} {line}")
    with side_by_side.png(options, columns=3) as (fit, *losses):
        draw_fit(fit, points, pairs)
        for axis, pair in zip(losses, pairs, strict=True):
            pair.draw_losses(axis)
            axis.set(title=pair.name)
            side_by_side.log_scale(axis)
    return side_by_side.conclude(pairs)


def draw_fit(axis: Axes, points: Samples, pairs: Sequence[Pair]) -> None:
    x, y = points.inputs.cpu(), points.targets.cpu()
    axis.scatter(x, y, s=4, color=report.STOCK_COLOR)
    ends = torch.tensor([-2.0, 2.0])
    for pair, style in zip(pairs, ("-", ":"), strict=True):
        slope, intercept = pair.ours.result["slope"], pair.ours.result["intercept"]
        label = f"{pair.name}: y = {slope:.2f}x + {intercept:.2f}"
        color = report.OPTIMIZER_COLORS[pair.name.lower()]
        axis.plot(ends, slope * ends + intercept, style, color=color, lw=2, label=label)
    axis.set(title="What fusedopt found", xlabel="x", ylabel="y")


if __name__ == "__main__":
    main()
