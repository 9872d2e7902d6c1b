"""What the recipes share: run the same training with torch.optim and with fusedopt, from the same
seed and so the same initial weights and batches; compare the losses; draw and tabulate them.

A recipe's training is a generator: its first argument is the module that the optimizers come from,
it yields the loss of every step, and it may return something, a model say.

A rounding error is the relative one of the dtype (2.2e-16 in float64) times the loss, or times 1
where the loss is less.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib import pyplot
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fusedopt
from bench import report
from bench.report import FUSEDOPT_COLOR, STOCK_COLOR
from bench.timing import pick_device

POINTS = 100  # of a loss curve; each is the mean of as many steps as it takes

STYLES: tuple[dict[str, Any], ...] = (
    {"color": STOCK_COLOR, "linestyle": "-", "linewidth": 4},
    {"color": FUSEDOPT_COLOR, "linestyle": "--", "linewidth": 1.2},
)

Training = Generator[float, None, Any]

# Options --------------------------------------------------------------------------------------


def parser(file: str, description: str | None, roundings: int) -> argparse.ArgumentParser:
    """The options that all recipes have; a recipe adds its own."""
    name = Path(file).stem
    result = argparse.ArgumentParser(
        prog=f"python -m bench.recipes.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.set_defaults(recipe=name)
    option = result.add_argument
    option("--out", type=Path, default="bench/out/recipes", help="folder of the PNG")
    option("--device", type=device, default="auto", help="auto (the default), cpu or cuda")
    option("--dtype", type=dtype, default="float64", help="float64 (the default) or float32")
    option("--seed", type=int, default=0)
    option("--threads", type=count, default=1, help="1 (the default) is best for small models")
    allowed = f"rounding errors by which losses may differ (default: {roundings:,})"
    option("--roundings", type=float, default=roundings, metavar="N", help=allowed)
    return result


def device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=pick_device(text)).device
    except (AssertionError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def dtype(text: str) -> torch.dtype:
    if text not in ("float32", "float64"):
        raise argparse.ArgumentTypeError("it must be float32 or float64")
    return getattr(torch, text)


def count(text: str) -> int:
    """The type of options such as --epochs."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number


# Running --------------------------------------------------------------------------------------


@dataclass
class Side:
    """What one of the two did."""

    losses: list[float] = field(default_factory=list)
    step_seconds: float = 0.0
    result: Any = None  # what the training returned

    def loss(self) -> float:
        """Of the last ten steps: that of a single minibatch says little."""
        return fmean(self.losses[-10:])


@dataclass
class Pair:
    """The same training twice."""

    name: str
    stock: Side
    ours: Side
    dtype: torch.dtype
    allowed: float  # rounding errors

    def sides(self) -> dict[str, Side]:
        return {"torch.optim": self.stock, "fusedopt": self.ours}

    def differences(self) -> Tensor:
        """Of the losses, step by step."""
        both = zip(self.stock.losses, self.ours.losses, strict=False)
        return torch.tensor([abs(a - b) for a, b in both], dtype=torch.float64)

    def roundings(self) -> Tensor:
        """The differences in rounding errors."""
        losses = torch.tensor(self.stock.losses, dtype=torch.float64).abs().clamp(min=1)
        differences = self.differences()
        return differences / (torch.finfo(self.dtype).eps * losses[: len(differences)])

    def disagreement(self) -> str | None:
        """Why these are not the same training, or None if they are."""
        stock, ours = self.stock.losses, self.ours.losses
        wrong = ~(self.roundings() <= self.allowed)  # a NaN is wrong, too
        if wrong.any():
            step = int(wrong.nonzero()[0])
            return (
                f"{self.name}: at step {step + 1} the loss is {stock[step]:.9g} with torch.optim "
                f"and {ours[step]:.9g} with fusedopt, {self.roundings()[step]:.3g} rounding "
                f"errors apart; {self.allowed:,g} are allowed"
            )
        if not stock or len(stock) != len(ours):
            return f"{self.name}: {len(stock)} steps with torch.optim, {len(ours)} with fusedopt"
        return None

    def draw_losses(self, axis: Axes, label: str = "", color: str = FUSEDOPT_COLOR) -> None:
        """Both loss curves."""
        self._draw(axis, [curve(side.losses) for side in self.sides().values()], label, color)
        axis.set(xlabel="step", ylabel="training loss")

    def draw_recorded(
        self,
        axis: Axes,
        key: str,
        label: str = "",
        color: str = FUSEDOPT_COLOR,
        *,
        every: int = 1,
    ) -> None:
        """What both trainings returned under this key: a value for every epoch, or step."""
        values = [side.result[key] for side in self.sides().values()]
        points = [(range(every, every * len(v) + 1, every), v) for v in values]
        self._draw(axis, points, label, color)
        axis.set(xlabel="epoch", ylabel=key)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))

    def _draw(self, axis: Axes, points: Sequence[Any], label: str, color: str) -> None:
        """Fusedopt dashed on top of the broad line of stock."""
        stock, ours = STYLES
        label = f"fusedopt, {label}" if label else "fusedopt"
        axis.plot(*points[0], **stock, label="torch.optim")
        axis.plot(*points[1], **{**ours, "color": color}, label=label)


