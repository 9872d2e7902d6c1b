"""What the optimizer on the host computes: the bits of the ordinary one."""

from __future__ import annotations

import random

import pytest
import torch
from cases import each_class_or_backend, every_case

from offloaded import assert_same, batches, both, faulty_links, network, step

# Ways to be offloaded that differ in what runs when. Chunks of 64 bytes hold one parameter.
WAYS = {
    "in the backward": {},
    "small chunks": {"chunk": 200},
    "one by one": {"chunk": 1},
    "across the forward": {"overlap": "forward", "chunk": 300},
    "in step()": {"overlap": None, "chunk": 1},
    "from the device": {"gradients": "device", "chunk": 200},
    "from the device, across the forward": {"gradients": "device", "overlap": "forward"},
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def train(here, there, inputs):
    for each in inputs:
        # Both draw the same seeds for random rounding.
        seed = random.randrange(2**31)
        for model, opt in (here, there):
            torch.manual_seed(seed)
            step(model, opt, each)


@every_case
def test_the_bits_of_the_ordinary_optimizer(case, backend, monkeypatch):
    links = faulty_links(monkeypatch)
    here, there = both(case, network(), **random.choice([*WAYS.values()]))
    train(here, there, batches())
    assert_same(*here, *there)
    assert repr(here[1]) == repr(there[1]) and type(here[1]) is type(there[1])
    assert links[0].copies > 0


@every_way
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 0.01},
        {"master_weights": "split", "state_dtype": torch.bfloat16},
        {"rounding": "stochastic", "ema": 0.9},
    ],
    ids=str,
)
@each_class_or_backend
def test_ways_and_options(way, options, case, backend, monkeypatch):
    faulty_links(monkeypatch)
    here, there = both(case, network(torch.bfloat16), **way, **options)
    train(here, there, batches(dtype=torch.bfloat16))
    assert_same(*here, *there)
