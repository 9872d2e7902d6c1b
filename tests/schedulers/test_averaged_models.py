"""``swa_utils``: averaged models beside the optimizer."""

from __future__ import annotations

import pytest
import torch
from cases import assert_near, bits, each_class_or_backend, richest
from torch import nn
from torch.optim import swa_utils

from schedulers import SCHEDULES, Run, assert_alike

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


@each_class_or_backend
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
