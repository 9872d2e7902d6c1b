"""What single schedulers can do, and schedulers of another optimizer."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cases import Case, richest, snapshot
from torch.optim import lr_scheduler as sched

import fusedopt
from schedulers import SCHEDULES, Run, assert_alike, every_lr, moving, options_of

# What single schedulers can do ----------------------------------------------------------------


@richest
@every_lr
def test_warm_restarts_at_fractions_of_an_epoch(case, lr_type, model, batches, backend):
    """Also back in time, as after a crash."""
    runs = []
    for build in (case.ours, case.stock):
        run = Run(build, model, SCHEDULES["CosineAnnealingWarmRestarts"], lr_type)
        epochs = [0.25, 0.5, 0.99, 1.0, 1.3, 2.9, 3.0, 6.99, 7.5, 2.25, 2.5, 40.1]
        for batch, epoch in zip(batches, epochs, strict=True):
            run.train([batch], epoch)
        runs.append(run)
    assert_alike(*runs)
    assert moving(runs[0].log) > 9


@richest
@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
def test_a_cycle_that_starts_after_some_steps(case, name, model, batches, backend):
    """The momentum changes from none to much while there is state already."""
    options = {k: v for k, v in case.options.items() if k in ("weight_decay", "lr_decay")}
    if case.name == "RMSprop":
        options["momentum"] = 0.3  # from none at all, stock's RMSprop fails with a KeyError
    case, runs = Case(case.name, options), []
    for build in (case.ours, case.stock):
        run = Run(build, model, SCHEDULES["ConstantLR"]).train(batches[:4])
        run.schedule = SCHEDULES[name](run.opt)
        runs.append(run.train(batches[4:]))
    assert_alike(*runs)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("schedule", ["CyclicLR", "OneCycleLR"])
def test_cycles_of_betas_that_were_tensors(name, schedule, model, batches, backend):
    """The schedulers put a number in the place of the first."""
    betas = tuple(torch.tensor(beta, dtype=torch.float64) for beta in (0.8, 0.95))
    case, runs = Case(name, {"betas": betas}), []
    for build in (case.ours, case.stock):
        runs.append(Run(build, model, SCHEDULES[schedule]).train(batches))
        assert isinstance(runs[-1].opt.param_groups[0]["betas"][0], float)
    assert_alike(*runs)


@pytest.mark.parametrize(
    "schedule",
    [lambda o: sched.CyclicLR(o, 0.01, 0.1), lambda o: sched.OneCycleLR(o, 0.1, 9)],
    ids=["CyclicLR", "OneCycleLR"],
)
def test_cycles_without_a_momentum(schedule, model):
    """Adagrad has none: torch's error, which leaves the groups as with stock."""
    left = []
    for cls in (fusedopt.Adagrad, torch.optim.Adagrad):
        opt = cls(model.parameters(), lr=0.1)
        with pytest.raises(ValueError) as caught:
            schedule(opt)
        left.append((str(caught.value), options_of(opt)))
    assert left[0] == left[1] and "must support momentum" in left[0][0]


@richest
def test_one_lr_tensor_for_all_groups(case, model, batches, backend):
    """Multiplied once for each group that shares it, in torch and here."""
    runs = []
    for build in (case.ours, case.stock):
        run = Run(build, model, lambda o: sched.ConstantLR(o, 1.0))
        weights, biases = run.params[::2], run.params[1::2]
        lr = torch.tensor(0.01, dtype=torch.float64)
        run.opt = build([{"params": weights}, {"params": biases}], lr=lr, foreach=None)
        run.schedule = sched.MultiplicativeLR(run.opt, lambda epoch: 0.9)
        runs.append(run.train(batches[:6]))
    assert_alike(*runs)


@richest
def test_the_order_of_steps_is_watched(case, model, batches, backend):
    """torch warns if the schedule goes first, and only then."""
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        Run(case.ours, model, SCHEDULES["StepLR"]).schedule.step()
    run = Run(case.ours, model, SCHEDULES["StepLR"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.opt.step(lambda: run.model(batches[0][0]).sum())
        run.schedule.step()


@richest
def test_copies_are_scheduled_alone(case, model, batches, backend):
    """The scheduler wraps step() of the object that it was given, and of no other."""
    run = Run(case.ours, model, SCHEDULES["ExponentialLR"]).train(batches[:3])
    twin = Run(case.ours, model, SCHEDULES["ExponentialLR"])
    twin.model, twin.opt = copy.deepcopy((run.model, run.opt))
    twin.params = [*twin.model.parameters()]
    twin.schedule = SCHEDULES["ExponentialLR"](twin.opt)
    before = snapshot(run.opt)
    twin.train(batches[3:6])
    assert snapshot(run.opt) == before
    run.train(batches[3:6])
    assert snapshot(twin.opt)[:2] == snapshot(run.opt)[:2]


# Schedulers of another optimizer --------------------------------------------------------------

FOREIGN = {
    "SequentialLR": lambda opt, a, b: sched.SequentialLR(opt, [a, b], [2]),
    "SequentialLR, first": lambda opt, a, b: sched.SequentialLR(opt, [b, a], [2]),
    "ChainedScheduler": lambda opt, a, b: sched.ChainedScheduler([a, b]),
    "ChainedScheduler, optimizer": lambda opt, a, b: sched.ChainedScheduler([b], optimizer=opt),
}


@richest
@pytest.mark.parametrize("combine", FOREIGN.values(), ids=list(FOREIGN))
def test_a_scheduler_of_another_optimizer(case, combine, model, batches):
    """torch's error, and neither optimizer nor scheduler has changed."""
    raised = []
    for build in (case.ours, case.stock):
        here, there = (Run(build, model, SCHEDULES["ConstantLR"]) for _ in range(2))
        runs = (here.train(batches[:2]), there.train(batches[:3]))
        before = [(snapshot(run.opt), run.schedule.state_dict()) for run in runs]
        with pytest.raises(ValueError, match="belong to the same optimizer") as caught:
            combine(here.opt, here.schedule, there.schedule)
        assert [(snapshot(run.opt), run.schedule.state_dict()) for run in runs] == before
        raised.append(str(caught.value))
    assert raised[0] == raised[1]
