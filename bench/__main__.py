"""Compares with torch.optim on this machine: step times, then the training of a small GPT.

What does not fit in two minutes is left out and named. With --full every optimizer, dtype and
workload, in half an hour or more.
"""

from __future__ import annotations

import argparse

from bench import report, step, train_gpt

STEP = ["--brief", "--seconds", "75"]
TRAINING = ["--optimizers", "adam", "sgd", "rmsprop", "--seconds", "10"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--full", action="store_true", help="everything")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", default="bench/out")
    options = parser.parse_args()
    shared = ["--device", options.device, "--out", options.out]
    written = step.main([*shared, *(["--full"] if options.full else STEP)])
    written += train_gpt.main([*shared, *([] if options.full else TRAINING)])
    report.console.print("\nWritten:", *(f"  {path}" for path in written), sep="\n")
    if not options.full:
        report.console.print("Every optimizer, dtype and workload: make bench ARGS=--full")


if __name__ == "__main__":
    main()
