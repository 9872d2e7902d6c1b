"""accelerate: prepared loops with accumulation, clipping, a GradScaler and saved states."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import RICHEST_OF, those_with
from torch.utils.data import DataLoader, TensorDataset

from interop import ADAMW, Recording, assert_same, every_case, ours, package, perceptron

accelerate = package("accelerate")

BATCHES, STEPS = 24, 12


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate remembers one configuration per process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def model():
    return perceptron()


@pytest.fixture
def data():
    return TensorDataset(torch.randn(4 * BATCHES, 6).double(), torch.randn(4 * BATCHES, 3).double())


class Loop:
    """One Accelerator with all that it prepares; two batches make a step.

    ``overflows`` are the steps whose loss is infinite. With ``scaler`` the model computes in fp16,
    as far as autocast touches its dtype: float64 it leaves alone.
    """

    def __init__(self, build, model, data, *, precision="no", overflows=(), max_norm=0.2):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
        )
        if precision == "fp16":  # Accelerator itself does so on all devices but the CPU
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler(
                "cpu", init_scale=1024.0, growth_interval=3
            )
        model = copy.deepcopy(model)
        optimizer = build(model.parameters())
        self.recording = Recording(optimizer)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            model,
            optimizer,
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
            DataLoader(data, batch_size=4),
        )
        self.overflows, self.max_norm = overflows, max_norm
        self.batch, self.log, self.skipped = 0, [], []

    def run(self, batches=BATCHES):
        accelerator = self.accelerator
        loader = accelerate.skip_first_batches(self.loader, self.batch)
        for _, (inputs, targets) in zip(range(batches), loader, strict=False):
            with accelerator.accumulate(self.model):
                with accelerator.autocast():
                    loss = (self.model(inputs) - targets).square().mean()
                if self.batch // 2 in self.overflows:
                    loss = loss * math.inf
                accelerator.backward(loss)
                if accelerator.sync_gradients and self.max_norm:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), self.max_norm)
                    self.log.append(norm)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            self.log.append((loss.item(), self.scheduler.get_last_lr()))
            if accelerator.sync_gradients:
                skipped = self.optimizer.step_was_skipped
                assert accelerator.optimizer_step_was_skipped == skipped
                self.skipped.append(skipped)
            self.batch += 1
        return self

    @property
    def result(self):
        scaler = self.accelerator.scaler
        return {
            "log": self.log,
            "skipped": self.skipped,
            "weights": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        }

    @property
    def lr_steps(self):
        """How often the scheduler has moved."""
        return self.scheduler.state_dict()["last_epoch"]


@every_case
def test_accumulating_and_clipping(case, model, data):
    mine, stock = (Loop(build, model, data).run() for build in (ours(case), case.stock))
    assert_same(mine.result, stock.result)
    assert mine.lr_steps == STEPS and not any(mine.skipped)


@every_case
@pytest.mark.parametrize("overflows", [{0, 1, 5}, {3, 4, 11}], ids=["first", "later"])
@pytest.mark.parametrize("max_norm", [0.2, None], ids=["clipped", ""])
def test_overflow(case, overflows, max_norm, model, data):
    """The scheduler stands still when a step is skipped."""
    more = {"precision": "fp16", "overflows": overflows, "max_norm": max_norm}
    mine, stock = (Loop(build, model, data, **more).run() for build in (ours(case), case.stock))
    assert mine.skipped == [step in overflows for step in range(STEPS)]
    assert mine.lr_steps == STEPS - len(overflows)
    assert_same(mine.result, stock.result)


@pytest.mark.parametrize(
    "case", [*map(RICHEST_OF.get, those_with("fused"))], ids=lambda case: case.name
)
@pytest.mark.parametrize("max_norm", [0.2, None], ids=["clipped", ""])
def test_amp_fused(case, max_norm, model, data):
    """As with stock's ``fused=True``, accelerate cannot see that the step skipped itself, and the
    scheduler moves on. torch has no fused RMSprop."""
    more = {"precision": "fp16", "overflows": {3, 4, 11}, "max_norm": max_norm}
    options = {k: v for k, v in case.options.items() if k != "foreach"}
    mine = Loop(lambda p: case.ours(p, fused=True, amp_fused=True), model, data, **more).run()
    stock = Loop(
        lambda p: getattr(torch.optim, case.name)(p, fused=True, **options), model, data, **more
    ).run()
    assert not any(mine.skipped) and mine.lr_steps == STEPS
    assert_same(mine.result, stock.result)


@every_case
def test_saving_and_loading_in_the_middle(case, model, data, tmp_path):
    """A state of fusedopt or of stock."""
    more = {"precision": "fp16", "overflows": {2, 8}}
    whole = Loop(ours(case), model, data, **more).run().result
    for build in (ours(case), case.stock):
        saved = Loop(build, model, data, **more).run(BATCHES // 2)
        saved.accelerator.save_state(tmp_path)
        resumed = Loop(ours(case), perceptron(), data, **more)
        resumed.accelerator.load_state(tmp_path)
        resumed.batch, resumed.log, resumed.skipped = saved.batch, saved.log, saved.skipped
        assert_same(resumed.run().result, whole)


@every_case
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision(case, precision, model, data):
    data = TensorDataset(*(t.float() for t in data.tensors))
    more = {"precision": precision, "overflows": {2} if precision == "fp16" else ()}
    mine, stock = (
        Loop(build, model.float(), data, **more).run() for build in (ours(case), case.stock)
    )
    assert mine.skipped == stock.skipped and any(mine.skipped) == (precision == "fp16")
    mine.recording.assert_stock_agrees(case.stock)
    assert_same(mine.result["log"], stock.result["log"], rtol=0.05, atol=0.05)


def test_max_grad_norm(model, data):
    """The option takes the place of ``accelerator.clip_grad_norm_``."""
    mine = Loop(lambda p: ours(ADAMW)(p, max_grad_norm=0.2), model, data, max_norm=None).run()
    stock = Loop(ADAMW.stock, model, data, max_norm=0.2).run()
    for key in ("weights", "optimizer"):
        assert_same(mine.result[key], stock.result[key])


def test_a_step_within_a_swap(model, data):
    """accelerate's wrapper hides the methods of the optimizer, which is its ``optimizer``."""
    loop = Loop(lambda p: ours(ADAMW)(p, ema=0.5), model, data).run()
    before = copy.deepcopy(loop.model.state_dict())
    assert not hasattr(loop.optimizer, "swap_ema")
    with loop.optimizer.optimizer.swap_ema():
        loop.model.float().double()
        with pytest.raises(RuntimeError, match="swap_ema"):
            loop.optimizer.step()
    assert_same(loop.model.state_dict(), before, rtol=0, atol=0)
    loop.run(2)
