"""Training loops with torch.amp.GradScaler and autocast as people write them, against stock.

The models are float64 and the scales powers of two, which change no bit of a gradient.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from cases import COUNTING, Case, assert_near, assert_trained_alike
from torch import nn

import fusedopt

CASES = [
    # With dampening it shows which step of SGD was the first.
    Case("SGD", {"lr": 0.01, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    *(Case(case.name, {**case.options, "lr": 0.01}) for case in COUNTING),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
LIMIT = 0.4

# What clips, and the options of the optimizer. Stock is clipped by torch.
WAYS = {
    "scaler alone": (None, {}),
    "clips, amp_fused": (fusedopt.clip_grad_norm_, {"amp_fused": True}),
    "max_grad_norm": (None, {"max_grad_norm": LIMIT}),
    "amp_fused": (None, {"amp_fused": True}),
    "max_grad_norm, amp_fused": (None, {"max_grad_norm": LIMIT, "amp_fused": True}),
    "clips": (fusedopt.clip_grad_norm_, {}),
}
MOST_DIFFERENT = [*WAYS][-3:]


class Run:
    """A model in training with a GradScaler."""

    def __init__(self, build, model, clip=None, **options):
        self.build, self.clip, self.options = build, clip, options
        self.log, self.norms = [], []
        self.begin(copy.deepcopy(model))

    def begin(self, model):
        self.model = model
        self.params = [*model.parameters()]
        groups = [{"params": self.params[:1]}, {"params": self.params[1:], "lr": 0.02}]
        self.opt = self.build(groups, **self.options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)

    def loss(self, batch):
        inputs, targets = batch
        return (self.model(inputs) - targets).square().mean()

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def step(self):
        norm = None
        if self.clip:
            self.scaler.unscale_(self.opt)
            norm = self.clip(self.params, LIMIT)
        self.scaler.step(self.opt)
        if "max_grad_norm" in self.options:
            norm = self.opt.grad_norm
        self.scaler.update()
        self.log.append(self.scaler.state_dict())
        self.norms.append(norm)

    def reload(self):
        """Goes on with new objects, by way of a file."""
        file = io.BytesIO()
        parts = ("model", "opt", "scaler")
        torch.save({part: getattr(self, part).state_dict() for part in parts}, file)
        file.seek(0)
        self.begin(new_model())
        for part, state in torch.load(file).items():
            getattr(self, part).load_state_dict(state)


def new_model():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def assert_alike(ours, stock):
    assert ours.log == stock.log
    assert_trained_alike(ours.opt, ours.params, stock.opt, stock.params)
    for norm, exact in zip(ours.norms, stock.norms, strict=True):
        # Without amp_fused there is no step, and so no new norm, if there was an overflow.
        if exact is not None and exact.isfinite():
            assert_near(norm, exact, dtype=exact.dtype)


def plain(run, batches):
    for batch in batches:
        run.opt.zero_grad()
        run.backward(run.loss(batch))
        run.step()
