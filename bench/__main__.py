"""`python -m bench`: the training comparison, then the step benchmark, in under five minutes."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import report, step, train_gpt


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", default="bench/out")
    options = parser.parse_args()
    shared = ["--device", options.device, "--out", options.out]
    written: list[Path] = []
    for benchmark in (train_gpt, step):
        written += benchmark.main(shared)
    report.console.print("\nWritten:", *(f"  {path}" for path in written), sep="\n")


if __name__ == "__main__":
    main()
