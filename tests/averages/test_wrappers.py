"""Copies and wrappers of an optimizer whose parameters hold averages."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import bits, richest
from torch import nn

import fusedopt
from averages import draw_grads, make_model, train, weights


class Wrapper:
    """A trainer's wrapper: its class is made to inherit from the optimizer's."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (self.__class__, type(optimizer)), {})

    def step(self, closure=None):
        return self._optimizer.step(closure)


class Delegating(Wrapper):
    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class CopyOfDict(Wrapper):
    def __init__(self, optimizer):
        self.__dict__ = {
            k: v for k, v in vars(optimizer).items() if k not in ("state_dict", "step")
        }
        super().__init__(optimizer)


WRAPPERS = {"delegating": Delegating, "copy of __dict__": CopyOfDict, "copy.copy": copy.copy}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@richest
@every_wrapper
def test_swaps_through_a_wrapper(case, wrap, backend):
    model = make_model()
    opt = train(case, model)
    wrapper, before = wrap(opt), weights(model)
    for one, other in ((wrapper, opt), (opt, wrapper)):
        with one.swap_ema():
            within = weights(model)
            for optimizer in (one, other):
                with pytest.raises(RuntimeError, match="swap_ema"):
                    optimizer.step()
            with other.swap_ema():
                pass
            assert weights(model) == within != before
        assert weights(model) == before
    wrapper.step()
    assert weights(model) != before


@richest
@every_wrapper
def test_options_through_a_wrapper(case, wrap, backend):
    p = nn.Parameter(torch.randn(3))
    opt = case.ours([p])
    wrapper = wrap(opt)
    for one, other in ((wrapper, opt), (opt, wrapper)):
        for limit in (1.5, None, 1.0):
            one.max_grad_norm = limit
            assert other.max_grad_norm == limit
            p.grad = torch.full((3,), 2.0)
            other.step()
            for optimizer in (one, other):
                if limit is None:
                    assert optimizer.grad_norm is None
                else:
                    torch.testing.assert_close(
                        optimizer.grad_norm, torch.tensor(12.0).double() ** 0.5
                    )
        one.max_grad_norm = -1.0
        with pytest.raises(ValueError, match="max_grad_norm"):
            other.step()
        one.max_grad_norm = None
        one.amp_fused = True
        assert other.amp_fused and other._step_supports_amp_scaling
        one.amp_fused = False
        assert not other.amp_fused and not hasattr(other, "_step_supports_amp_scaling")


@richest
@every_wrapper
def test_a_scaler_through_a_wrapper(case, wrap, backend):
    """It leaves the scale on what it is given; the step must find it."""
    start, grads = torch.randn(5), [torch.randn(5) for _ in range(4)]
    grads[1][2] = torch.inf
    outcomes = []
    for through in (lambda opt: opt, wrap):
        p = nn.Parameter(start.clone())
        opt = case.ours([p])
        wrapper = through(opt)
        wrapper.amp_fused = True
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for grad in grads:
            p.grad = grad * scaler.scale(torch.ones(()))
            scaler.step(wrapper)
            scaler.update()
        outcomes.append((bits(p), scaler.get_scale()))
        assert not hasattr(opt, "grad_scale") and not hasattr(opt, "found_inf")
    assert outcomes[0] == outcomes[1]


@every_wrapper
def test_detaching_through_a_wrapper(wrap, backend):
    model = make_model()
    opt = fusedopt.attach(model, fusedopt.SGD, lr=0.1)
    wrapper = wrap(opt)
    wrapper.add_param_group({"params": [late := nn.Parameter(torch.ones(2))]})
    late.sum().backward()
    assert late.grad is None and (late < 1).all()
    fusedopt.detach(wrapper)
    late.sum().backward()
    assert late.grad is not None
    with pytest.raises(ValueError, match="not attached"):
        fusedopt.detach(opt)


def via_pickle(opt):
    return pickle.loads(pickle.dumps(opt))


@richest
@pytest.mark.parametrize("duplicate", [copy.deepcopy, via_pickle])
def test_copies_made_within_a_swap(case, duplicate, backend):
    """They are optimizers of the averages, and their own; of the original nothing changes."""
    model = make_model()
    opt = train(case, model, max_grad_norm=1e9)
    before = weights(model)
    with opt.swap_ema():
        within = weights(model)
        twin = duplicate(opt)
    params = [p for group in twin.param_groups for p in group["params"]]
    assert weights(model) == before
    assert [*map(bits, params)] == within
    twin.max_grad_norm = 0.0
    assert opt.max_grad_norm == 1e9
    draw_grads(params)
    twin.step()
    with twin.swap_ema():
        opt.step()


@richest
def test_shallow_copies_step_the_same_parameters(case, backend):
    model = make_model()
    opt = train(case, model)
    twin = copy.copy(opt)
    assert type(twin) is type(opt) and twin.state is opt.state
    assert twin.param_groups is opt.param_groups
    before = weights(model)
    draw_grads(model.parameters())
    twin.step()
    assert weights(model) != before
    opt.step()


def test_no_conversion_within_a_swap(backend):
    model = make_model()
    opt = fusedopt.Adam(model.parameters())
    opt.param_groups[0]["ema"] = 0.5
    draw_grads(model.parameters())
    opt.step()
    before = weights(model)
    with opt.swap_ema(), pytest.raises(RuntimeError, match="swap_ema.*to_torch"):
        fusedopt.to_torch(opt)
    assert weights(model) == before and type(opt) is fusedopt.Adam
