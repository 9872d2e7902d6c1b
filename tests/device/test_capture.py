"""Steps that are captured into a CUDA graph: the stand-in's keeps what is launched, and launches it
again."""

from __future__ import annotations

import contextlib
import copy
import ctypes

import pytest
import torch

import fusedopt
from device.conftest import HOOK

TABLE_BYTES = 32764 // 16 * 16  # of what a launch is called with


class Graph:
    """What is launched meanwhile is kept instead."""

    def __init__(self, kernels):
        self.launches = []
        self._run = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
            kernels.RUN_ON_HOST
        )
        self._hook = HOOK(lambda name, table, *_: self._keep(name, table))

    def _keep(self, name, table):
        self.launches.append((name, ctypes.string_at(table, TABLE_BYTES)))
        return 1

    @contextlib.contextmanager
    def capture(self, driver, kernels):
        driver.run_with(ctypes.cast(self._hook, ctypes.c_void_p).value)
        driver.set(capturing=1)
        yield
        driver.set(capturing=0)
        driver.run_with(kernels.RUN_ON_HOST)

    def replay(self):
        for name, table in self.launches:
            # Aligned, as the table is.
            assert self._run(name, ctypes.create_string_buffer(table, TABLE_BYTES))


CASES = {
    "SGD": (fusedopt.SGD, {}),
    "momentum": (fusedopt.SGD, {"momentum": 0.9, "dampening": 0.3}),
    "nesterov, clipped": (fusedopt.SGD, {"momentum": 0.9, "nesterov": True, "max_grad_norm": 2.0}),
    "Lion": (fusedopt.Lion, {}),
}


@pytest.mark.parametrize("lr_on_device", [False, True], ids=["", "lr on the device"])
@pytest.mark.parametrize("case", CASES)
def test_what_counts_no_steps_needs_no_capturable(case, lr_on_device, driver, kernels):
    """Replays give the bits of eager steps, with a rate of now if it is on the device, and an eager
    step goes on from there."""
    cls, options = CASES[case]
    start = [torch.randn(n) for n in (5, 33_000, 0)]
    grads = [[torch.randn_like(p) for p in start] for _ in range(6)]
    rates = [0.1, 0.1, 0.3, 0.02, 0.1, 0.2] if lr_on_device else [0.1] * 6
    runs = []
    for captures in (False, True):
        params = [p.clone().requires_grad_() for p in start]
        lr = torch.tensor(rates[0]) if lr_on_device else rates[0]
        opt, graph = cls(params, lr=lr, **options), Graph(kernels)
        for p, g in zip(params, grads[0], strict=True):
            p.grad = g.clone()
        opt.step()
        if captures:
            before = copy.deepcopy(params)
            with graph.capture(driver, kernels):
                opt.step()
            assert all(map(torch.equal, params, before)) and graph.launches
        for at in range(1, 6):
            if lr_on_device:
                lr.fill_(rates[at])
            for p, g in zip(params, grads[at], strict=True):
                p.grad.copy_(g)
            graph.replay() if captures and at < 5 else opt.step()
        runs.append([*params, *(t for p in params for t in opt.state.get(p, {}).values())])
    assert all(map(torch.equal, *runs))


def test_what_counts_steps_needs_it(driver):
    for name in ("Adam", "Adagrad", "RMSprop"):
        p = torch.randn(5).requires_grad_()
        p.grad = torch.randn(5)
        opt = getattr(fusedopt, name)([p], lr=0.1)
        opt.step()
        driver.set(capturing=1)
        with pytest.raises(RuntimeError, match=f"{name}: step.. is being captured .* capturable="):
            opt.step()
        driver.set(capturing=0)


def test_with_the_operators_of_torch(monkeypatch):
    monkeypatch.setattr(fusedopt.backend, "native", None)
    for name in ("SGD", "Lion", "Adam"):
        p = torch.randn(5).requires_grad_()
        p.grad = torch.randn(5)
        opt = getattr(fusedopt, name)([p], lr=0.1)
        opt.step()
        with monkeypatch.context() as now:
            now.setattr(fusedopt.backend, "is_capturing", lambda: True)
            if name == "Adam":
                with pytest.raises(RuntimeError, match="Adam: step.. is being captured"):
                    opt.step()
            else:
                opt.step()
