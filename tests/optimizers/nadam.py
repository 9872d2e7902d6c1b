import torch

from . import UNIT, Options, Slot, Table


def settle(options: Options) -> None:
    if options.get("decoupled_weight_decay"):
        options.pop("l1", None)  # which the oracle adds to the gradient


TABLE = Table(
    "NAdam",
    like="Adam",  # and tests/test_nadam.py
    cases=[
        {},
        {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.1},
        {"lr": 0.1, "betas": (0.3, 0.4), "maximize": True, "eps": 0.01, "momentum_decay": 0.1},
        {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": torch.tensor(0.1), "momentum_decay": 0.0},
        {"lr": 0.1, "l1": 0.02, "weight_decay": 0.1, "maximize": True},
    ],
    richest={"lr": 0.1, "momentum_decay": 0.01, "weight_decay": 0.1},
    slots={"exp_avg": Slot(), "exp_avg_sq": Slot(unsigned=True)},
    required="exp_avg_sq",
    numbers=("lr", "betas", "eps", "weight_decay", "momentum_decay"),
    drawn={
        "betas": tuple((a, b) for a in (0.9, 0.5, 0.0) for b in (0.999, 0.9, 0.5)),
        "eps": (1e-8, 1e-3),
        "momentum_decay": (4e-3, 0.1, 0.0),
        "decoupled_weight_decay": (False, False, True),
    },
    mild={"betas": [UNIT, UNIT], "momentum_decay": UNIT},
    settle=settle,
    extremes=[
        {"betas": (0.9, 0.99999)},
        {"betas": (0.0, 0.0)},
        {"eps": 1e-30},
        {"eps": 1e10},
        {"lr": 1e10},
        {"momentum_decay": 1e3},
    ],
)
