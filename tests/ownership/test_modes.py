"""Steps inside of torch's modes."""

from __future__ import annotations

import pytest
import torch
from cases import assert_near, leaf, richest_and_stateless, snapshot

from ownership import train

MODES = {
    "inference": lambda step: torch.inference_mode()(step)(),
    "no grad": lambda step: torch.no_grad()(step)(),
    "enabled grad": lambda step: torch.enable_grad()(step)(),
    "grad": lambda step: torch.func.grad(lambda x: (step(), x.sum())[1])(torch.ones(2)),
    "jvp": lambda step: torch.func.jvp(
        lambda x: (step(), x * 2)[1], (torch.ones(2),), (torch.ones(2),)
    ),
    "vmap": lambda step: torch.func.vmap(lambda x: (step(), x * 2)[1])(torch.ones(2)),
    "functionalize": lambda step: torch.func.functionalize(lambda x: (step(), x * 2)[1])(
        torch.ones(2)
    ),
    "saved tensors": lambda step: _with_saved_tensor_hooks(step),
}


def _with_saved_tensor_hooks(step):
    with torch.autograd.graph.save_on_cpu():
        step()


@richest_and_stateless
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
def test_a_step_in_a_mode(case, mode, first, backend):
    """Once, before and after steps without."""
    if first and mode in ("inference", "functionalize"):
        return  # the state that is made there is torch's to refuse later
    params = [leaf(torch.randn(4)), leaf(torch.randn(2, 3))]
    expected = [leaf(p) for p in params]
    opts = [case.ours(params), case.stock(expected)]
    for at in range(4):
        for p, q in zip(params, expected, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        if at != (0 if first else 2):
            opts[0].step()
            opts[1].step()
        elif mode not in ("grad", "jvp"):
            MODES[mode](opts[0].step)
            MODES[mode](opts[1].step)
        else:  # where torch may refuse to write what is from outside
            before = snapshot(opts[0])
            try:
                MODES[mode](opts[0].step)
            except RuntimeError:
                assert snapshot(opts[0]) == before
                opts[0].step()
            opts[1].step()
    for p, q in zip(params, expected, strict=True):
        assert_near(p, q)
        (p * 2).sum().backward()  # autograd goes on
        assert p.grad.shape == p.shape


@richest_and_stateless
def test_training_in_inference_mode_after_steps_without(case, backend):
    """All steps from some point on; what autograd saved before notices them."""
    param = leaf(torch.ones(3))
    opt = case.ours([param])
    train(opt, lambda: param.square().sum())
    loss = param.square().sum()
    param.grad = torch.ones(3)
    with torch.inference_mode():
        for _ in range(3):
            opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