def log_scale(axis: Axes) -> None:
    """For losses, with labels such as 0.02."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def curve(losses: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most POINTS points: where a stretch of steps ends, and its mean loss. What is left over
    at the end is not drawn: a mean of fewer steps would be a wild one."""
    width = -(-len(losses) // POINTS) or 1
    ends = list(range(width, len(losses) + 1, width))
    return ends, [fmean(losses[end - width : end]) for end in ends]


def run(
    options: argparse.Namespace,
    name: str,
    steps: int,
    train: Callable[..., Training],
    *arguments: Any,
) -> Pair:
    """Calls ``train(torch.optim, *arguments)`` and ``train(fusedopt, *arguments)``; `steps` is the
    length of the progress bars."""
    torch.set_num_threads(options.threads)
    load_what_steps_need(options.device)
    pair = Pair(name, Side(), Side(), options.dtype, options.roundings)
    with report.progress_bar() as progress:
        for optim, side in ((torch.optim, pair.stock), (fusedopt, pair.ours)):
            task = progress.add_task(f"{name}: {optim.__name__}", total=steps)
            torch.manual_seed(options.seed)
            with stopwatch(side, options.device):
                for loss in keep_result(side, train(optim, *arguments)):
                    side.losses.append(loss)
                    progress.advance(task)
    return pair


def keep_result(side: Side, training: Training) -> Iterator[float]:
    side.result = yield from training


def load_what_steps_need(device: torch.device) -> None:
    """The first step of a process imports parts of torch, for a second or more."""
    for optim in (torch.optim, fusedopt):
        param = torch.nn.Parameter(torch.zeros(1, device=device))
        param.grad = torch.zeros_like(param)
        optim.SGD([param]).step()


@contextmanager
def stopwatch(side: Side, device: torch.device) -> Iterator[None]:
    """Adds up the time inside every optimizer's step()."""
    begin = 0.0

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def start(*_: object) -> None:
        nonlocal begin
        begin = now()

    def stop(*_: object) -> None:
        side.step_seconds += now() - begin

    hooks = register_optimizer_step_pre_hook(start), register_optimizer_step_post_hook(stop)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# Reporting ------------------------------------------------------------------------------------


@contextmanager
def png(options: argparse.Namespace, columns: int, rows: int = 1) -> Iterator[list[Axes]]:
    """Axes to draw on; afterwards they are a file, with one legend for all."""
    with pyplot.rc_context(report.STYLE):
        size = 4.2 * columns, 0.8 + 3.2 * rows
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
        dtype = str(options.dtype).removeprefix("torch.")
        title = f"{options.recipe}: torch {torch.__version__}, fusedopt {fusedopt.__version__}"
        figure.suptitle(f"{title}, {dtype} on {options.device}", fontsize=9, color="#555555")
        yield list(axes.flat)
        drawn: dict[str, Artist] = {}
        for axis in axes.flat:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                drawn.setdefault(label, handle)
        figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=4)
        path = report.write_png(options.out / f"{options.recipe}.png", figure)
        pyplot.close(figure)
    report.console.print(f"Written: {path}", soft_wrap=True)


def conclude(pairs: list[Pair], *more: str | None) -> list[Pair]:
    """Prints the table and returns the pairs; ends the program with an error if the two sides of
    one disagree, or if one of `more` is a reason why they do."""
    table = report.table(
        "Stock torch.optim and fusedopt",
        *("training", "steps", "loss\nstock", "loss\nfusedopt", "largest\n|Δloss|"),
        *("rounding\nerrors", "step()\nstock s", "step()\nfusedopt s"),
    )
    for pair in pairs:
        stock, ours = pair.sides().values()
        table.add_row(
            *(pair.name, f"{len(stock.losses)}", f"{stock.loss():.6f}", f"{ours.loss():.6f}"),
            f"{pair.differences().max():.1e}",
            f"{pair.roundings().max():,.0f} of {pair.allowed:,g}",
            *(f"{side.step_seconds:.3f}" for side in (stock, ours)),
        )
    report.console.print(table)
    reasons = [reason for reason in (*(pair.disagreement() for pair in pairs), *more) if reason]
    if reasons:
        sys.exit("\n".join(["Stock and fusedopt disagree.", *reasons]))
    return pairs
