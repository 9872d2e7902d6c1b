"""What torch makes by default, torch.set_default_dtype() and torch.set_default_device(), changes no
bit of a step, of its state, or of a checkpoint."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys

import pytest
import torch
from cases import (
    SCALARS,
    Case,
    bits,
    counting,
    draw,
    every_name,
    every_sparse,
    gradient_like,
    leaf,
    richest,
    step_through,
)
from checkpoints import through_a_file

import fusedopt

TENSOR_LR = Case("Adagrad", {"lr": torch.tensor(0.1), "lr_decay": 0.2})


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AMBIENT = {
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "device": lambda: torch.device("meta"),
}
ambient = pytest.mark.parametrize("ambient", AMBIENT)
# Options and the dtypes of parameters that they are for.
STORED = [
    ({}, torch.float32),
    ({"state_dtype": "8bit"}, torch.float32),
    ({"state_dtype": "8bit", "ema": 0.9}, torch.bfloat16),
    ({"state_dtype": torch.float16}, torch.float32),
    ({"master_weights": "split", "ema": 0.9}, torch.bfloat16),
    ({"rounding": "stochastic"}, torch.bfloat16),
    ({"l1": 0.01, "max_grad_norm": 1.0}, torch.float32),
]
stored = pytest.mark.parametrize(("options", "dtype"), STORED, ids=str)
SHAPES = [(70, 71), (5,), ()]


def skip_if_torch_rounds_otherwise(name, ambient):
    if name == "NAdam" and ambient == "float64":
        pytest.skip("mu_product is rounded to the default dtype, as torch does: test_nadam.py")


def everything(opt, params):
    """Every bit that a step writes. The count of steps may have another dtype."""
    return [
        (
            bits(p),
            {
                key: value.item() if key in SCALARS else bits(value)
                for key, value in sorted(opt.state.get(p, {}).items())
            },
        )
        for p in params
    ]


def train(case, values, grads, options, seed=0):
    torch.manual_seed(seed)
    params = [leaf(v) for v in values]
    opt = case.ours(params, **options)
    step_through(opt, params, grads)
    return params, opt


@richest
@stored
@ambient
def test_training(case, options, dtype, ambient, backend):
    """Constructor, steps, norms, averages and both kinds of state dict."""
    values, grads = draw(SHAPES, 4, dtype)
    results = []
    for within in (contextlib.nullcontext, AMBIENT[ambient]):
        with within():
            params, opt = train(case, values, grads, options)
            after = everything(opt, params)
            saved = [
                {
                    key: value.item() if key in SCALARS else bits(value)
                    for key, value in state.items()
                }
                for state in opt.state_dict(stock=True)["state"].values()
            ]
            if "ema" in options:
                with opt.swap_ema():
                    saved.append([bits(p) for p in params])
            norm = opt.grad_norm
            results.append((after, saved, None if norm is None else bits(norm)))
    assert results[0] == results[1]


@counting
@stored
@ambient
def test_the_count_of_steps(case, options, dtype, ambient, backend):
    """Of the dtype that torch's has, wherever it is, and on the CPU."""
    values, grads = draw([(5,)], 2, dtype)
    with AMBIENT[ambient]():
        (param,), opt = train(case, values, grads, options)
        fresh = case.ours([leaf(values[0])], **options)
        as_stock = fresh.state_dict(stock=True)["state"].values()
    expected = torch.float64 if ambient == "float64" else torch.float32
    states = [opt.state[param], *fresh.state.values(), *as_stock]
    assert {(s["step"].dtype, s["step"].device.type) for s in states} == {(expected, "cpu")}


@richest
@stored
@ambient
@pytest.mark.parametrize("source", ["ours", "numbers"])
def test_loading(case, options, dtype, ambient, source, backend):
    values, grads = draw(SHAPES, 4, dtype)
    results = []
    for within in (contextlib.nullcontext, AMBIENT[ambient]):
        params, opt = train(case, values, grads[:2], options)
        saved = through_a_file(opt.state_dict(stock=source != "ours"))
        for state in saved["state"].values() if source == "numbers" else ():
            if "step" in state:
                state["step"] = int(state["step"])
        with within():
            torch.manual_seed(1)
            params = [leaf(p) for p in params]
            opt = case.ours(params, **options)
            opt.load_state_dict(saved)
            step_through(opt, params, grads[2:])
        results.append(everything(opt, params))
    assert results[0] == results[1]


@richest
@ambient
def test_moving_over_and_back(case, ambient, backend):
    values, grads = draw(SHAPES, 6)
    results = []
    for within in (contextlib.nullcontext, AMBIENT[ambient]):
        params = [leaf(v) for v in values]
        opt = case.stock(params)
        step_through(opt, params, grads[:2])
        with within():
            opt = fusedopt.from_torch(opt)
            opt.param_groups[0]["state_dtype"] = "8bit"
            step_through(opt, params, grads[2:4])
            del opt.param_groups[0]["state_dtype"]
            opt = fusedopt.to_torch(opt)
        step_through(opt, params, grads[4:])
        results.append(everything(opt, params))
    assert results[0] == results[1]


