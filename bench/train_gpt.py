"""Trains a small GPT with every optimizer twice, stock and fusedopt, and compares the two.

The text is the source code of Python's own standard library, so nothing is downloaded. Both
models of a pair start from the same weights, see the same batches and take turns every few
steps, so that the noise of the machine hits both alike.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import fusedopt
from bench import optimizers, report
from bench.timing import OtherWork, elapsed_ms, pick_device

TURN = 10  # steps of one contender before the other takes over
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "adam": {"lr": 1e-3},
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1},
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
    "rmsprop": {"lr": 5e-4},
    "adagrad": {"lr": 5e-3},
}


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    heads: int
    context: int
    batch: int


SIZES = {
    "cpu": Size(layers=4, width=128, heads=4, context=64, batch=8),
    "cuda": Size(layers=12, width=768, heads=12, context=256, batch=32),
}


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm = nn.LayerNorm(size.width)
        self.query_key_value = nn.Linear(size.width, 3 * size.width, bias=False)
        self.attention_out = nn.Linear(size.width, size.width)
        self.mlp_norm = nn.LayerNorm(size.width)
        self.mlp_in = nn.Linear(size.width, 4 * size.width)
        self.mlp_out = nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.query_key_value(self.attention_norm(x))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attention.transpose(1, 2).flatten(-2))
        return x + self.mlp_out(functional.gelu(self.mlp_in(self.mlp_norm(x))))


class GPT(nn.Module):
    """Characters in, the loss of predicting each next character out."""

    def __init__(self, size: Size, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        places = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.tokens(inputs) + self.positions(places)
        logits = functional.linear(self.norm(self.blocks(x)), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Corpus:
    """2 MB of Python as indices into its ASCII characters; the last tenth is for validation."""

    def __init__(self, device: torch.device, characters: int = 2_000_000) -> None:
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = "".join(source.read_text("utf-8", "ignore") for source in sources)
        text = "".join(filter(str.isascii, text))[:characters]
        codes = torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8)
        vocabulary, indices = codes.unique(return_inverse=True)
        self.vocabulary = len(vocabulary)
        self.train, self.validation = indices.to(device).split(len(indices) * 9 // 10)[:2]

    @staticmethod
    def batches(text: Tensor, count: int, size: Size, seed: int) -> list[tuple[Tensor, Tensor]]:
        """`count` random (inputs, targets) of shape (batch, context)."""
        generator = torch.Generator().manual_seed(seed)
        highest = len(text) - size.context - 1
        starts = torch.randint(highest, (count, size.batch, 1), generator=generator)
        windows = text[(starts + torch.arange(size.context + 1)).to(text.device)]
        return [(window[:, :-1], window[:, 1:]) for window in windows]


@dataclass
class Contender:
    """One model with its optimizer, and what was measured on it."""

    mode: str
    model: GPT
    optimizer: torch.optim.Optimizer
    device: torch.device
    losses: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    iteration_ms: list[float] = field(default_factory=list)
    validation_loss: float = float("nan")

    def train(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        for batch in batches:
            iterate = partial(self.iterate, *batch)
            self.iteration_ms.append(elapsed_ms(iterate, self.device))

    def iterate(self, inputs: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = self.model(inputs, targets)
        loss.backward()
        self.optimizer_ms.append(elapsed_ms(self.optimizer.step, self.device))
        self.losses.append(loss.item())

    def parameters(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.model.parameters()).detach()

    @torch.no_grad()
    def validate(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.validation_loss = statistics.fmean(self.model(*batch).item() for batch in batches)

    def result(self) -> dict[str, Any]:
        warm_up = min(TURN, len(self.losses) // 2)
        optimizer_ms = statistics.median(self.optimizer_ms[warm_up:])
        iteration_ms = statistics.median(self.iteration_ms[warm_up:])
        return {
            "mode": self.mode,
            "train_loss": statistics.fmean(self.losses[-10:]),
            "validation_loss": self.validation_loss,
            "optimizer_ms": optimizer_ms,
            "iteration_ms": iteration_ms,
            "share": optimizer_ms / iteration_ms,
            "losses": self.losses,
        }


class Comparison:
    """Stock and fusedopt on the same data from the same weights."""

    def __init__(self, name: str, size: Size, vocabulary: int, device: torch.device, seed: int):
        class_name = optimizers.NAMES[name]
        mode, arguments = optimizers.best_stock_mode(class_name)

        def contender(
            mode: str, optimizer: type[torch.optim.Optimizer], arguments: dict[str, Any]
        ) -> Contender:
            torch.manual_seed(seed)
            model = GPT(size, vocabulary).to(device)
            built = optimizer(model.parameters(), **HYPERPARAMETERS[name], **arguments)
            return Contender(mode, model, built, device)

        self.name = name
        self.stock = contender(f"torch {mode}", optimizers.stock(class_name), arguments)
        self.ours = contender("fusedopt", getattr(fusedopt, class_name), {})
        self.differences: list[float] = []

    def train_turn(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Train both on `batches`; who goes first changes from turn to turn."""
        turn = [self.stock, self.ours]
        for contender in turn if len(self.stock.losses) // TURN % 2 else reversed(turn):
            contender.train(batches)
        difference = self.ours.parameters() - self.stock.parameters()
        self.differences.append(difference.abs().max().item())

    def result(self) -> dict[str, Any]:
        largest = self.stock.parameters().abs().max().item()
        losses = zip(self.stock.losses, self.ours.losses, strict=True)
        return {
            "hyperparameters": HYPERPARAMETERS[self.name],
            "parameter_differences": self.differences,
            "relative_parameter_difference": self.differences[-1] / largest,
            "largest_loss_difference": max(abs(a - b) for a, b in losses),
            "stock": self.stock.result(),
            "fusedopt": self.ours.result(),
        }


