"""``ema=``: parameters that hold their averages for a while, and averages of idle parameters."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle

import pytest
import torch
from cases import RICHEST_OF, bits, gradient_like, richest
from torch import nn

import fusedopt


def make_model(dtype=torch.float32):
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, 2)).to(dtype)


def draw_grads(params):
    for p in params:
        p.grad = gradient_like(p.detach())


def train(case, model, steps=3, **options):
    opt = case.ours(model.parameters(), ema=0.5, **options)
    for _ in range(steps):
        draw_grads(model.parameters())
        opt.step()
    return opt


def weights(model):
    return [bits(p) for p in model.parameters()]


# Weights go back into what the parameters are ---------------------------------------------------


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


# Copies and wrappers ----------------------------------------------------------------------------


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


# Parameters without a gradient ------------------------------------------------------------------


@richest
def test_averages_of_frozen_parameters(case, backend):
    """A parameter without a gradient is left alone, with its state. Until its first gradient its
    average is the parameter, and so it begins wherever that is."""
    late, frozen = (nn.Parameter(torch.randn(7)) for _ in range(2))
    opt = case.ours([late, frozen], ema=0.9)
    for _ in range(2):
        frozen.grad = gradient_like(frozen.detach())
        opt.step()
    first, average = opt.ema_parameters()
    assert first is late
    kept = bits(average)
    frozen.grad = None
    for step in range(3):
        before = late.detach().clone()
        late.grad = gradient_like(before)
        opt.step()
        if step == 0:
            expected = before.double() + (1 - 0.9) * (late.detach().double() - before.double())
            torch.testing.assert_close(next(opt.ema_parameters()).double(), expected)
    assert bits(opt.state[frozen]["ema"]) == kept


@torch.no_grad()
def average_the_idle(optimizer, *_):
    """As docs/storage.md has it."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            average = optimizer.state.get(param, {}).get("ema")
            if param.grad is None and average is not None:
                average.lerp_(param.to(average.dtype), 1 - group["ema"])


@richest
def test_a_hook_that_averages_them_too(case, backend):
    """With it the averages are those that torch's AveragedModel keeps."""
    model = make_model()
    opt = case.ours(model.parameters(), ema=0.75)
    opt.register_step_post_hook(average_the_idle)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.75)
    )
    averaged.update_parameters(model)  # the first copies
    for step in range(6):
        for i, p in enumerate(model.parameters()):
            p.grad = None if i in (0, 2) and step > 2 else gradient_like(p.detach())
        opt.step()
        averaged.update_parameters(model)
    for ours, theirs in zip(opt.ema_parameters(), averaged.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach())
    with contextlib.ExitStack() as stack:
        stack.enter_context(opt.swap_ema())
        for p, q in zip(model.parameters(), averaged.module.parameters(), strict=True):
            torch.testing.assert_close(p, q)
