import torch

from . import FLAG, UNIT, Options, Slot, Table

SLOTS = {
    "exp_avg": Slot(),
    "exp_avg_sq": Slot(unsigned=True),
    "max_exp_avg_sq": Slot(lambda group: group.get("amsgrad"), unsigned=True),
}
NUMBERS = ("lr", "betas", "eps", "weight_decay")
DRAWN = {
    "betas": tuple((a, b) for a in (0.9, 0.5, 0.3, 0.0) for b in (0.999, 0.9, 0.5)),
    "eps": (1e-8, 1e-3, 1e-30),
    "amsgrad": (False, False, True),
}
MILD = {"betas": [UNIT, UNIT], "amsgrad": FLAG}


def settle(options: Options) -> None:
    if options.get("decoupled_weight_decay"):
        options.pop("l1", None)  # which the oracle adds to the gradient


TABLE = Table(
    "Adam",
    cases=[
        {},
        {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.1},
        {"lr": 0.1, "betas": (0.3, 0.4), "maximize": True, "eps": 0.01},
        {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": torch.tensor(0.1), "betas": (torch.tensor(0.8), torch.tensor(0.95))},
        {"lr": 0.1, "l1": 0.02, "weight_decay": 0.1, "maximize": True},
    ],
    richest={"lr": 0.1, "amsgrad": True, "weight_decay": 0.1},
    slots=SLOTS,
    required="exp_avg_sq",
    numbers=NUMBERS,
    drawn={**DRAWN, "decoupled_weight_decay": (False, False, True)},
    mild=MILD,
    settle=settle,
    extremes=[
        {"betas": (0.9, 0.99999)},
        {"betas": (0.99999, 0.99999)},
        {"betas": (0.0, 0.0)},
        {"betas": (0.0, 0.99999), "amsgrad": True},
        {"betas": (0.99999, 0.0)},
        {"eps": 1e-30},
        {"eps": 0.0},
        {"eps": 1e10},
        {"lr": 1e10},
        {"lr": 1e-30},
        {"lr": 1e10, "betas": (0.9, 0.99999), "eps": 1e-30, "weight_decay": 1e-10},
    ],
)
