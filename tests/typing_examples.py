"""What type checkers make of code that uses fusedopt. Checked by test_typing.py, never run.

Each ``type: ignore`` stands at a mistake; if it were no error, the comment would be one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel

import fusedopt


def as_in_torch(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Every class is a subclass of torch's, with its arguments."""
    sgd: torch.optim.SGD = fusedopt.SGD(model.parameters(), 0.1, 0.9, nesterov=True)
    adam: torch.optim.Adam = fusedopt.Adam(model.named_parameters(), lr=torch.tensor(1e-3))
    adamw: torch.optim.AdamW = fusedopt.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    rmsprop: torch.optim.RMSprop = fusedopt.RMSprop([torch.zeros(3, requires_grad=True)], 0.01)
    groups: list[dict[str, Any]] = [{"params": model.parameters(), "lr": 0.1}]
    adagrad: torch.optim.Adagrad = fusedopt.Adagrad(groups, lr_decay=0.1, fused=True)
    return [sgd, adam, adamw, rmsprop, adagrad]


def options(model: nn.Module) -> None:
    optimizer = fusedopt.AdamW(model.parameters(), l1=0.1, max_grad_norm=1.0, amp_fused=True)
    optimizer.max_grad_norm = None
    optimizer.amp_fused = False
    norm: Tensor | None = optimizer.grad_norm
    assert norm is None
    fusedopt.RMSprop(model.parameters(), eps_inside_sqrt=True)
    fusedopt.SGD(model.parameters(), capturable=True)


def loop(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-3)
    warmup = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=95)
    scheduler = lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [5])
    averaged, swa = AveragedModel(model), SWALR(optimizer, swa_lr=0.05)
    scaler = torch.amp.GradScaler("cpu")
    loss = torch.zeros(())
    for inputs, targets in batches:
        optimizer.zero_grad(set_to_none=True)
        loss = (model(inputs) - targets).square().mean()
        scaler.scale(loss)
        loss.backward()
        total: Tensor = fusedopt.clip_grad_norm_(model.parameters(), max_norm=1.0)
        assert total.isfinite()
        scaler.step(optimizer)
        scaler.update()
        optimizer.step()
        scheduler.step()
        swa.step()
        averaged.update_parameters(model)
    return loss.item()


def closure(model: nn.Module, inputs: Tensor) -> None:
    optimizer = fusedopt.SGD(model.parameters(), lr=0.1)

    def number() -> float:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return float(loss)

    def tensor() -> Tensor:
        return torch.tensor(number())

    value: float = optimizer.step(number)
    loss: Tensor = optimizer.step(tensor)
    optimizer.step(closure=tensor)
    print(value, loss)


def checkpoints(model: nn.Module) -> fusedopt.Adam:
    optimizer = fusedopt.Adam(model.parameters())
    saved: dict[str, Any] = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    optimizer.add_param_group({"params": [torch.zeros(2)], "lr": 0.1})
    handle = optimizer.register_step_post_hook(lambda opt, args, kwargs: None)
    handle.remove()
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    return optimizer


def in_the_backward(model: nn.Module) -> None:
    optimizer: fusedopt.AdamW = fusedopt.attach(model, fusedopt.AdamW, lr=1e-3)
    fusedopt.attach(model.parameters(), fusedopt.SGD)
    fusedopt.detach(optimizer)


def moving_over(model: nn.Module) -> torch.optim.Optimizer:
    stock = torch.optim.AdamW(model.parameters())
    scheduler = lr_scheduler.StepLR(stock, 30)
    ours = fusedopt.from_torch(stock, scheduler)
    ours.max_grad_norm = 1.0
    with fusedopt.patch():
        torch.optim.SGD(model.parameters())
    fusedopt.unpatch()
    return fusedopt.to_torch(ours, scheduler)


def mistakes(model: nn.Module, optimizer: fusedopt.AdamW) -> None:
    fusedopt.AdamW(model.parameters(), lr="fast")  # type: ignore[arg-type]
    fusedopt.AdamW(model.parameters(), betas=0.9)  # type: ignore[arg-type]
    fusedopt.AdamW(model.parameters(), learning_rate=1e-3)  # type: ignore[call-arg]
    fusedopt.AdamW(lr=1e-3)  # type: ignore[call-arg]
    fusedopt.SGD(model.parameters(), 0.1, 0.9, 0, 0, True, True)  # type: ignore[call-arg]
    fusedopt.SGD(model)  # type: ignore[arg-type]
    fusedopt.clip_grad_norm_(model.parameters(), None)  # type: ignore[arg-type]
    fusedopt.attach(model, torch.optim.AdamW)  # type: ignore[type-var]
    fusedopt.to_torch(torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    optimizer.max_grad_norm = "1"  # type: ignore[assignment]
    optimizer.step(3)  # type: ignore[arg-type]
    optimizer.grad_norm.item()  # type: ignore[union-attr]
    lr_scheduler.StepLR(optimizer)  # type: ignore[call-arg]
