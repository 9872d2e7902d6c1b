"""Training loops with torch.amp.GradScaler and autocast as people write them, against stock.

The models are float64 and the scales powers of two, which change no bit of a gradient.
"""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from cases import COUNTING, NAMES, Case, assert_near, assert_trained_alike, snapshot, those_with
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


@pytest.fixture
def model():
    return new_model()


@pytest.fixture
def batches():
    return [[torch.randn(5, n, dtype=torch.float64) for n in (4, 2)] for _ in range(9)]


def poisoned(batches, at):
    """An infinite target, and from it infinite gradients and NaN, in some of the batches."""
    return [
        [inputs, torch.full_like(targets, math.inf)] if i in at else [inputs, targets]
        for i, (inputs, targets) in enumerate(batches)
    ]


def assert_alike(ours, stock):
    assert ours.log == stock.log
    assert_trained_alike(ours.opt, ours.params, stock.opt, stock.params)
    for norm, exact in zip(ours.norms, stock.norms, strict=True):
        # Without amp_fused there is no step, and so no new norm, if there was an overflow.
        if exact is not None and exact.isfinite():
            assert_near(norm, exact, dtype=exact.dtype)


# Loops ----------------------------------------------------------------------------------------


def plain(run, batches):
    for batch in batches:
        run.opt.zero_grad()
        run.backward(run.loss(batch))
        run.step()


def accumulating(run, batches):
    """Over three batches; if one overflows, none of them counts."""
    for at, batch in enumerate(batches):
        run.backward(run.loss(batch) / 3)
        if at % 3 == 2:
            run.step()
            run.opt.zero_grad()


def zeroing_in_place(run, batches):
    for batch in batches:
        run.opt.zero_grad(set_to_none=False)
        run.backward(run.loss(batch))
        run.step()


def several_losses(run, batches):
    """Scaled together, through one graph."""
    for inputs, targets in batches:
        run.opt.zero_grad()
        outputs = run.model(inputs)
        losses = [(outputs - targets).square().mean(), outputs.abs().mean()]
        for loss in run.scaler.scale(losses):
            loss.backward(retain_graph=True)
        run.step()


def parts_without_gradients(run, batches):
    """The last layer takes no part in every other step, nor in the first."""
    for at, (inputs, targets) in enumerate(batches):
        run.opt.zero_grad()
        outputs = run.model(inputs) if at % 2 else run.model[0](inputs)[:, :2]
        run.backward((outputs - targets).square().mean())
        run.step()


def gradient_penalty(run, batches):
    """Through the graph of scaled gradients."""
    for batch in batches:
        run.opt.zero_grad()
        loss = run.loss(batch)
        scaled = torch.autograd.grad(run.scaler.scale(loss), run.params, create_graph=True)
        norms = [(grad / run.scaler.get_scale()).square().sum() for grad in scaled]
        run.backward(loss + sum(norms))
        run.step()


def scheduled(run, batches):
    """The schedule moves only if the step was taken."""
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        run.opt, 0.03, 12, cycle_momentum="lr_decay" not in run.opt.defaults
    )
    for batch in batches:
        before = run.scaler.get_scale()
        plain(run, [batch])
        if run.scaler.get_scale() >= before:
            schedule.step()
        run.log.append(schedule.get_last_lr())


def scales_by_hand(run, batches):
    for at, batch in enumerate(batches):
        plain(run, [batch])
        if at in (1, 4):
            run.scaler.update(2.0 ** (at + 5))


def checkpoints(run, batches):
    for at, batch in enumerate(batches):
        if at in (1, 3, 6):
            run.reload()
        plain(run, [batch])


def switching(run, batches):
    """amp_fused on and off; stock has no such attribute, and does not mind."""
    for at, batch in enumerate(batches):
        if at in (0, 2, 3, 5, 8):
            run.opt.amp_fused = not getattr(run.opt, "amp_fused", False)
        plain(run, [batch])


def disabled(run, batches):
    run.scaler = torch.amp.GradScaler("cpu", enabled=False)
    plain(run, batches)


