"""lightning.pytorch: automatic and manual optimization, clipping, precision plugins, schedules."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import fusedopt
from interop import ADAMW, Recording, assert_same, every_case, ours, package, perceptron, two_cases

L = package("lightning.pytorch")
MixedPrecision = L.plugins.precision.MixedPrecision
LightningOptimizer = package("lightning.pytorch.core.optimizer").LightningOptimizer

BATCHES = 8  # in an epoch
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*num_workers", "ignore:.*LeafSpec", "ignore:.*lr_scheduler.step"
)


@pytest.fixture(autouse=True)
def quiet():
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


@pytest.fixture
def model():
    return perceptron()


@pytest.fixture
def data():
    return torch.randn(4 * BATCHES, 6).double(), torch.randn(4 * BATCHES, 3).double()


def each_step(optimizer):
    return {"scheduler": lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}


class Regression(L.LightningModule):
    """``overflows`` are the batches, counted over all epochs, whose loss is infinite."""

    def __init__(self, build, model, schedule=each_step, overflows=()):
        super().__init__()
        self.model, self.build, self.schedule = copy.deepcopy(model), build, schedule
        self.overflows, self.losses, self.recordings = overflows, [], []

    def loss(self, batch):
        inputs, targets = batch
        loss = (self.model(inputs) - targets).square().mean()
        if len(self.losses) in self.overflows:
            loss = loss * math.inf
        self.losses.append(loss.item())
        return loss

    def training_step(self, batch, _):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = self.build(self.model.parameters())
        self.recordings.append(Recording(optimizer))
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}

    @property
    def result(self):
        return {
            "losses": self.losses,
            "steps": [recording.steps for recording in self.recordings],
            "weights": self.model.state_dict(),
            "optimizers": [opt.state_dict() for opt in self.trainer.optimizers],
            "rates": [c.scheduler.get_last_lr() for c in self.trainer.lr_scheduler_configs],
        }


def fit(module, data, checkpoint=None, **more):
    options = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    loader = DataLoader(TensorDataset(*data), batch_size=4)
    trainer = L.Trainer(**options | more)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return module


def both(case, model, data, *, overflows=(), schedule=each_step, **more):
    """The same training with fusedopt and with stock."""
    plugins = more.pop("plugins", lambda: None)
    return [
        fit(Regression(build, model, schedule, overflows), data, plugins=plugins(), **more)
        for build in (ours(case), case.stock)
    ]


def float16():
    """What ``precision="16-mixed"`` makes for a GPU. Autocast leaves float64 alone."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    return MixedPrecision("16-mixed", "cpu", scaler)


clipping = pytest.mark.parametrize(
    "clip",
    [
        {"gradient_clip_val": 0.2},
        {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        {},
    ],
    ids=["norm", "value", "unclipped"],
)


@every_case
@clipping
def test_clipping_and_accumulating(case, clip, model, data):
    mine, stock = both(case, model, data, accumulate_grad_batches=2, **clip)
    assert len(mine.recordings[0].steps) == BATCHES
    assert_same(mine.result, stock.result)


@every_case
@clipping
def test_overflow(case, clip, model, data):
    overflows = {0, 5, 6, 11}
    mine, stock = both(case, model, data, overflows=overflows, plugins=float16, **clip)
    assert len(mine.recordings[0].steps) == 2 * BATCHES - len(overflows)
    assert_same(mine.result, stock.result)


def assert_same_but_for_gradients(mine, stock):
    """They are not what stock leaves behind when a step clips, unscales or frees them."""
    for key in ("losses", "weights", "optimizers", "rates"):
        assert_same(mine.result[key], stock.result[key])


def test_amp_fused(model, data):
    """As with stock's ``fused=True``: without clipping equal, with clipping refused."""
    builds = (
        lambda params: fusedopt.AdamW(params, fused=True, amp_fused=True),
        lambda params: torch.optim.AdamW(params, fused=True),
    )
    assert_same_but_for_gradients(
        *(
            fit(Regression(build, model, overflows={3, 11}), data, plugins=float16())
            for build in builds
        )
    )
    for build in builds:
        with pytest.raises(RuntimeError, match="AdamW, does not allow for gradient clipping"):
            fit(Regression(build, model), data, plugins=float16(), gradient_clip_val=0.2)


def test_max_grad_norm(model, data):
    """The option takes the place of ``gradient_clip_val``."""
    mine = fit(Regression(lambda p: ours(ADAMW)(p, max_grad_norm=0.2), model), data)
    stock = fit(Regression(ADAMW.stock, model), data, gradient_clip_val=0.2)
    assert_same_but_for_gradients(mine, stock)
    assert mine.trainer.optimizers[0].grad_norm > 0


@every_case
def test_attach(case, model, data):
    """The optimizer in the backward: ``step()`` of the Trainer finds nothing to do."""

    def attached(params):
        cls = getattr(fusedopt, case.name)
        return fusedopt.attach(params, cls, foreach=False, **case.options)

    mine, stock = (fit(Regression(build, model), data) for build in (attached, case.stock))
    assert_same_but_for_gradients(mine, stock)


@every_case
def test_64_true(case, model, data):
    """The precision plugin converts the model."""
    mine, stock = both(case, model.float(), data, precision="64-true")
    assert mine.model[0].weight.dtype == torch.float64
    assert_same(mine.result, stock.result)


@every_case
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_low_precision(case, precision, model, data):
    more = {"plugins": float16} if precision == "16-mixed" else {"precision": precision}
    data = [t.float() for t in data]
    mine, stock = both(case, model.float(), data, gradient_clip_val=0.2, **more)
    mine.recordings[0].assert_stock_agrees(case.stock)
    assert_same(mine.losses, stock.losses, rtol=0.1, atol=0.1)


SCHEDULES = {
    "every other step": lambda opt: {
        "scheduler": lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
        "interval": "step",
        "frequency": 2,
    },
    "epoch": lambda opt: lr_scheduler.StepLR(opt, 1, gamma=0.3),
    "plateau": lambda opt: {
        "scheduler": lr_scheduler.ReduceLROnPlateau(
            opt, factor=0.5, patience=0, threshold=1e9, threshold_mode="abs"
        ),
        "monitor": "loss",
    },
    "one cycle": lambda opt: {
        "scheduler": lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=3 * BATCHES),
        "interval": "step",
    },
}


