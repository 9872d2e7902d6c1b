"""Trains with every way of storing, from several seeds, and compares the losses with float32's.

The GPT of bench.train_gpt on the source code of Python's standard library, and the LeNet of
bench.recipes.cnn on scikit-learn's digits. What a way of storing costs is to be read beside the
spread of float32 itself over the seeds. AdamW of other packages trains bfloat16 parameters beside
ours where they are installed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import fusedopt
from bench import optimizers, peers, report
from bench.recipes.cnn import augment, lenet
from bench.recipes.data import digits
from bench.timing import pick_device
from bench.train_gpt import GPT, HYPERPARAMETERS, SIZES, Corpus

# The dtype of the parameters, and the options.
VARIANTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float32, 8-bit state": (torch.float32, {"state_dtype": "8bit"}),
    "bf16, split, 8-bit state": (
        torch.bfloat16,
        {"master_weights": "split", "state_dtype": "8bit"},
    ),
    "bf16, stochastic, 8-bit state": (
        torch.bfloat16,
        {"rounding": "stochastic", "state_dtype": "8bit"},
    ),
    "bf16": (torch.bfloat16, {}),
}
CNN_LR = {"adam": 1e-3, "adamw": 1e-3, "sgd": 1e-2, "rmsprop": 1e-3, "adagrad": 1e-2}
CNN_BATCH = 64


def variants_of(name: str, options: argparse.Namespace) -> list[str]:
    """What trains with optimizer `name`: ours, then peers."""
    with_peers = name == "adamw" and options.peers
    return [*options.variants, *(peers.installed() if with_peers else ())]


def dtype_of(variant: str) -> torch.dtype:
    return VARIANTS[variant][0] if variant in VARIANTS else torch.bfloat16


def build(name: str, variant: str, model: nn.Module, arguments: dict[str, Any]) -> Any:
    params = model.to(dtype_of(variant)).parameters()
    if variant in peers.PEERS:
        return peers.PEERS[variant](params, **arguments)
    cls = getattr(fusedopt, optimizers.NAMES[name])
    return cls(params, **arguments, **VARIANTS[variant][1])


def train_gpt(name: str, variant: str, seed: int, options: argparse.Namespace) -> float:
    """The loss on the validation part."""
    size = SIZES["cpu"]
    corpus = Corpus(options.device)
    torch.manual_seed(seed)
    model = GPT(size, corpus.vocabulary).to(options.device)
    optimizer = build(name, variant, model, HYPERPARAMETERS[name])
    for batch in Corpus.batches(corpus.train, options.steps, size, seed):
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()
    model.float()
    with torch.no_grad():
        validation = Corpus.batches(corpus.validation, 40, size, 0)
        return statistics.fmean(model(*batch).item() for batch in validation)


def train_cnn(name: str, variant: str, seed: int, options: argparse.Namespace) -> float:
    """The loss on the validation part."""
    training, validation = digits(12)
    torch.manual_seed(seed)
    model = lenet(*training.inputs.shape[1:3])
    momentum = {"momentum": 0.9} if name == "sgd" else {}
    optimizer = build(name, variant, model, {"lr": CNN_LR[name], **momentum})
    dtype = dtype_of(variant)
    for _ in range(options.epochs):
        for images, labels in training.batches(CNN_BATCH):
            optimizer.zero_grad()
            scores = model(augment(images, mirror=False).to(dtype)).float()
            functional.cross_entropy(scores, labels).backward()
            optimizer.step()
    model.float().eval()
    with torch.no_grad():
        return functional.cross_entropy(model(validation.inputs.float()), validation.targets).item()


TASKS: dict[str, Callable[..., float]] = {"gpt": train_gpt, "cnn": train_cnn}


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run the comparison and return the files it wrote."""
    parser = argparse.ArgumentParser(prog="python -m bench.storage_training", description=__doc__)
    names = list(optimizers.WIDELY_USED)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", type=str.lower, choices=names, default=names)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of the GPT")
    parser.add_argument("--epochs", type=int, default=15, help="of the CNN")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("bench/out"))
    options = parser.parse_args(argv)
    options.device = pick_device(options.device)
    facts = report.environment(options.device)
    results = []
    variants = {name: variants_of(name, options) for name in options.optimizers}
    runs = len(options.tasks) * sum(map(len, variants.values())) * options.seeds
    with report.progress_bar() as progress:
        progress_task = progress.add_task("", total=runs)
        for task in options.tasks:
            columns = ["", "validation loss", "spread", "to float32"]
            table = report.table(f"{task}, mean of {options.seeds} seeds", *columns)
            for name in options.optimizers:
                reference = None
                for variant in variants[name]:
                    progress.update(progress_task, description=f"{task} {name} {variant}")
                    losses = []
                    for seed in range(options.seeds):
                        losses.append(TASKS[task](name, variant, seed, options))
                        progress.advance(progress_task)
                    mean, spread = statistics.fmean(losses), statistics.pstdev(losses)
                    reference = mean if reference is None else reference
                    results.append(
                        {"task": task, "optimizer": name, "variant": variant, "losses": losses}
                    )
                    table.add_row(
                        f"{name} {variant}",
                        f"{mean:.4f}",
                        f"{spread:.4f}",
                        f"{mean - reference:+.4f}",
                    )
            report.console.print(table)
    setup = {"steps": options.steps, "epochs": options.epochs, "seeds": options.seeds}
    return [
        report.write_json(options.out / "storage_training.json", facts, **setup, results=results)
    ]


if __name__ == "__main__":
    main()
