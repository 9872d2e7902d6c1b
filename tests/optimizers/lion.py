from typing import Any

import torch

from . import UNIT, Slot, Table


class Lion(torch.optim.Optimizer):
    """Program 1 of arXiv:2302.06675, by torch's operators in its order; and l1 beside the decay.

    ``sign_margin`` of a parameter says how near to zero a sign was taken, as a share of what it was
    taken of: where roundings decide a sign, an error is no measure (``cases.assert_near``).
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ):
        if isinstance(lr, torch.Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "weight_decay": weight_decay,
                "foreach": foreach,
                "maximize": maximize,
                "capturable": capturable,
                "differentiable": differentiable,
            },
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                whole, state = p, self.state[p]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(p)
                m, g = state["exp_avg"], -p.grad if group["maximize"] else p.grad
                if p.is_complex():
                    p, m, g = map(torch.view_as_real, (p, m, g))
                kept, new = beta1 * m, (1 - beta1) * g
                direction = (kept + new).sign()
                margin = ((kept + new).abs() / (kept.abs() + new.abs())).nan_to_num(1.0)
                before = getattr(whole, "sign_margin", margin)
                whole.sign_margin = margin.minimum(before if before.shape == p.shape else margin)
                if group["weight_decay"]:  # zero times infinity is no number
                    p.mul_(1 - lr * group["weight_decay"])
                p.sub_(lr * direction)
                m.copy_(beta2 * m + (1 - beta2) * g)
        return loss


TABLE = Table(
    "Lion",
    like="SGD",
    published=Lion,
    cases=[
        {},
        {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.1},
        {"lr": 0.1, "betas": (0.3, 0.4), "maximize": True},
        {"lr": torch.tensor(0.1), "weight_decay": 0.1},
        {"lr": 0.1, "l1": 0.02, "weight_decay": 0.1, "maximize": True},
    ],
    richest={"lr": 0.1, "weight_decay": 0.1},
    slots={"exp_avg": Slot()},
    required="exp_avg",
    numbers=("lr", "betas", "weight_decay"),
    counts_steps=False,
    is_decoupled=True,
    drawn={"betas": tuple((a, b) for a in (0.9, 0.5, 0.0) for b in (0.99, 0.9, 0.5))},
    mild={"betas": [UNIT, UNIT]},
    extremes=[
        {"betas": (0.9, 0.99999)},
        {"betas": (0.99999, 0.0)},
        {"betas": (0.0, 0.0)},
        {"lr": 1e-30},  # a large one shows of what sign a rounding was
    ],
)
