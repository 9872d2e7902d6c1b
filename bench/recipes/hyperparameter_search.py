"""Searches the best optimizer and learning rate for a digit classifier with Optuna.

Optuna proposes what looks promising after the trials so far, so one other result would send it
elsewhere: stock and fusedopt go through the same trials and find the same best one.

Their losses agree to 10,000 rounding errors. Both compute the same formula, but round in another
order, and such a difference grows where the learning rate is too high. Seen: 223, with RMSprop,
whose first step moves every weight by ten times the learning rate.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from itertools import accumulate
from types import ModuleType

import torch
from matplotlib.axes import Axes
from torch import nn
from torch.nn import functional

from bench import report
from bench.recipes import data, needed, side_by_side
from bench.recipes.data import Samples
from bench.recipes.side_by_side import Pair, Training

ROUNDINGS = 10_000
BATCH = 64
NAMES = ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad")


def search(
    optim: ModuleType, training: Samples, validation: Samples, options: Namespace
) -> Training:
    optuna = needed("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=options.seed))
    for _ in range(options.trials):
        trial = study.ask()
        lr = trial.suggest_float("lr", 1e-4, 0.1, log=True)
        name = trial.suggest_categorical("optimizer", NAMES)
        torch.manual_seed(options.seed)
        study.tell(trial, (yield from train(optim, name, lr, training, validation, options)))
    return study


def train(
    optim: ModuleType,
    name: str,
    lr: float,
    training: Samples,
    validation: Samples,
    options: Namespace,
) -> Training:
    """Returns the loss on the validation set."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    model.to(training.inputs)
    optimizer = getattr(optim, name)(model.parameters(), lr=lr)
    for _ in range(options.epochs):
        for x, y in training.batches(BATCH):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            yield loss.item()
    with torch.no_grad():
        return functional.cross_entropy(model(validation.inputs), validation.targets).item()


def main(argv: Sequence[str] | None = None) -> list[Pair]:
    parser = side_by_side.parser(__file__, __doc__, ROUNDINGS)
    parser.add_argument("--trials", type=side_by_side.count, default=30)
    parser.add_argument("--epochs", type=side_by_side.count, default=3, help="of each trial")
    options = parser.parse_args(argv)

    training, validation = (part.to(options) for part in data.digits())
    steps = options.trials * options.epochs * training.steps(BATCH)
    pair = side_by_side.run(
        options, f"{options.trials} trials", steps, search, training, validation, options
    )

    best = {label: side.result.best_trial for label, side in pair.sides().items()}
    for label, trial in best.items():
        found = "{optimizer} with lr {lr:.4f}".format(**trial.params)
        report.console.print(f"{label:12} trial {trial.number}: {found}, loss {trial.value:.6f}")
    with side_by_side.png(options, columns=2) as (values, rates):
        draw_trials(values, rates, pair)
    stock, ours = best.values()
    other = f"best is {stock.params} with torch.optim and {ours.params} with fusedopt"
    return side_by_side.conclude([pair], other if stock.params != ours.params else None)


def draw_trials(values: Axes, rates: Axes, pair: Pair) -> None:
    for (label, side), style, size in zip(
        pair.sides().items(), side_by_side.STYLES, (9, 4), strict=True
    ):
        losses = [trial.value for trial in side.result.trials]
        numbers = range(1, len(losses) + 1)
        values.plot(numbers, losses, "o", color=style["color"], markersize=size)
        values.plot(numbers, list(accumulate(losses, min)), **style, label=label)
    values.set(title="Every trial, and the best so far", xlabel="trial", ylabel="validation loss")
    for name in NAMES:
        trials = [t for t in pair.ours.result.trials if t.params["optimizer"] == name]
        lr, losses = [t.params["lr"] for t in trials], [t.value for t in trials]
        rates.scatter(lr, losses, s=20, color=report.OPTIMIZER_COLORS[name.lower()], label=name)
    rates.set(title="Which optimizer, which lr", xlabel="lr", ylabel="validation loss")
    rates.set_xscale("log")
    for axis in (values, rates):
        side_by_side.log_scale(axis)


if __name__ == "__main__":
    main()
