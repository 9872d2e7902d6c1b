"""timm: param groups, its factory, Lookahead, schedulers, loss scaler and checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

import fusedopt
from interop import ADAMW, assert_same, every_case, ours, package

timm = package("timm")
package("timm.optim")
package("timm.scheduler")
package("timm.utils")

STEPS = 6


@pytest.fixture
def model():
    """Without a bias of the keys, whose gradient is nothing but rounding errors."""
    return timm.models.VisionTransformer(
        img_size=8,
        patch_size=4,
        in_chans=1,
        embed_dim=8,
        depth=2,
        num_heads=2,
        num_classes=3,
        qkv_bias=False,
    ).double()


@pytest.fixture
def data():
    return [(torch.randn(4, 1, 8, 8).double(), torch.randint(3, (4,))) for _ in range(STEPS)]


def train(model, optimizer, data, scheduler=None, scaler=None, overflows=(), **clip):
    losses, rates = [], []
    for at, (images, targets) in enumerate(data):
        loss = torch.nn.functional.cross_entropy(model(images), targets)
        if at in overflows:
            loss = loss * math.inf
        optimizer.zero_grad()
        if scaler:
            scaler(loss, optimizer, parameters=model.parameters(), **clip)
        else:
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        if scheduler:
            scheduler.step(at + 1)
        rates.append([group["lr"] for group in optimizer.param_groups])
    return {
        "losses": losses,
        "rates": rates,
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict() if scaler else None,
    }


def cosine(optimizer):
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=STEPS + 1, warmup_epochs=2, min_lr=1e-3
    )
    return scheduler


def layer_decay(model):
    return timm.optim.param_groups_layer_decay(
        model, weight_decay=0.1, layer_decay=0.6, no_weight_decay_list=model.no_weight_decay()
    )


def weight_decay(model):
    return timm.optim.param_groups_weight_decay(model, weight_decay=0.1)


@every_case
@pytest.mark.parametrize("groups", [weight_decay, layer_decay], ids=lambda f: f.__name__)
def test_param_groups(case, groups, model, data):
    """timm's schedulers multiply lr with the ``lr_scale`` of the group."""
    results = []
    for build in (ours(case), case.stock):
        trained = copy.deepcopy(model)
        optimizer = build(groups(trained))
        results.append(train(trained, optimizer, data, cosine(optimizer)))
    rates = {group["lr"] for group in optimizer.param_groups}
    assert len(rates) == {weight_decay: 1, layer_decay: 4}[groups]
    assert_same(*results)


NAMES = ["sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad"]


def factory(name):
    """One that makes fusedopt's class under the name of torch's."""
    registry = timm.optim.OptimizerRegistry()
    info = timm.optim.get_optimizer_info(name)
    cls = getattr(fusedopt, info.opt_class.__name__)
    registry.register(dataclasses.replace(info, opt_class=cls))
    return registry.create_optimizer


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lookahead", ["", "lookahead_"])
def test_factory(name, lookahead, model, data):
    results = []
    for create in (factory(name), timm.optim.create_optimizer_v2):
        trained = copy.deepcopy(model)
        optimizer = create(
            trained, f"{lookahead}{name}", lr=0.01, weight_decay=0.1, layer_decay=0.7, foreach=False
        )
        results.append(train(trained, optimizer, data))
    assert_same(*results)


@pytest.mark.parametrize("name", NAMES)
def test_from_torch(name, model, data):
    """What timm made becomes fusedopt's in the middle, below a scheduler of timm's."""
    results = []
    for convert in (fusedopt.from_torch, None):
        trained = copy.deepcopy(model)
        optimizer = timm.optim.create_optimizer_v2(trained, name, lr=0.01, weight_decay=0.1)
        scheduler = cosine(optimizer)
        first = train(trained, optimizer, data[:3], scheduler)["losses"]
        if convert:
            convert(optimizer)
            assert type(optimizer).__module__.startswith("fusedopt")
        results.append((first, train(trained, optimizer, data[3:], scheduler)))
    assert_same(*results)


@pytest.mark.parametrize("mode", ["norm", "value", "agc", None])
def test_scaler(mode, model, data):
    """NativeScaler, with an overflow at the first step and later."""
    clip = {"clip_grad": 0.05, "clip_mode": mode} if mode else {}
    results = []
    for build in (ours(ADAMW), ADAMW.stock):
        trained = copy.deepcopy(model)
        scaler = timm.utils.NativeScaler(device="cpu")
        optimizer = build(weight_decay(trained))
        results.append(train(trained, optimizer, data, None, scaler, {0, 4}, **clip))
    assert_same(*results)


@every_case
def test_resuming(case, model, data, tmp_path):
    """From checkpoints of fusedopt and of stock."""
    whole = copy.deepcopy(model)
    expected = train(whole, ours(case)(layer_decay(whole)), data)
    for build in (ours(case), case.stock):
        half = copy.deepcopy(model)
        optimizer = build(layer_decay(half))
        train(half, optimizer, data[:3])
        saver = timm.utils.CheckpointSaver(half, optimizer, checkpoint_dir=str(tmp_path))
        saver.save_checkpoint(0)
        resumed = copy.deepcopy(model)
        optimizer = ours(case)(layer_decay(resumed))
        timm.models.resume_checkpoint(
            resumed, str(tmp_path / "last.pth.tar"), optimizer, log_info=False
        )
        actual = train(resumed, optimizer, data[3:])
        for key in ("weights", "optimizer"):
            assert_same(actual[key], expected[key])
