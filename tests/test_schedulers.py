"""Every learning-rate scheduler of torch, and swa_utils, against stock on the same run."""

from __future__ import annotations

import copy
import functools
import io
import warnings

import pytest
import torch
from cases import Case, assert_near, assert_trained_alike, bits, richest, snapshot
from torch import nn
from torch.optim import lr_scheduler as sched
from torch.optim import swa_utils

import fusedopt

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
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))


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


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


@pytest.fixture
def batches():
    """Of noise: the loss has plateaus from the start."""
    return [[torch.randn(5, n, dtype=torch.float64) for n in (4, 2)] for _ in range(12)]


# Every class ----------------------------------------------------------------------------------


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


@richest
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


@richest
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


# swa_utils ------------------------------------------------------------------------------------

AVERAGES = {
    "SWA": {},
    "SWA over many": {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    "EMA": {"avg_fn": swa_utils.get_ema_avg_fn(0.8)},
    "EMA over many": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.8)},
    "EMA of buffers too": {
        "multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.8),
        "use_buffers": True,
    },
}


def with_batch_norm():
    # A bias before it would have a gradient of rounding errors, which Adam turns into full steps.
    layers = nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2, bias=False)
    return nn.Sequential(*layers).double()


@richest
@pytest.mark.parametrize("average", AVERAGES)
def test_averaged_models(case, average, batches, backend):
    """The recipe: anneal, then average at a constant lr, then update_bn. In the middle all goes
    through a checkpoint, and at the end training goes on from the average."""
    model, schedule, runs = with_batch_norm(), SCHEDULES["SWALR"], []
    for build in (case.ours, case.stock):
        run = Run(build, model, SCHEDULES["CosineAnnealingLR"])
        averaged = swa_utils.AveragedModel(run.model, **AVERAGES[average])
        run.train(batches[:3])
        run.schedule = schedule(run.opt)
        for at, batch in enumerate(batches[3:]):
            run.train([batch])
            averaged.update_parameters(run.model)
            if at == 4:
                saved, shadow = run.checkpoint(), averaged.state_dict()
                run = Run(build, with_batch_norm(), schedule).load(saved)
                averaged = swa_utils.AveragedModel(run.model, **AVERAGES[average])
                averaged.load_state_dict(shadow)
        swa_utils.update_bn([inputs for inputs, _ in batches], averaged)
        means = [t.clone() for t in averaged.state_dict().values()]
        run.model.load_state_dict(averaged.module.state_dict())
        run.train(batches[:3])
        runs.append((run, means))
    (ours, means), (stock, exact) = runs
    assert means[0] == 9
    for mean, expected in zip(means[1:], exact[1:], strict=True):
        assert_near(mean, expected, dtype=torch.float64)
    assert_alike(ours, stock)


@richest
def test_an_average_is_not_touched_by_steps(case, model, batches, backend):
    """Nor by anything that the optimizer remembers of the parameters that it was copied from."""
    run = Run(case.ours, model, SCHEDULES["ConstantLR"]).train(batches[:2])
    averaged = swa_utils.AveragedModel(run.model)
    averaged.update_parameters(run.model)
    before = [bits(p) for p in averaged.parameters()]
    run.train(batches[2:4])
    assert [bits(p) for p in averaged.parameters()] == before
