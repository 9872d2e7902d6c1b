import torch

from . import UNIT, Slot, Table

TABLE = Table(
    "Adamax",
    like="Adam",
    cases=[
        {},
        {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.1},
        {"lr": 0.1, "betas": (0.3, 0.4), "maximize": True, "eps": 0.01},
        {"lr": torch.tensor(0.1), "weight_decay": 0.1},
        {"lr": 0.1, "l1": 0.02, "weight_decay": 0.1, "maximize": True},
    ],
    richest={"lr": 0.1, "weight_decay": 0.1},
    slots={"exp_avg": Slot(), "exp_inf": Slot(unsigned=True)},
    required="exp_inf",
    numbers=("lr", "betas", "eps", "weight_decay"),
    drawn={
        "betas": tuple((a, b) for a in (0.9, 0.5, 0.0) for b in (0.999, 0.9, 0.5)),
        "eps": (1e-8, 1e-3),
    },
    mild={"betas": [UNIT, UNIT]},
    extremes=[
        {"betas": (0.9, 0.99999)},
        {"betas": (0.99999, 0.0)},
        {"betas": (0.0, 0.0)},
        {"eps": 1e-30},
        {"eps": 1e10},
        {"lr": 1e10},
        {"lr": 1e-30},
    ],
)
