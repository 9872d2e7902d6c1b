"""State that goes to the host and comes back."""

from __future__ import annotations

import copy
import pickle

import pytest
import seam
import torch
from cases import richest, snapshot

import fusedopt
from offloaded import ADAMW, assert_same, batches, faulty_links, network, step


@pytest.fixture
def links(monkeypatch):
    """The part of a copy that it takes is small."""
    seam.copy_at_most(monkeypatch, 700)
    return faulty_links(monkeypatch)


@richest
@pytest.mark.parametrize(
    "options", [{}, {"ema": 0.9, "master_weights": "split", "state_dtype": "8bit"}], ids=str
)
def test_training_goes_on(case, options, backend, links):
    model = network(torch.bfloat16)
    twin = copy.deepcopy(model)
    opt, other = (case.ours(m.parameters(), **options) for m in (model, twin))
    for inputs in batches(5, torch.bfloat16):
        step(twin, other, inputs)
        fusedopt.load_state(opt)
        fusedopt.load_state(opt)
        step(model, opt, inputs)
        tensors = [v for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        before, addresses = snapshot(opt), [t.data_ptr() for t in tensors]
        fusedopt.offload_state(opt, device="cpu")
        fusedopt.offload_state(opt, device="cpu")
        again = [v for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        assert all(a is b for a, b in zip(tensors, again, strict=True))
        assert not {t.data_ptr() for t in again if t.numel()} & {*addresses}
        assert snapshot(opt) == before
    assert links
    fusedopt.load_state(opt)
    assert_same(model, opt, twin, other)


def test_nothing_else_can_be_done_meanwhile(backend, links):
    model = network()
    opt = ADAMW.ours(model.parameters())
    step(model, opt, *batches(1))
    saved, before = copy.deepcopy(opt.state_dict()), snapshot(opt)
    fusedopt.offload_state(opt, device="cpu")
    calls = {
        r"step\(\)": opt.step,
        r"load_state_dict\(\)": lambda: opt.load_state_dict(saved),
        "it is copied": lambda: pickle.dumps(opt),
    }
    for what, call in calls.items():
        with pytest.raises(RuntimeError, match=rf"in the memory of the host.*{what}"):
            call()
    assert snapshot(opt) == before
    fusedopt.load_state(opt)
    opt.load_state_dict(saved)
    assert snapshot(opt) == before


def test_what_others_do_to_the_state_meanwhile_counts(backend, links):
    model = network()
    opt = ADAMW.ours(model.parameters())
    step(model, opt, *batches(1))
    fusedopt.offload_state(opt, device="cpu")
    entries = [*opt.state.values()]
    entries[0]["exp_avg"].fill_(3)
    entries[1]["exp_avg"].data = torch.full_like(entries[1]["exp_avg"], 4)
    fusedopt.load_state(opt)
    assert entries[0]["exp_avg"].eq(3).all() and entries[1]["exp_avg"].eq(4).all()


def test_memory_that_is_not_there(backend, monkeypatch):
    model = network()
    opt = ADAMW.ours(model.parameters())
    step(model, opt, *batches(1))
    before = snapshot(opt)

    def fail(self, size):
        raise RuntimeError(f"no {size} bytes")

    monkeypatch.setattr(seam.Link, "memory", fail)
    with pytest.raises(RuntimeError, match="no .* bytes"):
        fusedopt.offload_state(opt, device="cpu")
    assert snapshot(opt) == before
    step(model, opt, *batches(1))


def test_of_others_it_is_an_error():
    opt = torch.optim.SGD(network().parameters())
    for function in (fusedopt.offload_state, fusedopt.load_state):
        with pytest.raises(TypeError, match=f"{function.__name__} takes .* got a SGD"):
            function(opt)
