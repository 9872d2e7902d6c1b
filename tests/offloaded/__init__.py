"""The optimizer on the host: the bits of the ordinary one, whatever the copies do meanwhile."""

from __future__ import annotations

import copy
import gc
import random
import threading
import time

import seam
import torch
from cases import Case, bits, same_bits, states
from torch import nn

import fusedopt

ADAMW = Case("AdamW", {"lr": 0.1})


class Copy:
    def __init__(self, sources, targets, after, is_upload):
        self.sources, self.targets = sources, targets
        self.after = [*filter(None, after)]
        self.is_upload = is_upload
        self.read = None  # what the device has read of the host, which does not know that yet


class FaultyLink(seam.Link):
    """Copies when it likes to, in any order, at the latest when somebody waits. What is not there
    yet, and what nobody may read any more, is full of NaN."""

    def __init__(self, device, fate):
        super().__init__(device)
        self.fate = fate
        self.pending = []
        self.lock = threading.RLock()  # the worker and the hooks use it
        self.copies = 0
        self.joined = []  # uploads

    def memory(self, size):
        return poisoned(super().memory(size))

    def released(self, memory):
        poisoned(memory)

    def download(self, source, target, after):
        return self._later(Copy([source], [target], after, is_upload=False))

    def upload(self, sources, targets, after):
        return self._later(Copy(sources, targets, after, is_upload=True))

    def wait(self, event):
        """The host knows that it is done."""
        with self.lock:
            self._copy(event)
            self._check_joined()
            self.joined = [other for other in self.joined if other is not event]

    def is_done(self, event):
        with self.lock:
            return not any(event is other for other in (*self.pending, *self.joined))

    def join(self, event):
        """The device knows, not the host: it may not reuse the source of an upload, nor find the
        target of a download."""
        with self.lock:
            if event.is_upload:
                self._copy(event)
                if event.read is None:
                    event.read = [source.clone() for source in event.sources]
                    self.joined.append(event)
            elif self._is_pending(event):
                for other in event.after:
                    self.join(other)
                event.sources = [source.clone() for source in event.sources]

    def _later(self, event):
        with self.lock:
            self._check_joined()
            # What comes after them for the device finds that it has read their sources.
            self.joined = [other for other in self.joined if other not in event.after]
            for target in event.targets:
                poisoned(target)
            self.pending.append(event)
            while self.pending and self.fate.random() < 0.4:
                self._copy(self.fate.choice(self.pending))
        return event

    def _check_joined(self):
        for event in self.joined:
            for source, read in zip(event.sources, event.read, strict=True):
                assert same_bits(source, read), "the host wrote what the device had yet to read"

    def _is_pending(self, event):
        return any(event is other for other in self.pending)

    def _copy(self, event):
        if not self._is_pending(event):
            return
        for other in event.after:
            self._copy(other)
        for source, target in zip(event.sources, event.targets, strict=True):
            target.copy_(source)
        self.pending = [other for other in self.pending if other is not event]
        self.copies += len(event.sources)


def poisoned(tensor):
    """Every byte is 255: NaN in every dtype of floating point numbers."""
    tensor.untyped_storage()  # it has memory
    flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    flat.view(torch.uint8).fill_(255)
    return tensor


def faulty_links(monkeypatch, fate=random):
    """The links of optimizers that are offloaded from now on."""
    links = []

    def make(device):
        links.append(FaultyLink(device, fate))
        return links[-1]

    seam.make_links(monkeypatch, make)
    return links


def offload(case, params, *, keep_below=6, **more):
    """As ``case.ours``, on the host. ``keep_below``: some parameters of :func:`network` stay."""
    options = {**copy.deepcopy(case.options), **more}
    cls = getattr(fusedopt, case.name)
    return fusedopt.offload(params, cls, device="cpu", keep_below=keep_below, **options)


def network(dtype=torch.float64):
    return nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)
    ).to(dtype)


def batches(count=4, dtype=torch.float64):
    return [torch.randn(6, 4, dtype=dtype) for _ in range(count)]


def loss(model, inputs):
    return model(inputs).square().mean()


def collected(is_gone):
    """Whether it goes with the garbage. A worker holds the optimizer until its step is done."""
    until = time.monotonic() + 20
    while not is_gone() and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    return is_gone()


def step(model, opt, inputs):
    """One round of a loop that does not know where the optimizer is."""
    opt.zero_grad()
    loss(model, inputs).backward()
    opt.step()


def assert_same(model, opt, other_model, other):
    """Parameters, buffers, state and groups, bit for bit."""
    opt.synchronize()
    there = other_model.state_dict()
    assert all(same_bits(value, there[name]) for name, value in model.state_dict().items())
    assert opt.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    ours, theirs = (states(o, [*m.parameters()]) for o, m in ((opt, model), (other, other_model)))
    assert [{k: bits(v) for k, v in s.items()} for s in ours] == [
        {k: bits(v) for k, v in s.items()} for s in theirs
    ]


def both(case, model, *, groups=lambda model: model.parameters(), **settings):
    """(model, optimizer), offloaded and ordinary, from the same weights."""
    twin = copy.deepcopy(model)
    names = ("gradients", "overlap", "chunk", "keep_below", "num_threads")
    options = {name: value for name, value in settings.items() if name not in names}
    is_module = settings.get("overlap") == "forward"
    here = offload(case, model if is_module else groups(model), **settings)
    return (model, here), (twin, case.ours(groups(twin), **copy.deepcopy(options)))
