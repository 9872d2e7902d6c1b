"""Random programs: what a loop does between steps, in any order, while copies are made in any
order. Hypothesis chooses both."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import RICHEST, bits, states
from conftest import SEED
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn

from offloaded import both, faulty_links


class Fate:
    """What hypothesis draws, as the link asks for it. Other threads draw from what it drew before,
    for it knows nothing of them."""

    def __init__(self, numbers):
        self.numbers, self.at = numbers, 0

    def random(self):
        self.at += 1
        return self.numbers[self.at % len(self.numbers)]

    def choice(self, some):
        return some[int(self.random() * len(some)) % len(some)]


class Branches(nn.Module):
    """Of which a batch reaches some. Two layers have one weight, and one has a bias that stays on
    the device."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 4)
        self.branches = nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 3), nn.Linear(4, 5)])
        self.branches[2].weight = self.branches[0].weight

    def forward(self, inputs, chosen):
        x = self.trunk(inputs).tanh()
        return sum(self.branches[i](x).square().mean() for i in chosen)


SETTINGS = st.fixed_dictionaries(
    {
        "gradients": st.sampled_from(["host", "device"]),
        "overlap": st.sampled_from(["backward", "forward", None]),
        "chunk": st.sampled_from([1, 100, 200, 10**6]),
        "keep_below": st.sampled_from([0, 5, 10**6]),
        "max_grad_norm": st.sampled_from([None, 0.05]),
    }
)
OPTIONS = st.sampled_from(
    [{}, {"ema": 0.5}, {"master_weights": "split"}, {"state_dtype": torch.bfloat16}]
)
CHOSEN = st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), CHOSEN),
        st.tuples(st.just("accumulate"), CHOSEN, CHOSEN),
        st.tuples(st.just("no backward"), st.integers(0, 3)),
        st.tuples(st.just("lr"), st.floats(0.01, 0.2)),
        st.tuples(st.just("write"), st.integers(0, 5)),
        st.tuples(st.just("new memory"), st.integers(0, 5)),
        st.tuples(st.just("freeze"), st.integers(0, 5)),
        st.tuples(st.just("reload")),
        st.tuples(st.just("load old")),
        st.tuples(st.just("average")),
        st.tuples(st.just("evaluate"), CHOSEN),
        st.tuples(st.just("forget")),
    ),
    min_size=2,
    max_size=8,
)


class Loop:
    def __init__(self, model, opt):
        self.model, self.opt = model, opt
        self.saved = None
        self.seen = []
        self.params = [*model.parameters()]

    def do(self, action, inputs):
        name, *arguments = action
        getattr(self, name.replace(" ", "_"))(inputs, *arguments)

    def step(self, inputs, chosen):
        self.opt.zero_grad()
        self.model(inputs, chosen).backward()
        self.opt.step()

    def accumulate(self, inputs, first, second):
        self.opt.zero_grad()
        with self.opt.accumulating():
            self.model(inputs, first).backward()
        self.model(inputs + 1, second).backward()
        self.opt.step()

    def no_backward(self, inputs, which):
        self.opt.zero_grad()
        self.params[which].grad = torch.ones_like(self.params[which])
        self.opt.step()

    def lr(self, _, value):
        for group in self.opt.param_groups:
            group["lr"] = value

    def write(self, _, which):
        self.opt.synchronize()
        with torch.no_grad():
            self.params[which % len(self.params)].mul_(0.5)

    def new_memory(self, _, which):
        self.opt.synchronize()
        param = self.params[which % len(self.params)]
        param.data = param.data.clone()

    def freeze(self, _, which):
        param = self.params[which % len(self.params)]
        if param is not self.params[0]:
            param.requires_grad_(not param.requires_grad)

    def reload(self, _):
        if self.saved is None:
            self.saved = copy.deepcopy(self.opt.state_dict())
        self.opt.load_state_dict(copy.deepcopy(self.opt.state_dict()))

    def load_old(self, _):
        if self.saved is not None:
            self.opt.load_state_dict(copy.deepcopy(self.saved))

    def average(self, inputs):
        if self.opt.param_groups[0].get("ema") is not None:
            with self.opt.swap_ema(), torch.no_grad():
                self.seen.append(bits(self.model(inputs, [0, 1])))

    def evaluate(self, inputs, chosen):
        with torch.no_grad():
            self.seen.append(bits(self.model(inputs, chosen)))
        self.seen.append([*map(bits, self.model.state_dict().values())])

    def forget(self, inputs):
        """A backward that is not wanted, where it does not step."""
        if self.waits:
            self.opt.zero_grad()
            self.model(inputs, [0]).backward()
            self.opt.zero_grad()


@pytest.mark.parametrize("case", RICHEST, ids=lambda case: case.name)
def test_the_bits_of_the_ordinary_optimizer(case, backend):
    @seed(SEED)
    @settings(
        max_examples=12,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.explicit],
        suppress_health_check=[*HealthCheck],
    )
    @given(
        way=SETTINGS,
        options=OPTIONS,
        actions=ACTIONS,
        order=st.randoms(use_true_random=False),
        fate=st.lists(st.floats(0, 0.999), min_size=1, max_size=50),
        inputs=st.integers(0, 2**31),
    )
    def run(way, options, actions, order, fate, inputs):
        with pytest.MonkeyPatch.context() as patch:
            faulty_links(patch, Fate(fate))
            torch.manual_seed(inputs)
            model = Branches().to(torch.bfloat16)

            def groups(model):
                params = [*model.parameters()]
                if way["overlap"] == "forward":  # which takes the module
                    return params
                order.seed(inputs)
                order.shuffle(params)
                return [{"params": params[:2], "lr": 0.03}, {"params": params[2:]}]

            loops = [Loop(*each) for each in both(case, model, groups=groups, **way, **options)]
            waits = way["gradients"] == "device" or way["max_grad_norm"] or way["overlap"] is None
            for action in actions:
                batch = torch.randn(3, 4).to(torch.bfloat16)
                for loop in loops:
                    loop.waits = waits
                    loop.do(action, batch)
            here, there = loops
            assert here.seen == there.seen
            here.opt.synchronize()
            assert [*map(bits, here.params)] == [*map(bits, there.params)]
            for ours, theirs in zip(
                states(here.opt, here.params), states(there.opt, there.params), strict=True
            ):
                assert {k: bits(v) for k, v in ours.items()} == {
                    k: bits(v) for k, v in theirs.items()
                }

    run()
