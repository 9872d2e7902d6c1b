"""PyTorch's own table of optimizer inputs, run against stock."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from cases import (
    TORCH_NAMES,
    assert_trained_alike,
    every_torch_name,
    gradient_like,
    leaf,
    step_through,
)

import fusedopt

common = pytest.importorskip("torch.testing._internal.common_optimizers")

TABLE = {info.optim_cls.__name__: info for info in common.optim_db}


def _inputs(name):
    return common._get_optim_inputs_including_global_cliquey_kwargs(
        "cpu", torch.float32, TABLE[name]
    )


DTYPES = (torch.float32, torch.float64, torch.complex64)
# fused=True takes no complex parameters.
INPUTS = [
    pytest.param(name, i, dtype, id=f"{name}-{given.desc.replace(' ', '_')}-{dtype}")
    for name in TORCH_NAMES
    for i, given in enumerate(_inputs(name))
    for dtype in DTYPES
    if not (dtype.is_complex and given.kwargs.get("fused"))
]
ERRORS = [
    (name, i)
    for name in TORCH_NAMES
    for i in range(len(TABLE[name].optim_error_inputs_func("cpu", torch.float32)))
]


@pytest.mark.parametrize(("name", "index", "dtype"), INPUTS)
def test_inputs(name, index, dtype, backend):
    given = _inputs(name)[index].kwargs
    # Stock's loop is the reference for what any of its implementations should do.
    loop = {k: v for k, v in given.items() if k not in ("foreach", "fused")}
    shapes = [(3, 5), (7,), (), (2, 1, 4)]
    values = [torch.randn(s, dtype=dtype) for s in shapes]
    grads = [[gradient_like(v) for v in values] for _ in range(4)]
    runs = []
    for cls, options in (
        (getattr(fusedopt, name), given),
        (TABLE[name].optim_cls, {**loop, "foreach": False}),
    ):
        # Through an in-place step on a leaf that requires grad, nothing could be differentiated.
        params = [leaf(v).requires_grad_(not options.get("differentiable")) for v in values]
        opt = cls(params, **copy.deepcopy(options))
        step_through(opt, params, grads)
        runs.append((opt, params))
    narrow = torch.complex64 if dtype.is_complex else torch.float32
    assert_trained_alike(*runs[0], *runs[1], dtype=narrow)
    saved, expected = runs[0][0].state_dict(), runs[1][0].state_dict()
    assert saved["state"].keys() == expected["state"].keys()
    for mine, theirs in zip(saved["state"].values(), expected["state"].values(), strict=True):
        assert mine.keys() == theirs.keys()
    assert saved["param_groups"][0].keys() == expected["param_groups"][0].keys()


@pytest.mark.parametrize(("name", "index"), ERRORS)
def test_error_inputs(name, index):
    error = TABLE[name].optim_error_inputs_func("cpu", torch.float32)[index]
    params = error.optimizer_error_input.params
    params = [leaf(torch.ones(2))] if params is None else params
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error.error_type) as raised:
            getattr(fusedopt, name)(params, **error.optimizer_error_input.kwargs)
    assert re.search(error.error_regex, str(raised.value))


@every_torch_name
def test_its_schedulers(name, backend):
    for i, constructors in enumerate(TABLE[name].scheduler_inputs):
        runs = []
        torch.manual_seed(i)
        values = [torch.randn(7)]
        grads = [[torch.randn(7) + 3] for _ in range(12)]
        for cls in (getattr(fusedopt, name), TABLE[name].optim_cls):
            params = [leaf(v) for v in values]
            opt = cls(params, lr=0.05)
            schedules = [make(opt) for make in constructors]
            for now in grads:
                step_through(opt, params, [now])
                for schedule in schedules:
                    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
                    schedule.step(*([1.0] if isinstance(schedule, plateau) else []))
            runs.append((opt, params))
        assert_trained_alike(*runs[0], *runs[1])
