"""Steps without data: FakeTensorMode, as estimators of memory use it, and transformations of
``torch.func``, where tensors are stand-ins for others."""

from __future__ import annotations

import contextlib

import pytest
import seam
import torch
from cases import (
    COUNTING,
    SCALARS,
    TABLES,
    Case,
    each_class_or_backend,
    every_case,
    every_name,
    richest_by_options,
    those_with,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fusedopt

OPTIONS = {
    "plain": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "l1": {"l1": 0.1},
    "ema": {"ema": 0.9},
    "8 bit": {"state_dtype": "8bit"},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
    "master": {"master_weights": "fp32"},
    "split master": {"master_weights": "split"},
    "rounding": {"rounding": "stochastic"},
    "clipping": {"max_grad_norm": 1.0},
    "amp": {"amp_fused": True, "max_grad_norm": 1.0},
    "all": {"state_dtype": "8bit", "ema": 0.5, "l1": 0.1, "max_grad_norm": 0.1},
}
BFLOAT16 = ("master", "split master", "rounding")


def _model(dtype=torch.float32):
    return nn.Sequential(nn.Linear(80, 64, dtype=dtype), nn.LayerNorm(64, dtype=dtype))


def _loss(model):
    dtype = next(model.parameters()).dtype
    return model(torch.randn(2, 80, dtype=dtype)).sum()


def assert_fake(opt, steps):
    for group in opt.param_groups:
        for param in group["params"]:
            for key, value in opt.state[param].items():
                assert isinstance(value, FakeTensor), key
                if key in SCALARS:
                    # torch's constructors make that of fused=True by torch.zeros.
                    known = seam.number(value)
                    assert group.get("fused") or known == steps or key != "step" and 0 < known < 1
                elif not key.endswith("_scale") and key != "rounding_state":
                    assert value.shape == param.shape


@each_class_or_backend
@pytest.mark.parametrize(
    ("options", "made", "stepped"),
    [
        *((options, "inside", "inside") for options in OPTIONS),
        *((options, "outside", "inside") for options in ("plain", "all")),
        *((options, "inside", "outside") for options in ("plain", "all")),
        *((options, "outside", "outside") for options in ("plain", "8 bit", "clipping", "all")),
    ],
)
def test_two_steps_and_a_checkpoint(case, options, made, stepped, backend):
    if case.name not in those_with("fused") and options in ("fused", "foreach"):
        pytest.skip("RMSprop has no fused=")
    mode = FakeTensorMode()

    def when(place):
        return mode if place == "inside" else contextlib.nullcontext()

    with mode:
        model = _model(torch.bfloat16 if options in BFLOAT16 else torch.float32)
    with when(made):
        opt = case.ours(model.parameters(), **OPTIONS[options])
    for _ in range(2):
        with mode:
            _loss(model).backward()
        with when(stepped):
            opt.step()
            opt.zero_grad()
    assert_fake(opt, 2)
    with mode:
        opt.load_state_dict(opt.state_dict())
        _loss(model).backward()
        norm = fusedopt.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        assert isinstance(norm, FakeTensor)
        state = opt.state_dict(stock=True)["state"]
        assert all(isinstance(v, FakeTensor) for s in state.values() for v in s.values())
        if "ema" in OPTIONS[options]:
            with opt.swap_ema():
                pass
    assert_fake(opt, 3)
    assert (opt.grad_norm is not None) is ("max_grad_norm" in OPTIONS[options])


@every_case
def test_options_of_torch(case, backend):
    with FakeTensorMode():
        model = _model()
        tensors = {
            key: torch.tensor([0.1]) if key == "lr" else torch.tensor(0.1)
            for key, value in case.options.items()
            if isinstance(value, torch.Tensor)
        }
        if isinstance(case.options.get("betas", (0,))[0], torch.Tensor):
            tensors["betas"] = (torch.tensor(0.8), torch.tensor(0.9))
        cls = getattr(fusedopt, case.name)
        opt = cls(model.parameters(), **{**case.options, **tensors})
        for _ in range(2):
            _loss(model).backward()
            opt.step()
    assert_fake(opt, 2)


@every_name
def test_a_learning_rate_with_data(name, backend):
    """A tensor from outside of the mode."""
    mode = FakeTensorMode()
    with mode:
        model = _model()
    opt = getattr(fusedopt, name)(model.parameters(), lr=torch.tensor(0.1))
    with mode:
        _loss(model).backward()
        opt.step()
    assert_fake(opt, 1)
    assert type(opt.param_groups[0]["lr"]) is torch.Tensor


@every_name
def test_complex_sparse_and_half_parameters(name, backend):
    with FakeTensorMode():
        params = [nn.Parameter(torch.randn(5, dtype=d)) for d in (torch.complex64, torch.float16)]
        params[0].grad, params[1].grad = torch.randn_like(params[0]), torch.randn_like(params[1])
        if TABLES[name].takes_sparse:
            table = nn.Parameter(torch.randn(5, 3))
            if name == "SGD":
                table.grad = torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 3), (5, 3))
                params.append(table)
        opt = getattr(fusedopt, name)(params)
        for _ in range(2):
            opt.step()
    assert_fake(opt, 2)


