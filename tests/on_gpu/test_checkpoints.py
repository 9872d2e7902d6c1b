"""Checkpoints between devices, and with the modes of stock."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from cases import TABLES, Case, draw, leaf, richest, those_with

import fusedopt
from on_gpu import (
    DEVICE,
    HOST,
    assert_all_near,
    assert_same_bits,
    plain,
    put,
    set_grads,
    step_through,
    train_on,
)


def moved(checkpoint, device):
    """As torch.save and torch.load have it."""
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, map_location=str(device))


@richest
@pytest.mark.parametrize("there", [HOST, DEVICE], ids=["to CPU", "to GPU"])
@pytest.mark.parametrize("mapped", [False, True], ids=["", "map_location"])
def test_checkpoints_between_devices(case, there, mapped):
    here = DEVICE if there is HOST else HOST
    values, grads = draw([(100,), (33,), (16_390,)], 4)
    past, saved = train_on(here, case.ours, values, grads[:2])
    params = [leaf(put(p, there)) for p in past]
    opt = case.ours(params)
    opt.load_state_dict(moved(saved.state_dict(), there if mapped else here))
    for now in grads[2:]:
        set_grads(params, now)
        opt.step()
    others, other = train_on(HOST, case.ours, values, grads)
    if mapped and there is DEVICE:  # the step counts too, so coefficients are computed there
        assert_all_near(params, others)
    else:
        assert_same_bits(opt, params, other, others)


MODES = [
    *((name, "capturable") for name in those_with("capturable")),
    *((name, "fused") for name in ("Adam", "AdamW", "SGD")),
]


@pytest.mark.parametrize(("name", "mode"), MODES)
@pytest.mark.parametrize("amp", [False, True], ids=["", "amp_fused"])
def test_checkpoints_of_stock_modes(name, mode, amp):
    """Both ways, with the step count on the device."""
    case = Case(name, {"lr": 0.1, **({"momentum": 0.9} if name == "SGD" else {})})
    values, grads = draw([(100,), (33,), (2049,)], 6)
    stock_cls = TABLES[name].stock
    params, checkpoint = [leaf(put(v)) for v in values], None
    for at, build in enumerate((stock_cls, getattr(fusedopt, name), stock_cls)):
        more = {"amp_fused": amp} if at == 1 else {}
        opt = build(params, **case.options, **{mode: True}, **more)
        if at:
            opt.load_state_dict(moved(checkpoint, DEVICE))
            assert opt.param_groups[0][mode] is True
        step_through(opt, params, grads[2 * at : 2 * at + 2])
        for p in params:
            if "step" in opt.state[p]:
                assert opt.state[p]["step"].device.type == DEVICE
                assert opt.state[p]["step"].item() == 2 * at + 2
        checkpoint = copy.deepcopy(opt.state_dict())
    exact, _ = train_on(DEVICE, case.exact, values, grads, torch.float64)
    assert_all_near(params, exact)


@plain
def test_a_checkpoint_of_amp_fused_in_stock(case):
    """The step counts on the device, though no group says so."""
    values, grads = draw([(100,), (33,)], 4)
    params, opt = train_on(DEVICE, case.ours, values, grads[:2], amp_fused=True)
    stock = case.stock(params)
    stock.load_state_dict(copy.deepcopy(opt.state_dict()))
    step_through(stock, params, grads[2:3])
    opt = case.ours(params)
    opt.load_state_dict(copy.deepcopy(stock.state_dict()))
    step_through(opt, params, grads[3:])
    exact, _ = train_on(DEVICE, case.exact, values, grads, torch.float64)
    assert_all_near(params, exact)