def compare(options: argparse.Namespace, size: Size, device: torch.device) -> dict[str, Any]:
    """Train every pair; the result of each by optimizer name."""
    corpus = Corpus(device)
    training = Corpus.batches(corpus.train, options.steps, size, options.seed)
    validation = Corpus.batches(corpus.validation, 20, size, options.seed)
    results = {}
    with report.progress_bar() as progress:
        for name in options.optimizers:
            pair = Comparison(name, size, corpus.vocabulary, device, options.seed)
            task = progress.add_task(name, total=options.steps)
            others = OtherWork()
            deadline = time.perf_counter() + options.seconds
            for start in range(0, options.steps, TURN):
                if time.perf_counter() > deadline:
                    break
                batches = training[start : start + TURN]
                pair.train_turn(batches)
                losses = f"{pair.stock.losses[-1]:.3f} | {pair.ours.losses[-1]:.3f}"
                description = f"{name:8} loss {losses}  step"
                progress.update(task, advance=len(batches), description=description)
            pair.stock.validate(validation)
            pair.ours.validate(validation)
            results[name] = pair.result() | others.seen(device)
    return results


def tabulate_training(results: dict[str, Any]) -> Table:
    columns = ["optimizer", "mode", "steps", "train loss", "validation", "step ms", "of time"]
    table = report.table("Training", *columns, "speed-up", text_columns=2)
    for name, result in results.items():
        stock, ours = result["stock"], result["fusedopt"]
        speedup = f"{stock['optimizer_ms'] / ours['optimizer_ms']:.2f}x"
        table.add_row(name, *measured(stock))
        table.add_row("", *measured(ours), ("?" if result["busy"] else "") + speedup)
    table.caption = report.busy_note(results.values())
    return table


def measured(result: dict[str, Any]) -> list[str]:
    return [
        result["mode"],
        str(len(result["losses"])),
        f"{result['train_loss']:.4f}",
        f"{result['validation_loss']:.4f}",
        f"{result['optimizer_ms']:.3f}",
        f"{result['share']:.1%}",
    ]


