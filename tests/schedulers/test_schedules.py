"""Every class of scheduler that torch has."""

from __future__ import annotations

import warnings

import pytest
from cases import RICHEST_OF, bits, each_class_or_backend, richest
from torch import nn
from torch.optim import lr_scheduler as sched
from torch.optim import swa_utils

import fusedopt
from schedulers import (
    SCHEDULES,
    Run,
    as_tensor,
    assert_alike,
    cyclic,
    every_lr,
    halving,
    moving,
    one_cycle,
    options_of,
)

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))


def test_every_class_of_torch_is_here(model):
    def classes(schedule):
        return {type(schedule)}.union(*map(classes, getattr(schedule, "_schedulers", ())))

    known = {
        cls
        for module in (sched, swa_utils)
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, sched.LRScheduler)
    }
    runs = [Run(fusedopt.Adam, model, schedule) for schedule in SCHEDULES.values()]
    covered = set().union(*(classes(run.schedule) for run in runs))
    assert known - covered == {sched.LRScheduler, sched._LRScheduler}


@each_class_or_backend
@every_lr
@every_schedule
def test_trajectories(case, schedule, lr_type, model, batches, backend):
    ours, stock = (Run(build, model, schedule, lr_type) for build in (case.ours, case.stock))
    assert options_of(ours.opt) == options_of(stock.opt)
    lrs = [group["lr"] for group in ours.opt.param_groups]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # steps and schedule are in the right order
        ours.train(batches)
        stock.train(batches)
    assert_alike(ours, stock)
    assert moving(ours.log) > 1
    if lr_type is as_tensor:
        assert all(g["lr"] is lr for g, lr in zip(ours.opt.param_groups, lrs, strict=True))


# With momentum, with betas, and with a decay of its own instead.
@pytest.mark.parametrize(
    "case", [RICHEST_OF[name] for name in ("SGD", "AdamW", "Adagrad")], ids=lambda case: case.name
)
@every_schedule
@pytest.mark.parametrize("way", ["ours to ours", "stock to ours", "ours to stock"])
def test_resuming_in_the_middle(case, schedule, way, model, batches):
    """Into new objects, through torch.save and torch.load."""
    build = {"ours": case.ours, "stock": case.stock}
    source, target = (build[name] for name in way.split(" to "))
    early = Run(source, model, schedule).train(batches[:5])
    saved = early.checkpoint()
    fresh = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    late = Run(target, fresh, schedule).load(saved)
    assert options_of(late.opt) == options_of(early.opt)
    late.train(batches[5:])
    late.log[:0] = early.log
    assert_alike(late, Run(case.stock, model, schedule).train(batches))


@richest
def test_resuming_with_an_lr_tensor(case, model, batches, backend):
    """It is another tensor after loading, which the scheduler and the step both have to find."""
    schedule = SCHEDULES["OneCycleLR of lr alone"]
    early = Run(case.ours, model, schedule, as_tensor).train(batches[:5])
    late = Run(case.ours, model, schedule, as_tensor).load(early.checkpoint())
    before = bits(early.opt.param_groups[0]["lr"])
    late.train(batches[5:])
    assert bits(early.opt.param_groups[0]["lr"]) == before
    whole = Run(case.ours, model, schedule, as_tensor).train(batches)
    assert early.log + late.log == whole.log
    assert [bits(p) for p in late.params] == [bits(p) for p in whole.params]


LAST_EPOCH = {
    "LambdaLR": lambda o, at: sched.LambdaLR(o, halving, at),
    "StepLR": lambda o, at: sched.StepLR(o, 3, 0.3, at),
    "CosineAnnealingLR": lambda o, at: sched.CosineAnnealingLR(o, 9, 0.0, at),
    "CosineAnnealingWarmRestarts": lambda o, at: sched.CosineAnnealingWarmRestarts(
        o, 3, last_epoch=at
    ),
    "CyclicLR": lambda o, at: cyclic(o, last_epoch=at),
    "OneCycleLR": lambda o, at: one_cycle(o, last_epoch=at),
}


@richest
@pytest.mark.parametrize("schedule", LAST_EPOCH.values(), ids=list(LAST_EPOCH))
def test_resuming_by_last_epoch(case, schedule, model, batches):
    """A new scheduler reads what an earlier one left in the groups of the checkpoint."""
    runs = []
    for build in (case.ours, case.stock):
        early = Run(build, model, lambda o: schedule(o, -1)).train(batches[:5])
        saved = early.checkpoint()
        late = Run(build, model, lambda o: sched.ConstantLR(o, 1.0))
        late.model.load_state_dict(saved["model"])
        late.opt.load_state_dict(saved["optimizer"])
        late.schedule = schedule(late.opt, early.schedule.last_epoch)
        runs.append(late.train(batches[5:]))
    assert_alike(*runs)
    with pytest.raises(KeyError, match="initial_lr"):
        Run(case.ours, model, lambda o: schedule(o, 4))