# Each with the batches that overflow.
FLOWS = {
    "plain": (plain, []),
    "overflow at the first step": (plain, [0]),
    "overflow in the middle": (plain, [4]),
    "repeated overflow": (plain, [0, 1, 3, 4, 5, 6]),
    "accumulating": (accumulating, []),
    "accumulating, overflow in one of three": (accumulating, [1, 8]),
    "zeroing in place": (zeroing_in_place, [1, 2]),
    "several losses": (several_losses, [3]),
    "parts without gradients": (parts_without_gradients, [0, 1, 4]),
    "gradient penalty": (gradient_penalty, [2]),
    "scheduled": (scheduled, [0, 5]),
    "scales by hand": (scales_by_hand, [3]),
    "checkpoints": (checkpoints, [0, 5]),
    "switching": (switching, [0, 3, 4]),
    "disabled": (disabled, []),
}


@every_case
@pytest.mark.parametrize(
    ("flow", "way"),
    [
        (flow, way)
        for flow, (loop, _) in FLOWS.items()
        for way in (WAYS if loop is plain else MOST_DIFFERENT)
    ],
)
def test_flows(case, way, flow, model, batches, backend):
    loop, overflows = FLOWS[flow]
    clip, options = WAYS[way]
    clips = clip or "max_grad_norm" in options
    ours = Run(case.ours, model, clip, **options)
    stock = Run(case.stock, model, nn.utils.clip_grad_norm_ if clips else None)
    for run in (ours, stock):
        loop(run, poisoned(batches, overflows))
    assert_alike(ours, stock)


@every_case
@pytest.mark.parametrize("way", ["amp_fused", "max_grad_norm, amp_fused"])
def test_unscaling_by_any_scale_is_exact(case, way, model, batches, backend):
    """torch unscales by a float32 reciprocal; here the result is that of no scaling at all."""
    _, options = WAYS[way]
    ours, stock = Run(case.ours, model, **options), Run(case.stock, model)
    ours.scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_factor=1.7)
    ours.scaler.set_growth_interval(2)
    plain(ours, batches)
    for batch in batches:
        stock.opt.zero_grad()
        stock.loss(batch).backward()
        if "max_grad_norm" in options:
            nn.utils.clip_grad_norm_(stock.params, LIMIT)
        stock.opt.step()
    assert_trained_alike(ours.opt, ours.params, stock.opt, stock.params)


# Several optimizers ---------------------------------------------------------------------------


def shared_losses(a, b, scaler, batches, spoil):
    """Two losses, of which one reaches both models. Only one optimizer is unscaled by hand."""
    for at, (inputs, targets) in enumerate(batches):
        for run in (a, b):
            run.opt.zero_grad()
        both = 2 * a.model(inputs) + 3 * b.model(inputs)
        scaler.scale((both - targets).square().mean()).backward(retain_graph=True)
        scaler.scale((b.model(inputs) + targets).square().mean()).backward()
        spoil(at)
        scaler.unscale_(a.opt)
        nn.utils.clip_grad_norm_(a.params, LIMIT)
        scaler.step(a.opt)
        scaler.step(b.opt)
        scaler.update()


def adversaries(a, b, scaler, batches, spoil):
    """The second loss goes through the model that has just been updated."""
    for at, (inputs, targets) in enumerate(batches):
        a.opt.zero_grad()
        made = b.model(inputs)
        scaler.scale((a.model(inputs) - made.detach()).square().mean()).backward()
        spoil(at, a)
        scaler.step(a.opt)
        b.opt.zero_grad()
        scaler.scale((made - a.model(inputs) * targets).square().mean()).backward()
        spoil(at, b)
        scaler.step(b.opt)
        scaler.update()


@every_case
@pytest.mark.parametrize("loop", [shared_losses, adversaries])
@pytest.mark.parametrize("fused", [(False, False), (True, False), (True, True)], ids=str)
def test_two_optimizers_with_one_scaler(case, loop, fused, model, batches, backend):
    """A step is skipped for the optimizer whose gradients overflow, and for no other."""
    other, results = new_model(), []
    for build, options in (
        (case.ours, [{"amp_fused": value} for value in fused]),
        (case.stock, [{}, {}]),
    ):
        runs = [Run(build, m, **more) for m, more in zip((model, other), options, strict=True)]
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)

        def spoil(at, run=None, runs=runs):
            for bad in (runs[i] for i in OVERFLOWS.get(at, ())):
                if run in (None, bad):
                    bad.params[0].grad[0, 0] = math.inf

        loop(*runs, scaler, batches, spoil)
        results.append((runs, scaler.state_dict()))
    (ours, scale), (stock, expected) = results
    assert scale == expected
    for run, exact in zip(ours, stock, strict=True):
        assert_trained_alike(run.opt, run.params, exact.opt, exact.params)


