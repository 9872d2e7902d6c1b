"""What the random damage has found."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import RICHEST_OF, counting, leaf, richest
from conftest import SEED
from torch import Tensor

from hostile import agree, refused, trained


@pytest.mark.parametrize("count", [math.inf, 2.0**53, 1e308])
@counting
def test_a_step_that_cannot_be_counted_on(case, count, backend):
    params, opt = trained(case, {}, SEED)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["step"] = torch.tensor(count, dtype=torch.float64)
    assert "'step'" in refused(lambda: opt.load_state_dict(saved), opt)
    opt.state[params[0]]["step"] = torch.tensor(count, dtype=torch.float64)
    assert "'step'" in refused(opt.step, opt)


@pytest.mark.parametrize("count", [10**400, 2**63])
def test_a_step_that_is_a_large_integer(count, backend):
    _, opt = trained(RICHEST_OF["Adam"], {}, SEED)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["step"] = count
    assert "'step'" in refused(lambda: opt.load_state_dict(saved), opt)


@richest
@pytest.mark.parametrize("entry", [1, None, "x", torch.ones(3)], ids=repr)
def test_state_of_nobody(case, entry, backend):
    _, opt = trained(case, {}, SEED)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"] = {"a": entry, **saved["state"]}
    assert "'a'" in refused(lambda: opt.load_state_dict(saved), opt)
    opt.step()


@richest
def test_state_of_a_program_before_that_of_parameters(case, backend):
    """torch takes the first entry for that of a parameter."""
    _, opt = trained(case, {}, SEED)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"] = {"a": {"note": 1}, **saved["state"]}
    opt.load_state_dict(saved)
    assert opt.state["a"] == {"note": 1}
    opt.step()
    del saved["state"][0], saved["state"][1], saved["state"][2]
    if refused(lambda: opt.load_state_dict(saved), opt) is None:
        opt.step()


@richest
def test_state_whose_name_is_none(case, backend):
    params, opt = trained(case, {}, SEED)
    for p in params:
        opt.state[p][None] = torch.full((7, 2), 7.0)
    opt.load_state_dict(opt.state_dict())
    assert refused(opt.step, opt) is None
    for p in params:
        assert (opt.state[p][None] == 7).all()


@richest
def test_options_of_one_element(case, backend):
    """Also for a 0-dim parameter."""
    params, opt = trained(case, {}, SEED)
    others, other = trained(case, {}, SEED)
    for key in {"lr", "eps", "weight_decay"} & opt.param_groups[0].keys():
        opt.param_groups[0][key] = torch.tensor([opt.param_groups[0][key]])
    assert refused(opt.step, opt) is None
    other.step()
    agree(opt, other, 1e-5)


def test_scales_that_are_sparse_or_share_memory(backend):
    params, opt = trained(RICHEST_OF["Adam"], {"state_dtype": "8bit"}, SEED)
    state = opt.state[params[1]]
    good = state["exp_avg_scale"]
    for bad in (good.to_sparse(), good[:1].expand(good.shape)):
        state["exp_avg_scale"] = bad
        assert "exp_avg_scale" in refused(opt.step, opt)
    state["exp_avg_scale"] = good
    opt.step()


@pytest.mark.parametrize("value", [None, "deleted"])
def test_an_option_of_fusedopt_that_is_gone_is_off(value, backend):
    params, opt = trained(RICHEST_OF["Adam"], {"l1": 0.01}, SEED)
    others, other = trained(RICHEST_OF["Adam"], {"l1": 0.01}, SEED)
    for group, expected in zip(opt.param_groups, other.param_groups, strict=True):
        expected["l1"] = 0.0
        group["l1"] = None
        if value:
            del group["l1"]
    assert refused(opt.step, opt) is None
    other.step()
    agree(opt, other, 1e-6)


@richest
def test_an_option_without_data(case, backend):
    """Before anything is written: in the second group, of a class that broadcasts it."""
    for shape in ((), (3,)):
        _, opt = trained(case, {}, SEED)
        for key in {"lr", "eps", "weight_decay"} & opt.param_groups[1].keys():
            good = opt.param_groups[1][key]
            opt.param_groups[1][key] = torch.ones(shape, device="meta")
            assert f"'{key}'" in refused(opt.step, opt)
            opt.param_groups[1][key] = good
        opt.step()


class Refusing(Tensor):
    """A tensor that nobody can write."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("add_", "addcdiv_", "copy_"):
            raise NotImplementedError("it cannot be written")
        return super().__torch_function__(func, types, args, kwargs or {})


@richest
def test_an_error_after_a_differentiable_group(case, backend):
    """What one group has written is taken back, whatever is recorded of it."""
    params = [leaf(torch.randn(5)), torch.randn(4).as_subclass(Refusing).requires_grad_()]
    opt = case.ours([{"params": [p]} for p in params])
    opt.param_groups[0]["differentiable"] = True
    params[0].grad = torch.randn(5)
    opt.step()
    before = [p.detach().clone() for p in (params[0], *opt.state[params[0]].values())]
    params[1].grad = torch.randn(4)
    with pytest.raises((RuntimeError, NotImplementedError), match="cannot be written"):
        opt.step()
    after = [params[0], *opt.state[params[0]].values()]
    for was, now in zip(before, after, strict=True):
        assert torch.equal(was, now.detach())
