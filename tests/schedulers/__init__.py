"""Every learning-rate scheduler of torch, and swa_utils, against stock on the same run."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from cases import assert_trained_alike
from torch.optim import lr_scheduler as sched
from torch.optim import swa_utils

as_tensor = functools.partial(torch.tensor, dtype=torch.float64)
every_lr = pytest.mark.parametrize("lr_type", [float, as_tensor], ids=["float", "tensor"])


class Polynomial(sched.LRScheduler):
    """One that users write."""

    def get_lr(self):
        return [lr * (1 - min(self.last_epoch, 9) / 10) ** 2 for lr in self.base_lrs]


class Legacy(sched._LRScheduler):
    def get_lr(self):
        return [group["lr"] * 0.9 for group in self.optimizer.param_groups]


class Warmup:
    """A callable object, whose attributes are in the checkpoints of LambdaLR."""

    def __init__(self, over):
        self.over = over

    def __call__(self, epoch):
        return min(1.0, (epoch + 1) / self.over)


def halving(epoch):
    return 0.5 ** (epoch // 2)


def cyclic(opt, **more):
    """Cycles the momentum too, where there is one."""
    more = {"cycle_momentum": "lr_decay" not in opt.defaults, "step_size_up": 3, **more}
    return sched.CyclicLR(opt, [0.001, 0.003], 0.08, **more)


def one_cycle(opt, **more):
    more = {"cycle_momentum": "lr_decay" not in opt.defaults, "total_steps": 14, **more}
    return sched.OneCycleLR(opt, [0.08, 0.05], **more)


# One of each kind, for tests of something else.
FEW = {
    "StepLR": lambda o: sched.StepLR(o, 2, 0.5),
    "OneCycleLR": lambda o: sched.OneCycleLR(
        o, 0.1, 9, cycle_momentum="lr_decay" not in o.defaults
    ),
    "CyclicLR": lambda o: sched.CyclicLR(
        o, 0.01, 0.1, 2, cycle_momentum="lr_decay" not in o.defaults
    ),
    "SequentialLR": lambda o: sched.SequentialLR(
        o, [sched.LinearLR(o, 0.1), sched.CosineAnnealingLR(o, 5)], [2]
    ),
    "ChainedScheduler": lambda o: sched.ChainedScheduler(
        [sched.ConstantLR(o, 0.1, 2), sched.ExponentialLR(o, 0.9)]
    ),
    "warm restarts": lambda o: sched.CosineAnnealingWarmRestarts(o, 2),
    "ReduceLROnPlateau": lambda o: sched.ReduceLROnPlateau(o, patience=0),
}

SCHEDULES = {
    "LambdaLR": lambda o: sched.LambdaLR(o, halving),
    "LambdaLR of each group": lambda o: sched.LambdaLR(o, [halving, Warmup(5)]),
    "MultiplicativeLR": lambda o: sched.MultiplicativeLR(o, lambda epoch: 0.8),
    "MultiplicativeLR of each group": lambda o: sched.MultiplicativeLR(o, [halving, Warmup(5)]),
    "StepLR": lambda o: sched.StepLR(o, 3, 0.3),
    "MultiStepLR": lambda o: sched.MultiStepLR(o, [2, 5, 5], 0.5),
    "ConstantLR": lambda o: sched.ConstantLR(o, 0.4, 4),
    "LinearLR": lambda o: sched.LinearLR(o, 0.2, 1.0, 6),
    "ExponentialLR": lambda o: sched.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: sched.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: sched.CosineAnnealingLR(o, 5, 0.001),
    "CosineAnnealingWarmRestarts": lambda o: sched.CosineAnnealingWarmRestarts(o, 3, 2, 0.001),
    "CyclicLR": cyclic,
    "CyclicLR triangular2": lambda o: cyclic(o, mode="triangular2", step_size_down=2),
    "CyclicLR exp_range": lambda o: cyclic(o, mode="exp_range", gamma=0.9),
    "CyclicLR scale_fn": lambda o: cyclic(o, scale_fn=halving, scale_mode="iterations"),
    "CyclicLR of lr alone": lambda o: cyclic(o, cycle_momentum=False),
    # At the top of the cycle there is no momentum at all.
    "CyclicLR down to no momentum": lambda o: cyclic(o, base_momentum=0.0, step_size_up=2),
    "OneCycleLR": one_cycle,
    "OneCycleLR linear": lambda o: one_cycle(o, anneal_strategy="linear", three_phase=True),
    "OneCycleLR of lr alone": lambda o: one_cycle(o, cycle_momentum=False),
    "OneCycleLR of each momentum": lambda o: one_cycle(o, max_momentum=[0.9, 0.5]),
    "ReduceLROnPlateau": lambda o: sched.ReduceLROnPlateau(
        o, factor=0.5, patience=0, min_lr=[0.001, 0.002]
    ),
    "ReduceLROnPlateau max": lambda o: sched.ReduceLROnPlateau(
        o, "max", 0.5, patience=1, cooldown=1, threshold_mode="abs"
    ),
    "SequentialLR with warm-up": lambda o: sched.SequentialLR(
        o, [sched.LinearLR(o, 0.1, total_iters=3), sched.CosineAnnealingLR(o, 6)], [4]
    ),
    "SequentialLR of three": lambda o: sched.SequentialLR(
        o,
        [sched.ConstantLR(o, 0.1, 3), sched.ExponentialLR(o, 0.7), sched.StepLR(o, 2, 0.1)],
        [3, 8],
    ),
    "ChainedScheduler": lambda o: sched.ChainedScheduler(
        [sched.LinearLR(o, 0.1, total_iters=4), sched.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ChainedScheduler of SequentialLR": lambda o: sched.ChainedScheduler(
        [
            sched.SequentialLR(o, [sched.ConstantLR(o, 0.5, 2), sched.ExponentialLR(o, 0.9)], [3]),
            sched.StepLR(o, 4, 0.5),
        ]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, [0.001, 0.03], 4),
    "SWALR linear": lambda o: swa_utils.SWALR(o, 0.001, 5, "linear"),
    "one's own": Polynomial,
    "one's own on _LRScheduler": Legacy,
}


class Run:
    """A float64 model in training by an optimizer with two groups, and a scheduler."""

    def __init__(self, build, model, schedule, lr_type=float):
        self.model = copy.deepcopy(model)
        self.params = [*self.model.parameters()]
        weights, biases = self.params[::2], self.params[1::2]
        self.opt = build(
            [{"params": weights}, {"params": biases, "lr": lr_type(0.02), "weight_decay": 0.05}],
            lr=lr_type(0.01),
            foreach=None,
        )
        self.schedule = schedule(self.opt)
        self.log = []

    def train(self, batches, *epoch):
        for inputs, targets in batches:
            self.opt.zero_grad()
            loss = (self.model(inputs) - targets).square().mean()
            loss.backward()
            self.opt.step()
            if isinstance(self.schedule, sched.ReduceLROnPlateau):
                self.schedule.step(loss.item())
            else:
                self.schedule.step(*epoch)
            self.log.append((options_of(self.opt), [*map(float, self.schedule.get_last_lr())]))
        return self

    def checkpoint(self):
        """Everything that a training loop saves, through a file."""
        file = io.BytesIO()
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.opt.state_dict(),
                "schedule": self.schedule.state_dict(),
            },
            file,
        )
        file.seek(0)
        return torch.load(file)

    def load(self, saved):
        self.model.load_state_dict(saved["model"])
        self.opt.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        return self


def options_of(opt):
    """All of the groups but the parameters, as numbers that can be compared."""

    def plain(value):
        if isinstance(value, tuple):
            return tuple(map(plain, value))
        return value.item() if isinstance(value, torch.Tensor) else value

    return [{k: plain(v) for k, v in g.items() if k != "params"} for g in opt.param_groups]


def moving(log):
    """How many different settings of lr, momentum and betas there were."""
    names = ("lr", "momentum", "betas")
    return len({str([[g.get(n) for n in names] for g in groups]) for groups, _ in log})


def assert_alike(ours, stock):
    assert ours.log == stock.log
    assert_trained_alike(ours.opt, ours.params, stock.opt, stock.params)