# By step, whose gradients overflow.
OVERFLOWS = {0: [1], 2: [0], 3: [0, 1], 6: [1]}


# What the scaler does not allow ---------------------------------------------------------------


def step_twice(run):
    run.scaler.step(run.opt)
    run.scaler.step(run.opt)


def unscale_twice(run):
    run.scaler.unscale_(run.opt)
    run.scaler.unscale_(run.opt)


def unscale_after_step(run):
    run.scaler.step(run.opt)
    run.scaler.unscale_(run.opt)


def step_without_gradients(run):
    run.opt.zero_grad()
    run.scaler.step(run.opt)


def update_without_gradients(run):
    step_without_gradients(run)
    run.scaler.update()


def step_before_scale(run):
    run.scaler = torch.amp.GradScaler("cpu")
    run.scaler.step(run.opt)


MISUSES = {
    "closure": lambda run: run.scaler.step(run.opt, closure=lambda: None),
    "update before step": lambda run: run.scaler.update(),
    "step twice": step_twice,
    "unscale_ twice": unscale_twice,
    "unscale_ after step": unscale_after_step,
    "step without gradients": step_without_gradients,
    "update without gradients": update_without_gradients,
    "step before scale": step_before_scale,
}


@pytest.mark.parametrize(
    ("name", "fused"),
    # torch has no fused RMSprop to compare with.
    [
        (name, fused)
        for name in NAMES
        for fused in (False, True)
        if not fused or name in those_with("fused")
    ],
)
@pytest.mark.parametrize("misuse", MISUSES.values(), ids=list(MISUSES))
def test_misuse(misuse, name, fused, model, batches):
    """The same error as with stock, or none, and training goes on as there."""
    case, runs, raised = Case(name, {"lr": 0.01}), [], []
    for build, options in (
        (case.ours, {"amp_fused": fused}),
        (case.stock, {"foreach": None, "fused": True} if fused else {}),
    ):
        run = Run(build, model, **options)
        plain(run, batches[:2])
        run.opt.zero_grad()
        run.backward(run.loss(batches[2]))
        try:
            misuse(run)
            raised.append(None)
        except (RuntimeError, AssertionError) as error:
            raised.append((type(error), str(error)))
        run.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        plain(run, batches[3:])
        runs.append(run)
    assert raised[0] == raised[1]
    assert_alike(*runs)


# Half precision -------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("way", MOST_DIFFERENT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(case, way, dtype, model, backend):
    """The scale is so large that float16 overflows, until it has fallen, and again once it has
    grown."""
    clip, options = WAYS[way]
    clips = clip or "max_grad_norm" in options
    ours = Run(case.ours, model.float(), clip, **options)
    stock = Run(case.stock, model.float(), nn.utils.clip_grad_norm_ if clips else None)
    scales = []
    for run in (ours, stock):
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=2)
    for _ in range(13):
        batch = [torch.randn(5, 4), 3 + torch.randn(5, 2)]
        for run in (ours, stock):
            run.opt.zero_grad()
            with torch.autocast("cpu", dtype):
                outputs = run.model(batch[0])
            run.backward((outputs - batch[1]).square().mean())
            run.step()
        for p, q in zip(ours.params, stock.params, strict=True):
            assert_near(p, q)
            with torch.no_grad():
                p.copy_(q)  # rounded to another float16, it would give another gradient
        scales.append(ours.scaler.get_scale())
    assert_alike(ours, stock)
    grown = [b > a for a, b in zip(scales, scales[1:], strict=False)]
    assert True in grown and (False in grown or dtype == torch.bfloat16)


@every_case
def test_half_parameters(case, model, backend):
    """torch's error, and nothing has changed; amp_fused trains them as without a scaler."""
    batches = [[torch.randn(5, 4).half(), 3 + torch.randn(5, 2).half()] for _ in range(4)]
    run = Run(case.ours, model.half())
    run.backward(run.loss(batches[0]))
    before = snapshot(run.opt)
    with pytest.raises(ValueError, match="unscale FP16 gradients"):
        run.step()
    assert snapshot(run.opt) == before
    runs = [Run(case.ours, model, amp_fused=True) for _ in range(2)]
    runs[1].scaler = torch.amp.GradScaler("cpu", enabled=False)
    for run in runs:
        plain(run, batches)
    for p, q in zip(runs[0].params, runs[1].params, strict=True):
        assert_near(p, q)