@pytest.mark.parametrize("name", [case.name for case in COUNTING])
def test_a_count_without_a_value(name, backend):
    """As torch's fused optimizers make it, and RMSprop always."""
    with FakeTensorMode():
        model = _model()
        opt = getattr(fusedopt, name)(model.parameters())
        for at in range(3):
            _loss(model).backward()
            opt.step()
            if at == 0:
                for state in opt.state.values():
                    state["step"] = torch.zeros(())
                opt.load_state_dict(opt.state_dict())
    assert all(isinstance(s["step"], FakeTensor) for s in opt.state.values())


@every_name
def test_an_error_is_said_and_changes_no_count(name, backend):
    with FakeTensorMode():
        param = nn.Parameter(torch.randn(3))
        opt = getattr(fusedopt, name)([("w", param)])
        for grad in (torch.randn(3), torch.randn(4)):
            param.grad = None
            with torch.no_grad():
                param.grad = torch.randn(3)
            if grad.numel() == 4:
                param.grad.data = grad
                with pytest.raises(ValueError, match=r"'w'.*grad has shape \(4,\)"):
                    opt.step()
            else:
                opt.step()
    if TABLES[name].counts_steps:
        assert seam.number(opt.state[param]["step"]) == 1


def test_the_estimate_is_not_above_that_of_torch(backend):
    """By torch's own tracker: no copies of parameters and state for a restoration."""
    from torch.distributed._tools.mem_tracker import MemTracker

    def peak(module):
        with FakeTensorMode():
            model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(4)))
            opt = module.AdamW(model.parameters(), foreach=False)
            tracker = MemTracker()
            tracker.track_external(model, opt)
            with tracker:
                for _ in range(2):
                    model(torch.randn(8, 128)).sum().backward()
                    opt.step()
                    opt.zero_grad()
                    tracker.reset_mod_stats()
            return sum(
                size
                for device in tracker.get_tracker_snapshot("peak").values()
                for kind, size in device.items()
                if kind == "Total"
            )

    assert 0 < peak(fusedopt) <= 1.01 * peak(torch.optim)


@every_name
def test_a_real_optimizer_is_as_before_after_a_fake_one(name, backend):
    """What a step in the mode sets aside does not stay for later steps with data."""
    values = [torch.randn(9) for _ in range(3)]
    param = nn.Parameter(values[0].clone())
    twin = nn.Parameter(values[0].clone())
    opt = getattr(fusedopt, name)([param], max_grad_norm=0.5)
    other = getattr(fusedopt, name)([twin], max_grad_norm=0.5)
    for at, grad in enumerate(values):
        param.grad, twin.grad = grad.clone(), grad.clone()
        if at == 1:
            with FakeTensorMode():
                fake = nn.Parameter(torch.randn(9))
                fake.grad = torch.randn(9)
                extra = getattr(fusedopt, name)([fake], max_grad_norm=0.5)
                seam.share_norm(opt, extra)
                extra.step()
        opt.step()
        other.step()
    assert torch.equal(param, twin)