@richest
@ambient
def test_what_torch_made_on_the_default_device(case, ambient, backend):
    """torch's Adagrad cannot make a step with such a count, ours goes on."""
    values, grads = draw([(5,), (3, 4)], 2)
    results = []
    for within in (contextlib.nullcontext, AMBIENT[ambient]):
        params = [leaf(v) for v in values]
        with within():
            opt = fusedopt.from_torch(case.stock(params))
            step_through(opt, params, grads)
        results.append(everything(opt, params))
    assert results[0] == results[1]


def test_a_count_that_is_lost_is_an_error():
    params, grads = draw([(5,)], 1)
    params = [leaf(p) for p in params]
    opt = torch.optim.Adagrad(params)
    step_through(opt, params, grads)
    opt.state[params[0]]["step"] = torch.zeros((), device="meta")
    with pytest.raises(ValueError, match=r"param group 0, parameter 0: its step count.*meta"):
        fusedopt.from_torch(opt)
    assert type(opt) is torch.optim.Adagrad


@counting
@pytest.mark.parametrize("saved_as", [torch.float16, torch.bfloat16, torch.uint8, torch.int16])
def test_a_count_that_its_dtype_cannot_continue(case, saved_as, backend):
    """A checkpoint of a program that made its counts itself."""
    values, grads = draw([(5,)], 1)
    (param,), opt = train(case, values, grads, {})
    last = {torch.float16: 2048, torch.bfloat16: 256, torch.uint8: 255, torch.int16: 2**15 - 1}
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["step"] = torch.tensor(last[saved_as] - 1, dtype=saved_as)
    opt.load_state_dict(saved)
    for count in range(last[saved_as], last[saved_as] + 3):
        opt.step()
        assert opt.state[param]["step"].item() == count


@pytest.mark.parametrize("case", [TENSOR_LR], ids=str)
@ambient
def test_complex_parameters(case, ambient, backend):
    values = [torch.randn(4, 5, dtype=torch.complex64)]
    grads = [[gradient_like(v) for v in values] for _ in range(3)]
    results = []
    for within in (contextlib.nullcontext, AMBIENT[ambient]):
        with within():
            params, opt = train(case, values, grads, {})
        results.append(everything(opt, params))
    assert results[0] == results[1]


@every_sparse
@ambient
def test_sparse_gradients(name, ambient, backend):
    table, grad = torch.randn(6, 3), torch.randn(2, 3)
    results = []
    for within in (contextlib.nullcontext, AMBIENT[ambient]):
        param = leaf(table)
        rows = torch.tensor([[1, 4]])
        param.grad = torch.sparse_coo_tensor(rows, grad, (6, 3))
        with within():
            opt = getattr(fusedopt, name)([param], lr=0.1)
            opt.step()
        results.append(everything(opt, [param]))
    assert results[0] == results[1]


@every_name
@ambient
def test_a_learning_rate_that_is_an_integer(name, ambient, backend):
    skip_if_torch_rounds_otherwise(name, ambient)
    values, grads = draw([(5,), ()], 3)
    results = []
    for within in (contextlib.nullcontext, AMBIENT[ambient]):
        params = [leaf(v) for v in values]
        lr = torch.tensor(3)
        with within():
            opt = getattr(fusedopt, name)(params, lr=lr)
            if name == "Adagrad":
                opt.param_groups[0]["lr_decay"] = 0.1
            step_through(opt, params, grads)
        results.append(everything(opt, params))
    assert results[0] == results[1]


@ambient
def test_clipping(ambient, backend):
    values, (grads,) = draw(SHAPES, 1)
    results = []
    for within in (contextlib.nullcontext, AMBIENT[ambient]):
        params = [leaf(v) for v in values]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        with within():
            norm = fusedopt.clip_grad_norm_(params, 1.0)
        results.append([bits(norm), *(bits(p.grad) for p in params)])
    assert results[0] == results[1]


@every_name
@ambient
def test_in_the_backward(name, ambient, backend):
    skip_if_torch_rounds_otherwise(name, ambient)
    values, inputs = torch.randn(70, 71), torch.randn(3, 71)
    results = []
    for within in (contextlib.nullcontext, AMBIENT[ambient]):
        param = leaf(values)
        with within():
            opt = fusedopt.attach([param], getattr(fusedopt, name), state_dtype="8bit", ema=0.9)
            for _ in range(3):
                (inputs @ param.T).square().sum().backward()
        results.append(everything(opt, [param]))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "setting",
    ["set_default_dtype(torch.float16)", "set_default_device('meta')"],
)
def test_the_import(setting, native):
    code = f"import torch; torch.{setting}; import fusedopt; print(fusedopt.backend.status())"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("native")
