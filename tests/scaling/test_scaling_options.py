"""Where ``max_grad_norm``, ``amp_fused`` and ``capturable`` live: copies and checkpoints."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import (
    NAMES,
    TABLES,
    Amp,
    Case,
    assert_trained_alike,
    draw,
    every_name,
    every_sparse,
    leaf,
    richest,
    snapshot,
    those_with,
    train,
)

import fusedopt
from scaling import INF

# Where the options live -----------------------------------------------------------------------


def via_torch_save(opt):
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt)),
    "torch.save": via_torch_save,
}


@every_name
@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("max_norm", [None, 0.0, 2.5, INF], ids=str)
@pytest.mark.parametrize("amp", [False, True])
def test_copies_keep_the_options(name, duplicate, max_norm, amp, backend):
    _, opt = train(getattr(fusedopt, name), *draw([(5,)], 2), max_grad_norm=max_norm, amp_fused=amp)
    twin = COPIES[duplicate](opt)
    assert (twin.max_grad_norm, twin.amp_fused) == (max_norm, amp)
    assert bool(getattr(twin, "_step_supports_amp_scaling", False)) == amp
    assert snapshot(twin) == snapshot(opt)


@every_name
def test_the_options_are_not_in_checkpoints(name, backend):
    cls, stock_cls = getattr(fusedopt, name), TABLES[name].stock
    values, grads = draw([(5,)], 2)
    (p,), opt = train(cls, values, grads, max_grad_norm=2.0, amp_fused=True)
    _, stock = train(stock_cls, values, grads)
    assert [list(g) for g in opt.param_groups] == [list(g) for g in stock.param_groups]
    assert opt.defaults.keys() == stock.defaults.keys()
    assert repr(opt) == repr(cls([leaf(values[0])]))
    for source in (stock, train(cls, values, grads)[1]):
        opt.load_state_dict(source.state_dict())
        assert (opt.max_grad_norm, opt.amp_fused) == (2.0, True)
        assert opt._step_supports_amp_scaling
    _, plain = train(cls, values, grads)
    plain.load_state_dict(opt.state_dict())
    assert plain.max_grad_norm is None and not plain.amp_fused
    assert not hasattr(plain, "_step_supports_amp_scaling")


@pytest.mark.parametrize(
    ("name", "more"),
    [
        (name, more)
        for name in NAMES
        for more in ({}, {"fused": True})
        if not more or name in those_with("fused")
    ],
    ids=str,
)
def test_the_scaler_unscales_by_default(name, more):
    cls = getattr(fusedopt, name)
    _, opt = train(cls, *draw([(5,)], 1), **more)
    _, unfused = train(cls, *draw([(5,)], 1))
    for twin in (opt, *(duplicate(opt) for duplicate in COPIES.values())):
        assert not hasattr(twin, "_step_supports_amp_scaling")
        twin.load_state_dict(unfused.state_dict())
        assert not hasattr(twin, "_step_supports_amp_scaling")
    assert not hasattr(cls, "_step_supports_amp_scaling")


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", those_with("fused"))
def test_an_unfused_checkpoint_in_a_fused_optimizer(name, amp, backend):
    """Where torch turns fusing off, but goes on telling the scaler that it is on."""
    case = Case(name, {"lr": 0.01})
    past = Amp(case.stock).run(". .")
    ours = Amp(case.ours, fused=True, amp_fused=amp)
    stock = Amp(case.stock)
    for run in (ours, stock):
        run.opt.load_state_dict(copy.deepcopy(past.opt.state_dict()))
        run.run(". o .")
    assert ours.log == stock.log
    assert_trained_alike(ours.opt, ours.params, stock.opt, stock.params)


# capturable -----------------------------------------------------------------------------------


@richest
def test_capturable_on_the_cpu(case, backend):
    """An error of the step, as with stock, and nothing has changed."""
    if backend == "kernels":
        pytest.skip("its memory is that of a GPU")
    values, grads = draw([(5,), (2, 3)], 3)
    params = [leaf(v) for v in values]
    opt = case.ours(params, capturable=True)
    for now in grads[:2]:
        for group in opt.param_groups:
            group["capturable"] = True
        for p, g in zip(params, now, strict=True):
            p.grad = g.clone()
        before = snapshot(opt)
        with pytest.raises(RuntimeError, match="capturable=True"):
            opt.step()
        assert snapshot(opt) == before
        for group in opt.param_groups:
            group["capturable"] = False
        opt.step()
    exact, stock = train(case.stock, values, grads[:2])
    assert_trained_alike(opt, params, stock, exact)


@every_sparse
def test_capturable_is_in_no_group_unless_on(name, backend):
    """torch has no such option; one that is on travels through its checkpoints."""
    cls, stock_cls = getattr(fusedopt, name), TABLES[name].stock
    values, grads = draw([(5,)], 2)
    (_,), off = train(cls, values, grads)
    (_,), stock = train(stock_cls, values, grads)
    on = cls([leaf(values[0])], capturable=True)
    assert all("capturable" not in g for g in (*off.param_groups, off.defaults))
    assert on.param_groups[0]["capturable"] is True and on.defaults["capturable"] is True
    on.add_param_group({"params": [leaf(values[0])]})
    assert on.param_groups[1]["capturable"] is True
    on = cls([leaf(values[0])], capturable=True)
    on.load_state_dict(stock.state_dict())
    assert on.param_groups[0]["capturable"] is True
    assert "capturable" not in stock.state_dict()["param_groups"][0]
    (q,), there = train(stock_cls, values, grads)
    there.load_state_dict(on.state_dict())
    q.grad = torch.ones(5)
    there.step()  # torch ignores what it does not know
    off.load_state_dict(on.state_dict())
    assert off.param_groups[0]["capturable"] is True


@pytest.mark.parametrize("name", those_with("capturable"))
def test_a_capturable_checkpoint_of_stock(name, backend):
    case = Case(name, {"lr": 0.1})
    values, grads = draw([(5,)], 3)
    (q,), stock = train(case.stock, values, grads[:2])
    stock.param_groups[0]["capturable"] = True
    (p,), opt = train(case.ours, values, grads[:2])
    opt.load_state_dict(stock.state_dict())
    assert opt.param_groups[0]["capturable"] is True
    if case.table.counts_steps:
        assert opt.state[p]["step"].dtype == torch.float32 and opt.state[p]["step"].item() == 2
    back = case.stock([leaf(values[0])])
    back.load_state_dict(opt.state_dict())
    assert back.param_groups[0]["capturable"] is True