def test_meta_parameters_stay_an_error(backend):
    with torch.device("meta"):
        model = _model()
    opt = fusedopt.Adam(model.parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="a meta tensor has no data; materialize it"):
        opt.step()


# torch.func -----------------------------------------------------------------------------------


def _steps(build, **options):
    def run(value, grad):
        param = value.clone()
        param.grad = grad
        opt = build([param], **options)
        opt.step()
        opt.step()
        return param

    return run


TRANSFORMS = {
    "functionalize": torch.func.functionalize,
    "vmap": torch.func.vmap,
    "make_fx": lambda f: lambda *a: make_fx(f)(*a)(*a),
    "fake make_fx": lambda f: lambda *a: make_fx(f, tracing_mode="fake")(*a)(*a),
    "both": lambda f: lambda *a: make_fx(torch.func.functionalize(f))(*a)(*a),
}


@richest_by_options
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_step_inside_a_transformation(case, transform, backend):
    if transform == "vmap":  # knows no maximum(out=)
        case = Case(case.name, {k: v for k, v in case.options.items() if k != "amsgrad"})
    value, grad = torch.randn(4, 3), torch.randn(4, 3)
    transformed = TRANSFORMS[transform]
    expected = transformed(_steps(case.stock))(value, grad)
    assert torch.equal(transformed(_steps(case.ours))(value, grad), expected)


@pytest.mark.parametrize("options", ["l1", "ema", "8 bit", "bfloat16 state", "clipping"])
@richest_by_options
def test_options_that_torch_lacks_inside_functionalize(case, options, backend, monkeypatch):
    value, grad = torch.randn(80, 64), torch.randn(80, 64)
    # The norm is measured in another order, of which a variance near zero would make much, and so
    # would what is left of a clipped gradient and a penalty that cancel.
    clips = options == "clipping"
    without = {"centered": False, "weight_decay": 0} if clips else {}
    without = {name: value for name, value in without.items() if name in case.options}
    run = _steps(case.ours, **OPTIONS[options], **without)
    result = torch.func.functionalize(run)(value, grad)
    monkeypatch.setattr(fusedopt.backend, "native", None)  # the Python rule, bit for bit
    rtol, atol = (1e-4, 1e-5) if clips else (0, 0)
    torch.testing.assert_close(result, run(value, grad), rtol=rtol, atol=atol)


@richest_by_options
def test_a_gradient_through_the_step(case, backend):
    value, scale = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)

    def through(build):
        def run(scale):
            param = value.clone() * 1.0
            param.grad = scale * value
            opt = build([param], differentiable=True)
            opt.step()
            return param.square().sum()

        return torch.func.grad(run)(scale)

    torch.testing.assert_close(through(case.ours), through(case.stock))


@richest_by_options
@pytest.mark.parametrize("transform", [torch.func.functionalize, torch.func.vmap])
def test_parameters_from_outside_of_a_transformation(case, transform, backend):
    """And before and after it the same optimizer."""
    values = torch.randn(3)
    params = [nn.Parameter(values.clone()), nn.Parameter(values.clone())]
    opts = [case.ours(params[:1]), case.stock(params[1:])]
    for at in range(3):
        grad = torch.randn(3)
        for opt, param in zip(opts, params, strict=True):
            param.grad = grad.clone()

            def run(x, opt=opt):
                opt.step()
                return x * 2

            run(grad) if at != 1 else transform(run)(grad)
    torch.testing.assert_close(*params)
