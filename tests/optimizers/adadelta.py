import torch

from . import Between, Slot, Table

TABLE = Table(
    "Adadelta",
    like="RMSprop",
    cases=[
        {},
        {"lr": 0.5, "rho": 0.8, "weight_decay": 0.1},
        {"lr": 0.5, "rho": 0.4, "maximize": True, "eps": 0.01},
        {"lr": torch.tensor(0.5), "weight_decay": 0.1},
        {"lr": 0.5, "l1": 0.02, "weight_decay": 0.1, "maximize": True},
    ],
    richest={"lr": 0.5, "eps": 1e-3, "weight_decay": 0.1},
    slots={"square_avg": Slot(unsigned=True), "acc_delta": Slot(unsigned=True)},
    required="square_avg",
    numbers=("lr", "rho", "eps", "weight_decay"),
    drawn={"rho": (0.9, 0.5, 0.0), "eps": (1e-6, 1e-3)},
    mild={"rho": Between(0.5, 0.95)},
    extremes=[
        {"rho": 0.99},  # nearer to 1, float16 keeps too little of the squares
        {"rho": 0.0},
        {"rho": 1.0},
        {"eps": 1e-30},
        {"eps": 1e10},
        {"lr": 1e10},
    ],
)