@two_cases
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules(case, schedule, model, data):
    mine, stock = both(case, model, data, schedule=schedule, max_epochs=3)
    assert len({group["lr"] for _, [group] in mine.recordings[0].steps}) > 1
    assert_same(mine.result, stock.result)


@every_case
def test_resuming(case, model, data, tmp_path):
    """From checkpoints of fusedopt and of stock."""
    more = {"overflows": {3, 20}, "plugins": float16, "max_epochs": 4}
    whole, _ = both(case, model, data, **more)
    half = both(case, model, data, **more | {"max_epochs": 2})
    for i, saved in enumerate(half):
        path = tmp_path / f"{i}.ckpt"
        saved.trainer.save_checkpoint(path)
        resumed = Regression(ours(case), perceptron(), overflows={4})
        fit(resumed, data, checkpoint=path, plugins=float16(), max_epochs=4)
        resumed.losses[:0] = saved.losses
        resumed.recordings[0].steps[:0] = saved.recordings[0].steps
        assert_same(resumed.result, whole.result)


class TwoOptimizers(Regression):
    """Manual optimization: the halves of the model take turns, each clipped and scheduled."""

    def __init__(self, *args, clip=None, **more):
        super().__init__(*args, **more)
        self.automatic_optimization, self.clip = False, clip

    def configure_optimizers(self):
        optimizers = [self.build(self.model[i].parameters()) for i in (0, 2)]
        self.recordings = [*map(Recording, optimizers)]
        return optimizers, [lr_scheduler.ExponentialLR(opt, 0.9) for opt in optimizers]

    def training_step(self, batch, at):
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            with optimizer.toggle_model():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                if self.clip:
                    self.clip_gradients(optimizer, self.clip, gradient_clip_algorithm="norm")
                optimizer.step()
            scheduler.step()


@every_case
def test_manual_optimization(case, model, data):
    mine, stock = (
        fit(TwoOptimizers(build, model, clip=0.1), data) for build in (ours(case), case.stock)
    )
    assert_same(mine.result, stock.result)


@every_case
def test_manual_optimization_and_overflow(case, model, data):
    mine, stock = (
        fit(TwoOptimizers(build, model, overflows={0, 7, 12, 13}), data, plugins=float16())
        for build in (ours(case), case.stock)
    )
    assert [len(recording.steps) for recording in mine.recordings] == [2 * BATCHES - 2] * 2
    assert_same(mine.result, stock.result)


def test_the_wrapper_shows_the_norm():
    """Lightning hands out a wrapper whose class inherits from the optimizer's."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.AdamW([param], max_grad_norm=0.5)
    wrapper = LightningOptimizer(optimizer)
    param.grad = torch.full((3,), 2.0)
    optimizer.step()
    assert wrapper.max_grad_norm == 0.5
    torch.testing.assert_close(wrapper.grad_norm, torch.tensor(12.0).double().sqrt())


def of_fabric(optimizer):
    fabric = package("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    return fabric.setup_optimizers(optimizer)


WRAPPERS = {"fabric": of_fabric, "trainer": LightningOptimizer}


@every_case
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_options_set_on_the_wrapper(case, wrap):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = case.ours([param])
    wrapper = wrap(optimizer)
    wrapper.max_grad_norm = 0.5
    param.grad = torch.full((3,), 2.0)
    optimizer.step()
    for seen in (wrapper, optimizer):
        assert seen.max_grad_norm == 0.5
        torch.testing.assert_close(seen.grad_norm, torch.tensor(12.0).double().sqrt())
    wrapper.max_grad_norm = None
    wrapper.amp_fused = True
    assert optimizer.amp_fused and optimizer._step_supports_amp_scaling
    wrapper.amp_fused = False
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


@every_case
def test_a_step_of_fabric_within_a_swap(case):
    """The wrapper's own method swaps, and its own step() is stopped."""
    param = torch.nn.Parameter(torch.randn(3))
    optimizer = case.ours([param], ema=0.5)
    wrapper = of_fabric(optimizer)
    for _ in range(2):
        param.grad = torch.randn(3)
        wrapper.step()
    before = param.detach().clone()
    for swapped in (wrapper, optimizer):
        with swapped.swap_ema():
            assert not torch.equal(param, before)
            for stepped in (wrapper, optimizer):
                with pytest.raises(RuntimeError, match="swap_ema"):
                    stepped.step()
        assert torch.equal(param, before)
    wrapper.step()
    assert not torch.equal(param, before)