def tabulate_differences(results: dict[str, Any]) -> Table:
    """Rounding errors grow with every step, which is why the early ones are shown too."""
    columns = ["optimizer", "|Δloss|", f"|Δparam| after {TURN}", "|Δparam| at the end", "relative"]
    table = report.table("Largest differences between stock and fusedopt", *columns)
    for name, result in results.items():
        differences = [
            result["largest_loss_difference"],
            result["parameter_differences"][0],
            result["parameter_differences"][-1],
            result["relative_parameter_difference"],
        ]
        table.add_row(name, *(f"{difference:.1e}" for difference in differences))
    return table


def plot(results: dict[str, Any], title: str, path: Path) -> Path:
    with pyplot.rc_context(report.STYLE):
        panels = len(results) + 1
        columns = 2 if panels == 4 else min(3, panels)
        rows = math.ceil(panels / columns)
        figure = pyplot.figure(figsize=(4 * columns, 3.5 * rows))
        for index, (name, result) in enumerate(results.items(), start=1):
            plot_losses(figure.add_subplot(rows, columns, index), name, result)
        plot_step_times(figure.add_subplot(rows, columns, panels), results)
        figure.suptitle(title, fontsize=9, color="#555555")
        written = report.write_png(path, figure)
        pyplot.close(figure)
    return written


def plot_losses(axis: Axes, name: str, result: dict[str, Any]) -> None:
    stock, ours = result["stock"], result["fusedopt"]
    axis.plot(stock["losses"], color=report.STOCK_COLOR, linewidth=4, label=stock["mode"])
    axis.plot(ours["losses"], "--", color=report.FUSEDOPT_COLOR, linewidth=1.2, label="fusedopt")
    axis.set(title=optimizers.NAMES[name], xlabel="step", ylabel="training loss", ylim=(None, 4.8))
    axis.legend(loc="upper right")


def plot_step_times(axis: Axes, results: dict[str, Any]) -> None:
    height = 0.38
    colors = {"stock": report.STOCK_COLOR, "fusedopt": report.FUSEDOPT_COLOR}
    for index, (side, color) in enumerate(colors.items()):
        times = [result[side]["optimizer_ms"] for result in results.values()]
        rows = [row + (index - 0.5) * height for row in range(len(times))]
        bars = axis.barh(rows, times, height, color=color)
        for bar, result in zip(bars, results.values(), strict=True):
            bar.set_alpha(report.opacity(result))
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    labels = [f"{optimizers.NAMES[n]}\n({r['stock']['mode']})" for n, r in results.items()]
    axis.set_yticks(range(len(results)), labels)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.grid(axis="y", visible=False)
    axis.set(title="Optimizer step", xlabel="milliseconds per step, median")
    handles = [Patch(color=color, label=side) for side, color in colors.items()]
    if any(result["busy"] for result in results.values()):
        handles.append(Patch(color="#cccccc", label=report.PALE))
    # Beside the bars there is no place: they may fill the panel.
    axis.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(handles)
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.train_gpt", description=__doc__)
    names = list(optimizers.WIDELY_USED)
    parser.add_argument("--optimizers", nargs="+", type=str.lower, choices=names, default=names)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=28, help="a pair that takes longer stops")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench/out"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run the benchmark and return the files it wrote."""
    options = parse(argv)
    device = pick_device(options.device)
    size = SIZES[device.type]
    torch.set_float32_matmul_precision("high")
    facts = report.environment(device)
    title = f"Character GPT on {report.headline(facts)}"
    report.console.print(f"{title}: stock and fusedopt, up to {options.steps} steps each")
    results = compare(options, size, device)
    report.console.print(tabulate_training(results), tabulate_differences(results))
    setup = {"size": asdict(size), "steps": options.steps, "seed": options.seed}
    return [
        report.write_json(options.out / "train_gpt.json", facts, **setup, results=results),
        plot(results, title, options.out / "train_gpt.png"),
    ]


if __name__ == "__main__":
    main()
