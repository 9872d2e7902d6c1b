import torch

from . import FLAG, UNIT, ZERO_OR_UNIT, Options, Slot, Table


def settle(options: Options) -> None:
    options["nesterov"] = options["nesterov"] and options["momentum"] > 0
    options["dampening"] = 0.0 if options["nesterov"] else options["dampening"]


TABLE = Table(
    "SGD",
    cases=[
        {},
        {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.5, "dampening": 0.3, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
        {"lr": torch.tensor(0.1), "momentum": 0.9, "weight_decay": torch.tensor(0.1)},
        {"lr": 0.1, "momentum": 0.9, "l1": 0.02, "maximize": True},
    ],
    richest={"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    slots={"momentum_buffer": Slot(lambda group: group.get("momentum", 0) != 0)},
    required="momentum_buffer",  # without it there was no step
    counts_steps=False,
    takes_sparse=True,
    numbers=("lr", "momentum", "dampening", "weight_decay"),
    drawn={"momentum": (0.0, 0.9, 0.3), "nesterov": (False, True), "dampening": (0.0, 0.4)},
    mild={"momentum": ZERO_OR_UNIT, "nesterov": FLAG, "dampening": UNIT},
    settle=settle,
    extremes=[
        {"lr": 1e10},
        {"lr": 1e-30},
        {"lr": 0.0, "momentum": 0.9},
        {"lr": 1e10, "momentum": 0.99999, "nesterov": True},
        {"lr": 0.1, "momentum": 0.9, "dampening": 1.0},
        {"lr": 0.1, "weight_decay": 1e10},
        {"lr": 1e-12, "l1": 1e10},
    ],
)
