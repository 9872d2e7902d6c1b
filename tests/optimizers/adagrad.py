import torch

from . import ZERO_OR_SMALL, Slot, Table

TABLE = Table(
    "Adagrad",
    cases=[
        {},
        {"lr": 0.1, "lr_decay": 0.2, "initial_accumulator_value": 0.1},
        {"lr": 0.1, "weight_decay": 0.1, "maximize": True, "eps": 0.01},
        {"lr": torch.tensor(0.1), "lr_decay": 0.2},
        {"lr": 0.1, "l1": 0.02},
    ],
    richest={"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1},
    slots={"sum": Slot(unsigned=True)},
    required="sum",
    takes_sparse=True,
    makes_state_at_once=True,
    numbers=("lr", "lr_decay", "eps", "weight_decay"),
    drawn={"lr_decay": (0.0, 0.1), "initial_accumulator_value": (0.0, 0.125)},
    mild={"lr_decay": ZERO_OR_SMALL, "initial_accumulator_value": ZERO_OR_SMALL},
    extremes=[
        {"lr": 1e10},
        {"eps": 1e-30},
        {"eps": 0.0},
        {"lr_decay": 1e10},
        {"initial_accumulator_value": 6e4},
        {"initial_accumulator_value": 1e-30, "lr": 1e10},
    ],
)
