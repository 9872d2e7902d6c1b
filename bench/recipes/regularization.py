"""L1, L2 and elastic net on the same digit classifier: what they do to its weights.

fusedopt takes the penalties as the options l1 and weight_decay. torch.optim has no l1: there both
are added to the loss, l1 * sum |w| + weight_decay / 2 * sum w^2, which for SGD is the same update.
Biases are not penalized.

The losses of stock and fusedopt agree to 1,000 rounding errors. The one adds the penalties to the
gradient in step(), the other lets autograd do it, so they round in another order, and such a
difference can grow while two layers learn. Seen: 3; and 38 in float32, where rounding now and then
puts a weight on the other side of zero, from where L1 pulls it the other way.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from types import ModuleType

from torch import nn
from torch.nn import functional

import fusedopt
from bench import report
from bench.recipes import data, side_by_side
from bench.recipes.data import Samples
from bench.recipes.side_by_side import Pair, Training

ROUNDINGS = 1_000
BATCH = 32
NEAR_ZERO = 1e-3
PENALTIES = {
    "none": {"l1": 0.0, "weight_decay": 0.0},
    "L1": {"l1": 1e-3, "weight_decay": 0.0},
    "L2": {"l1": 0.0, "weight_decay": 1e-2},
    "elastic net": {"l1": 5e-4, "weight_decay": 5e-3},
}


def train(
    optim: ModuleType,
    penalty: dict[str, float],
    training: Samples,
    validation: Samples,
    options: Namespace,
) -> Training:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    model.to(training.inputs)
    weights = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim == 1]
    in_step = penalty if optim is fusedopt else {}
    optimizer = optim.SGD([{"params": weights, **in_step}, {"params": biases}], lr=0.1)
    for _ in range(options.epochs):
        for x, y in training.batches(BATCH):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            if in_step:
                loss.backward()
            else:
                l1 = penalty["l1"] * sum(w.abs().sum() for w in weights)
                l2 = penalty["weight_decay"] / 2 * sum(w.square().sum() for w in weights)
                (loss + l1 + l2).backward()
            optimizer.step()
            yield loss.item()
    values = nn.utils.parameters_to_vector(weights).detach().cpu()
    return {"weights": values, "accuracy": validation.accuracy(model)}


def main(argv: Sequence[str] | None = None) -> list[Pair]:
    parser = side_by_side.parser(__file__, __doc__, ROUNDINGS)
    parser.add_argument("--epochs", type=side_by_side.count, default=40)
    options = parser.parse_args(argv)

    training, validation = (part.to(options) for part in data.digits())
    steps = options.epochs * training.steps(BATCH)
    pairs = [
        side_by_side.run(options, name, steps, train, penalty, training, validation, options)
        for name, penalty in PENALTIES.items()
    ]

    for pair in pairs:
        shares = ", ".join(f"{label} {near_zero(side):.2%}" for label, side in pair.sides().items())
        accuracy = pair.ours.result["accuracy"]
        report.console.print(f"{pair.name:12} near zero: {shares}; accuracy {accuracy:.1%}")
    with side_by_side.png(options, columns=4, rows=2) as axes:
        for pair, losses, weights in zip(pairs, axes[:4], axes[4:], strict=True):
            pair.draw_losses(losses)
            side_by_side.log_scale(losses)
            losses.set(title=pair.name, ylim=(0.05, 3))
            for side, style in zip(pair.sides().values(), side_by_side.STYLES, strict=True):
                values = side.result["weights"]
                weights.hist(values, bins=41, range=(-1.2, 1.2), histtype="step", **style)
            weights.set(title=f"{near_zero(pair.ours):.0%} of the weights near zero")
            weights.set(xlabel="weight", ylabel="how many", yscale="log", ylim=(0.7, 2000))
    return side_by_side.conclude(pairs)


def near_zero(side: side_by_side.Side) -> float:
    """The share of the weights that one could leave out."""
    return (side.result["weights"].abs() < NEAR_ZERO).double().mean().item()


if __name__ == "__main__":
    main()
