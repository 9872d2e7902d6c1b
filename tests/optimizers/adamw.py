import torch

from . import Table
from .adam import DRAWN, MILD, NUMBERS, SLOTS

TABLE = Table(
    "AdamW",
    cases=[
        {},
        {"lr": 0.1, "weight_decay": 0.2, "amsgrad": True, "maximize": True},
        {"lr": torch.tensor([0.1]), "weight_decay": 0.0},
        {"lr": 0.1, "weight_decay": 0.1, "l1": 0.02},
    ],
    richest={"lr": 0.1, "amsgrad": True, "weight_decay": 0.1},
    slots=SLOTS,
    required="exp_avg_sq",
    is_decoupled=True,
    numbers=NUMBERS,
    drawn=DRAWN,
    mild=MILD,
    extremes=[
        {"betas": (0.9, 0.99999), "eps": 1e-30},
        {"lr": 1e10},
        {"lr": 1e10, "eps": 1e-30, "weight_decay": 1e10},
        {"lr": 0.0, "weight_decay": 1e10},
    ],
)
