"""Weights go back into what the parameters are when the averages leave."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from cases import RICHEST_OF, bits, richest
from torch import nn

import fusedopt
from averages import draw_grads, make_model, train, weights


def by_replacing_data(model):
    for p in model.parameters():
        p.data = p.data.clone()


def by_swapping(model):
    for name, module in model.named_modules():
        for key, p in module.named_parameters(name, recurse=False):
            other = nn.Parameter(torch.randn_like(p, dtype=torch.float64))
            torch.utils.swap_tensors(p, other)
            p.grad = other.grad = None
            assert key


def by_swapping_modules(model):
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for p in model.parameters():
            p.grad = None
        model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def by_loading(model):
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})


MOVES = {
    "double and back": lambda model: model.double().float(),
    "half and back": lambda model: model.half().float(),
    "bfloat16 and back": lambda model: model.bfloat16().float(),
    "to another dtype": lambda model: model.double(),
    "to another memory format": lambda model: model.to(memory_format=torch.channels_last),
    "other memory": by_replacing_data,
    "swapped tensors": by_swapping,
    "swapped by the module": by_swapping_modules,
    "loaded": by_loading,
    "shared": lambda model: model.share_memory(),
    "frozen": lambda model: model.requires_grad_(False),
}


@richest
@pytest.mark.parametrize("move", MOVES)
def test_a_model_that_moves_while_it_holds_averages(case, move, backend):
    model = make_model()
    opt = train(case, model)
    expected = [p.detach().clone() for p in model.parameters()]
    with opt.swap_ema():
        assert weights(model) != [*map(bits, expected)]
        MOVES[move](model)
    for p, weight in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.detach().to(weight.dtype), weight)


@richest
def test_training_goes_on_after_a_conversion(case, backend):
    model, twin = make_model(), make_model()
    twin.load_state_dict(model.state_dict())
    seed = torch.initial_seed()
    runs = []
    for moves, net in ((True, model), (False, twin)):
        torch.manual_seed(seed)
        opt = train(case, net)
        if moves:
            with opt.swap_ema():
                net.half().float()
        draw_grads(net.parameters())
        opt.step()
        runs.append(weights(net))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("options", [{"master_weights": "split"}, {"rounding": "stochastic"}, {}])
def test_half_weights_through_float32(options, backend):
    model = make_model(torch.bfloat16)
    opt = train(RICHEST_OF["SGD"], model, **options)
    before = weights(model)
    with opt.swap_ema():
        model.float().bfloat16()
    assert weights(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_conversion_that_stays(dtype, backend):
    """As the weights would have been converted."""
    model = make_model()
    opt = train(RICHEST_OF["SGD"], model)
    expected = [bits(p.detach().to(dtype)) for p in model.parameters()]
    with opt.swap_ema():
        model.to(dtype)
    assert weights(model) == expected


def test_a_swap_in_inference_mode(backend):
    model = make_model()
    opt = train(RICHEST_OF["SGD"], model)
    before = weights(model)
    with torch.inference_mode(), opt.swap_ema():
        model.double().float()
    assert weights(model) == before
    model = make_model()
    opt = train(RICHEST_OF["SGD"], model)
    before = weights(model)
    with torch.inference_mode():
        context = opt.swap_ema()
        context.__enter__()
    context.__exit__(None, None, None)
    assert weights(model) == before
    draw_grads(model.parameters())
    opt.step()


def other_shape(p):
    p.data = torch.randn(5)


def meta(p):
    torch.utils.swap_tensors(p, nn.Parameter(p.detach().to("meta")))


def no_storage(p):
    p.untyped_storage().resize_(0)


def short_storage(p):
    p.untyped_storage().resize_(p.element_size() * (p.numel() - 1))


def complex_numbers(p):
    p.data = p.data + 0j


def integers(p):
    p.requires_grad_(False)
    p.data = p.data.int()


def overlapping(p):
    p.data = torch.zeros(1).expand(p.shape)


@richest
@pytest.mark.parametrize(
    "change",
    [other_shape, meta, no_storage, short_storage, complex_numbers, integers, overlapping],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("fails", [False, True], ids=["", "with another error"])
def test_what_cannot_take_its_weights(case, change, fails, backend):
    """The error says which parameter, and has its weights; all others got theirs."""
    model = make_model()
    opt = train(case, model)
    opt.zero_grad()
    params = [*model.parameters()]
    expected = [p.detach().clone() for p in params]
    with pytest.raises(fusedopt.averages.WeightsNotRestoredError) as caught:
        with opt.swap_ema():
            change(params[2])
            if fails:
                raise ZeroDivisionError
    assert isinstance(caught.value.__context__, ZeroDivisionError) or not fails
    assert f"fusedopt.{case.name}, param group 0, parameter 2" in str(caught.value)
    assert [*caught.value.weights] == [params[2]]
    assert bits(caught.value.weights[params[2]]) == bits(expected[2])
    if change is meta:
        torch.utils.swap_tensors(params[2], nn.Parameter(caught.value.weights[params[2]]))
    else:
        params[2].data = caught.value.weights[params[2]]
        params[2].requires_grad_()
    assert [*map(bits, params)] == [*map(bits, expected)]
    draw_grads(params)
    opt.step()


def test_autograd_notices(backend):
    """A graph that was made of the averages cannot be used for the weights."""
    p = nn.Parameter(torch.randn(4))
    opt = fusedopt.SGD([p], lr=0.1, ema=0.5)
    for _ in range(2):
        p.grad = torch.randn(4)
        opt.step()
    before = p._version
    with opt.swap_ema():
        assert p._version > before
        before, loss = p._version, p.square().sum()
    assert p._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@richest
def test_groups_that_change_meanwhile(case, backend):
    params = [nn.Parameter(torch.randn(3)) for _ in range(3)]
    opt = case.ours([{"params": params[:1]}, {"params": params[1:]}], ema=0.5)
    draw_grads(params)
    opt.step()
    before = [*map(bits, params)]
    new = nn.Parameter(torch.randn(2))
    with opt.swap_ema():
        opt.add_param_group({"params": [new]})
        opt.param_groups[1]["params"] = params[2:]
        del opt.param_groups[0]
        value = bits(new)
    assert [*map(bits, params)] == before and bits(new) == value


@richest
def test_a_checkpoint_loaded_meanwhile(case, backend):
    model = make_model()
    opt = train(case, model)
    before, saved = weights(model), copy.deepcopy(opt.state_dict())
    with opt.swap_ema():
        opt.load_state_dict(saved)
        with pytest.raises(RuntimeError, match="swap_ema"):
            opt.step()
    assert weights(model) == before
    opt.step()


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)], ids=str)
def test_contexts_that_end_in_any_order(order, backend):
    model = make_model()
    opt = train(RICHEST_OF["SGD"], model)
    before = weights(model)
    contexts = [opt.swap_ema() for _ in order]
    for context in contexts:
        context.__enter__()
    for at in order:
        with pytest.raises(RuntimeError, match="swap_ema"):
            opt.step()
        contexts[at].__exit__(None, None, None)
    assert weights(model) == before
    opt.step()


def test_a_context_that_is_dropped(backend):
    model = make_model()
    opt = train(RICHEST_OF["SGD"], model)
    before = weights(model)
    context = opt.swap_ema()
    context.__enter__()
    del context
    gc.collect()
    assert weights(model) == before
    opt.step()
