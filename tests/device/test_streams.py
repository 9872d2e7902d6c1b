"""Memory that kernels count in is not given to others while a stream may still use it."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import seam
import torch

import fusedopt
from device import adam


class OnGpu:
    """What is asked of a tensor there."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self):
        self.recorded = []

    def record_stream(self, stream):
        self.recorded.append(stream.cuda_stream)


@pytest.fixture
def stream(monkeypatch):
    """The current one."""
    current = SimpleNamespace(cuda_stream=1)
    raw = "_cuda_getCurrentRawStream"
    monkeypatch.setattr(torch._C, raw, lambda index: current.cuda_stream, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    return current


def test_each_change_of_the_stream_is_recorded(stream):
    """Once: a step on the stream of the one before asks nothing of the allocator."""
    tensor, streams = OnGpu(), {}
    for stream.cuda_stream in (1, 1, 2, 2, 1):
        fusedopt.backend.use_on_stream(tensor, streams)
    assert tensor.recorded == [1, 2, 1]


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["", "clipped"])
def test_before_each_launch(options, driver, kernels):
    """Counts and norm are said to be in use on the stream before the kernels are given to it."""
    opt = adam(**options)
    opt.step()
    begin = kernels.num_launches()
    with mock.patch.object(fusedopt.backend, "use_on_stream") as used:
        launches = []
        used.side_effect = lambda tensor, _: launches.append(kernels.num_launches() - begin)
        opt.step()
    (tickets,) = seam.tickets(opt)
    tensors = [call.args[0] for call in used.call_args_list]
    assert tensors[-1] is tickets and launches == [*range(1 + len(options))]
    assert len(tensors) == 1 + len(options) and kernels.num_launches() - begin == len(tensors)
