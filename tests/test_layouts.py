"""Parameters, gradients and state in any layout, and whatever may happen to them between steps."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from cases import (
    CASES,
    COMPLEX_CASES,
    DTYPES,
    GRAD_LAYOUTS,
    LAYOUTS,
    SCALARS,
    Case,
    assert_near,
    assert_trained_alike,
    bits,
    draw,
    every_case,
    gradient_like,
    leaf,
    richest,
    same_bits,
    states,
    step_through,
    train,
)
from torch import nn

import fusedopt


def placed(layout, values):
    """A leaf in a layout, and the memory around it."""
    tensor, around = layout(values)
    return tensor.detach(), around


# A few steps must not distinguish a layout from the float64 oracle on contiguous tensors.


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *product(CASES, [torch.float32, torch.bfloat16]),
        *product(COMPLEX_CASES, [torch.complex64]),
    ],
    ids=str,
)
def test_every_layout_with_every_gradient_layout(case, dtype, backend):
    """All pairs are parameters of one optimizer, in several shapes."""
    shapes = [(3, 4, 5, 2), (4, 1, 3, 5), (1, 1, 1, 1), (2, 0, 3, 1), (2, 17, 3, 3)]
    params, around, truth, what = [], [], [], []
    for (p_name, p_layout), (g_name, g_layout), shape in product(
        LAYOUTS.items(), GRAD_LAYOUTS.items(), shapes
    ):
        values, ((first,), (second,)) = draw([shape], 2, torch.float32)
        values, first, second = (
            (1 + 1j) * t if dtype.is_complex else t for t in (values[0], first, second)
        )
        param, beside = placed(p_layout, values.to(dtype))
        grads = [g_layout(g.to(dtype))[0] for g in (first, second)]
        params.append(param.requires_grad_())
        around += beside
        truth.append(grads)
        what.append(f"{p_name} {shape} with {g_name} gradient")
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = [leaf(p.detach().contiguous(), wide) for p in params]
    strides = [p.stride() for p in params]
    pointers = [p.data_ptr() for p in params]
    opt, oracle = case.ours(params), case.exact(exact)
    before = [bits(t) for t in around]
    for now in zip(*truth, strict=True):
        grad_bits = [bits(g) for g in now]
        for p, q, g in zip(params, exact, now, strict=True):
            p.grad, q.grad = g, g.to(wide)
        opt.step()
        oracle.step()
        assert [bits(p.grad) for p in params] == grad_bits
    assert [bits(t) for t in around] == before
    assert [p.stride() for p in params] == strides
    assert [p.data_ptr() for p in params] == pointers
    for p, q, name in zip(params, exact, what, strict=True):
        assert_near(p, q, name, torch.complex64 if dtype.is_complex else dtype)
        for key, value in opt.state[p].items():
            if key not in SCALARS and dtype != torch.bfloat16:
                assert_near(value, oracle.state[q][key], f"{key}, {name}", dtype)


COUNTS = [*range(34), 63, 64, 65, 255, 256, 257, 4095, 4096, 4097]


def _segments(buffer, shift, counts, per_16):
    """Views of a buffer, each ``shift`` elements after a multiple of 16, with gaps between."""
    views, at = [], 16 + shift
    for count in counts:
        views.append(buffer[at : at + count])
        at += math.ceil((count + 5) / per_16) * per_16
    return views


def _room(counts):
    return sum(math.ceil((count + 5) / 16) * 16 for count in counts) + 64


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_every_count_at_every_misalignment(case, dtype, backend):
    """Against one long parameter, with sentinels around each short one, and around its state,
    whose alignment differs from the parameter's."""
    shifts = [1] if backend == "python" else range(16)
    keys = [key for key in _state_keys(case) if key not in SCALARS]
    params, grads, flat, truth, gaps = [], [], [], [], []
    for shift in shifts:
        values, ((first,), (second,)) = draw([(sum(COUNTS),)], 2, dtype)
        buffer = torch.full((_room(COUNTS),), 7.0, dtype=dtype)
        views = _segments(buffer, shift, COUNTS, 16)
        for view, chunk in zip(views, values[0].split(COUNTS), strict=True):
            view.copy_(chunk)
        gaps.append((buffer, views))
        params += [v.detach().requires_grad_() for v in views]
        grads.append([*zip(first.split(COUNTS), second.split(COUNTS), strict=True)])
        flat.append(values[0])
        truth.append([first, second])
    opt = case.ours(params)
    short = [pair for chunk in grads for pair in chunk]

    def step(which):
        for at, (p, pair) in enumerate(zip(params, short, strict=True)):
            grad = torch.empty(len(p) + 15, dtype=dtype)[(at * 7) % 16 :][: len(p)]
            p.grad = grad.copy_(pair[which])
        opt.step()

    step(0)
    for offset, key in enumerate(keys):
        for number, shift in enumerate(shifts):
            buffer = torch.full((_room(COUNTS),), 7.0, dtype=dtype)
            views = _segments(buffer, (shift + 3 * offset + 5) % 16, COUNTS, 16)
            for p, view in zip(params[number * len(COUNTS) :], views, strict=False):
                opt.state[p][key] = view.copy_(opt.state[p][key])
            gaps.append((buffer, views))
    outside = [_outside(buffer, views) for buffer, views in gaps]
    step(1)
    assert [_outside(buffer, views) for buffer, views in gaps] == outside

    long = [leaf(v) for v in flat]
    reference = case.ours(long)
    step_through(reference, long, [*zip(*truth, strict=True)])
    parts = [(torch.cat([p.detach() for p in params]), torch.cat([p.detach() for p in long]))]
    for key in keys:
        parts.append(
            tuple(
                torch.cat([o.state[p][key] for p in ps])
                for o, ps in ((opt, params), (reference, long))
            )
        )
    for ours, expected in parts:
        if backend != "python":
            assert same_bits(ours, expected)
        else:
            assert_near(ours, expected)


def _state_keys(case):
    (param,), opt = train(case.ours, [torch.ones(1)], [[torch.ones(1)]])
    return opt.state[param].keys()


def _outside(buffer, views):
    """The bits of a buffer without those of the views."""
    mask = torch.ones(len(buffer), dtype=torch.bool)
    for view in views:
        mask[view.storage_offset() : view.storage_offset() + len(view)] = False
    return bits(buffer[mask])


# Between steps --------------------------------------------------------------------------------


def _runs(case, values, grads, change, dtype=None):
    """Trains ours and stock in the same way, with a change after two steps."""
    runs = []
    for build in (case.ours, case.stock):
        params = [leaf(v) for v in values]
        opt = build(params)
        step_through(opt, params, grads[:2])
        change(opt, params)
        step_through(opt, params, grads[2:])
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=dtype)
    return runs


def _swap_data(opt, params):
    for p in params:
        p.data = p.data * 1.5


def _to_channels_last(opt, params):
    for p in params:
        p.data = p.data.to(memory_format=torch.channels_last)


def _replace_state(opt, params):
    for p in params:
        for key, value in opt.state[p].items():
            opt.state[p][key] = value * 2


def _swap_state_data(opt, params):
    for p in params:
        for key, value in opt.state[p].items():
            if key not in SCALARS:
                value.data = value.data * 2


def _swap_step_data(opt, params):
    for p in params:
        if "step" in opt.state[p]:
            opt.state[p]["step"].data = torch.tensor(7.0)


def _write_state(opt, params):
    for p in params:
        for value in opt.state[p].values():
            value.mul_(2)


def _permute_state(opt, params):
    for p in params:
        for key, value in opt.state[p].items():
            if key not in SCALARS:
                opt.state[p][key] = value.transpose(0, 3).contiguous().transpose(0, 3)


def _slice_state(opt, params):
    for p in params:
        for key, value in opt.state[p].items():
            if key not in SCALARS:
                base = torch.zeros(*value.shape[:-1], 2 * value.shape[-1], dtype=value.dtype)
                opt.state[p][key] = base[..., ::2].copy_(value)


def _forget_state(opt, params):
    opt.state.clear() if not isinstance(opt, torch.optim.Adagrad) else None


def _forget_one(opt, params):
    del opt.state[params[1]]


def _swap_state(opt, params):
    a, b = params[0], params[1]
    opt.state[a], opt.state[b] = opt.state[b], opt.state[a]


def _replace_params(opt, params):
    new = [leaf(p.detach() + 1) for p in params]
    for old, fresh in zip(params, new, strict=True):
        opt.state[fresh] = opt.state.pop(old)
    opt.param_groups[0]["params"][:] = new
    params[:] = new


def _drop_a_param(opt, params):
    """By hand, from the list that the optimizer has."""
    del opt.param_groups[0]["params"][0]


def _reorder_params(opt, params):
    opt.param_groups[0]["params"].reverse()


def _replace_group(opt, params):
    opt.param_groups[0] = {**opt.param_groups[0], "lr": 0.3}


def _resize(opt, params):
    """Shrinks a parameter and what belongs to it, as pruning does."""
    for p in params[:1]:
        p.data = p.data[:2].clone()
        for key, value in opt.state[p].items():
            if key not in SCALARS:
                opt.state[p][key] = value[:2].clone()


CHANGES = [
    _swap_data,
    _to_channels_last,
    _replace_state,
    _swap_state_data,
    _swap_step_data,
    _write_state,
    _permute_state,
    _slice_state,
    _forget_state,
    _forget_one,
    _swap_state,
    _replace_params,
    _drop_a_param,
    _reorder_params,
    _replace_group,
]


@richest
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__[1:])
def test_changes_between_steps_are_noticed(case, change, backend):
    values, grads = draw([(4, 3, 5, 2), (4, 3, 5, 2)], 5)
    _runs(case, values, grads, change, torch.float32)


@richest
def test_pruned_parameter(case, backend):
    values, grads = draw([(4, 3), (5,)], 4)
    grads = [[g[0] if at < 2 else g[0][:2], g[1]] for at, g in enumerate(grads)]
    _runs(case, values, grads, _resize, torch.float32)


@richest
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_model_to_another_dtype_between_steps(case, dtype, backend):
    """Parameters change in place; state keeps its dtype, and nothing is read as another."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    params = [*model.parameters()]
    opt = case.ours(params)
    exact = [leaf(p, torch.float64) for p in params]
    oracle = case.exact(exact)

    def step(times):
        for _ in range(times):
            for p, q in zip(params, exact, strict=True):
                p.grad = gradient_like(p)
                q.grad = p.grad.double()
            opt.step()
            oracle.step()

    step(2)
    model.to(dtype)
    assert params[0].dtype == dtype
    step(2)
    for p, q in zip(params, exact, strict=True):
        assert_near(p, q, dtype=torch.float32 if dtype == torch.float64 else dtype)
        assert all(v.dtype == torch.float32 for v in opt.state[p].values())


@richest
def test_fp32_state_on_a_low_precision_parameter(case, backend):
    """Moments that someone made float32 are kept and used as such."""
    values, grads = draw([(35,), (6, 7)], 6, torch.bfloat16)
    params = [leaf(v) for v in values]
    opt = case.ours(params)
    step_through(opt, params, grads[:1])
    exact = [leaf(p, torch.float64) for p in params]
    oracle = case.exact(exact)
    step_through(oracle, exact, grads[:1])
    for p, q in zip(params, exact, strict=True):
        q.data.copy_(p.detach())
        for key, value in opt.state[p].items():
            opt.state[p][key] = value.float()
            oracle.state[q][key].copy_(value)
    for now in grads[1:]:
        step_through(opt, params, [now])
        step_through(oracle, exact, [now])
        for p, q in zip(params, exact, strict=True):
            ulp = torch.finfo(torch.bfloat16).eps * q.detach().abs()
            assert ((p.double() - q).abs() <= ulp + 1e-6).all()
            q.data.copy_(p.detach())  # so that state is all that can differ
            for key, value in opt.state[p].items():
                assert value.dtype == torch.float32
                assert_near(value, oracle.state[q][key], key)


@richest
def test_low_precision_gradient_on_a_float32_parameter(case, backend):
    """Where torch allows it: with ``grad_dtype``."""
    param = torch.randn(37, requires_grad=True)
    if not hasattr(param, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    param.grad_dtype = None
    exact = leaf(param, torch.float64)
    opt, oracle = case.ours([param]), case.exact([exact])
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16, torch.float64):
        param.grad = (torch.randn(37) + 3).to(dtype)
        exact.grad = param.grad.double()
        opt.step()
        oracle.step()
    assert_near(param, exact)


@richest
def test_late_missing_and_frozen(case, backend):
    """Gradients that first appear at step 3, come and go, or never come."""
    values, grads = draw([(5,), (3, 4), (7,), (2,)], 6)
    for at, now in enumerate(grads):
        now[1] = now[1] if at >= 2 else None
        now[2] = now[2] if at % 2 else None
        now[3] = None
    runs = []
    for build in (case.ours, case.stock):
        params, opt = train(build, values, grads)
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)
    ours, stock = (states(*run) for run in runs)
    assert [s.keys() for s in ours] == [s.keys() for s in stock]
    assert same_bits(runs[0][1][3], leaf(values[3]))


@richest
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_late_first_gradient_in_every_layout(case, layout, dtype, backend):
    """Next to a parameter that has been stepping all the time."""
    values = [torch.randn(2, 3, 4, 2).to(dtype) for _ in range(2)]
    grads = [[gradient_like(v) for v in values] for _ in range(5)]
    for now in grads[:2]:
        now[1] = None
    params = [leaf(values[0]), placed(layout, values[1])[0].requires_grad_()]
    opt = case.ours(params)
    step_through(opt, params, grads)
    exact, oracle = train(case.stock, values, grads)
    assert_trained_alike(opt, params, oracle, exact)


@richest
def test_no_gradient_at_all(case, backend):
    params = [leaf(torch.ones(3)), leaf(torch.ones(()))]
    opt, stock = case.ours(params), case.stock(params)
    for _ in range(2):
        opt.step()
        stock.step()
    assert opt.state_dict()["state"].keys() == stock.state_dict()["state"].keys()
    step_through(opt, params, [[torch.ones(3), None]])
    assert not torch.equal(params[0].detach(), torch.ones(3))


@richest
def test_requires_grad_may_be_turned_off_between_steps(case, backend):
    values, grads = draw([(5,), (6,)], 4)
    _runs(case, values, grads, lambda opt, params: params[0].requires_grad_(False), torch.float32)


# Sharing --------------------------------------------------------------------------------------


@richest
def test_tied_parameters(case, backend):
    runs = []
    for build in (case.ours, case.stock):
        torch.manual_seed(5)
        model = nn.ModuleDict({"inp": nn.Embedding(11, 6), "out": nn.Linear(6, 11, bias=False)})
        model["out"].weight = model["inp"].weight
        opt = build(model.parameters())
        for _ in range(3):
            opt.zero_grad()
            model["out"](model["inp"](torch.arange(11))).logsumexp(1).sum().backward()
            opt.step()
        runs.append((opt, [*model.parameters()]))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


@richest
@pytest.mark.parametrize("size", [1, 5, 2**18])
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_duplicate_parameter_steps_twice(case, size, backend):
    """With one state, as stock's loop does; the second update must see the first."""
    values, grads = draw([(3,), (size,)], 3)
    runs = []
    for build in (case.ours, case.stock):
        a, b = (leaf(v) for v in values)
        opt = build([b, a, b])
        step_through(opt, [a, b], grads)
        runs.append((opt, [a, b]))
    if case.table.counts_steps:
        assert runs[0][0].state[runs[0][1][1]]["step"].item() == 6
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


@richest
def test_two_parameters_in_one_storage(case, backend):
    """Overlapping views: each is updated in turn, in the order of the list. The sizes let threads
    that ignore this meet in the same elements."""
    half = 2**18
    runs = []
    for build in (case.ours, case.stock):
        torch.manual_seed(1)
        params = []
        for _ in range(4):
            base = torch.randn(3 * half)
            params += [base[: 2 * half].detach().requires_grad_()]
            params += [base[half:].detach().requires_grad_()]
        opt = build(params)
        step_through(opt, params, [[torch.randn(2 * half) + 3 for _ in params] for _ in range(3)])
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


@richest
def test_gradient_that_is_another_parameter(case, backend):
    """Gradients are read before anything is written, as stock does for a later parameter."""
    runs = []
    for build in (case.ours, case.stock):
        torch.manual_seed(1)
        params = [torch.randn(2**18).add(3).requires_grad_() for _ in range(4)]
        opt = build(params)
        mine, other = params[::2], params[1::2]
        for _ in range(3):
            for p, q in zip(mine, other, strict=True):
                p.grad, q.grad = q.data, torch.ones_like(q)
            opt.step()
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


@richest
def test_gradient_that_is_another_parameter_since_it_moved(case, backend):
    runs = []
    for build in (case.ours, case.stock):
        torch.manual_seed(1)
        params = [torch.randn(2**18).add(3).requires_grad_() for _ in range(4)]
        opt = build(params)
        mine, other = params[::2], params[1::2]
        for moves in (False, True, False, True):
            for p, q in zip(mine, other, strict=True):
                p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
                if moves:
                    q.data = q.data.clone()
                    p.grad = q.data
            opt.step()
        runs.append((opt, params))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


@richest
def test_copies_of_gradients_where_other_tensors_were(case, backend):
    """A parameter without a gradient moves, and a copy of a gradient gets its old memory."""
    torch.manual_seed(1)
    mine, other = (torch.randn(6, 5).add(3).requires_grad_() for _ in range(2))
    opt = case.ours([mine, other])
    for _ in range(20):
        for at_rest in (False, True):
            mine.grad = torch.randn(5, 6).t()  # which is copied
            other.grad = None if at_rest else torch.randn(6, 5)
            if at_rest:
                other.data = other.detach().clone()
            opt.step()


@richest
def test_shared_state(case, backend):
    """Two parameters with one step count and one moment, each updated twice in a step."""
    values, grads = draw([(2**18,), (2**18,)], 4)

    def share(opt, params):
        first, second = (opt.state[p] for p in params)
        for key in ("step", case.table.required):
            if key in first:
                second[key] = first[key]

    _runs(case, values, grads, share, torch.float32)


@richest
def test_adjacent_views_of_one_buffer(case, backend):
    """A flat buffer cut into parameters, as FSDP and DDP lay them out."""
    values, grads = draw([(7,), (33,), (1,), (64,)], 3)
    base = torch.cat(values)
    parts = [v.detach().requires_grad_() for v in base.split([7, 33, 1, 64])]
    flat_grads = [torch.cat(now) for now in grads]
    opt = case.ours(parts)
    for flat in flat_grads:
        for p, g in zip(parts, flat.split([7, 33, 1, 64]), strict=True):
            p.grad = g
        opt.step()
    exact, _ = train(case.exact, values, grads, torch.float64)
    for p, q in zip(parts, exact, strict=True):
        assert_near(p, q)


@richest
@pytest.mark.parametrize("size", [5, 50_000])
def test_gradient_that_is_the_parameter(case, size, backend):
    """It is read before it is written."""
    runs = []
    for build, read in ((case.ours, lambda p: p.data), (case.stock, lambda p: p.data.clone())):
        torch.manual_seed(1)
        p = (torch.randn(size) + 3).requires_grad_()
        opt = build([p])
        for _ in range(2):
            p.grad = read(p)
            opt.step()
        runs.append((opt, [p]))
    assert_trained_alike(*runs[0], *runs[1], dtype=torch.float32)


@richest
def test_one_gradient_for_two_parameters(case, backend):
    grad = torch.randn(9) + 3
    params = [leaf(torch.zeros(9)), leaf(torch.ones(9))]
    params[0].grad = params[1].grad = grad
    case.ours(params).step()
    exact = [leaf(torch.zeros(9, dtype=torch.float64)), leaf(torch.ones(9, dtype=torch.float64))]
    for q in exact:
        q.grad = grad.double()
    case.exact(exact).step()
    for p, q in zip(params, exact, strict=True):
        assert_near(p, q)


def test_parameters_and_buffers_of_subclasses(backend):
    """nn.Parameter, a plain leaf, and a Tensor subclass in one group."""

    class Tagged(torch.Tensor):
        pass

    values, grads = draw([(5,)] * 3, 3)
    params = [nn.Parameter(values[0].clone()), leaf(values[1])]
    params.append(values[2].clone().as_subclass(Tagged).requires_grad_())
    opt = fusedopt.Adam(params, lr=0.1)
    step_through(opt, params, grads)
    exact, _ = train(Case("Adam", {"lr": 0.1}).exact, values, grads, torch.float64)
    for p, q in zip(params, exact, strict=True):
        assert_near(p.detach().as_subclass(torch.Tensor), q)


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_many_parameters(count, backend):
    case = Case("AdamW", {"lr": 0.1})
    values, grads = draw([(3,)] * (count + 1), 2)
    params, opt = train(case.ours, values, grads)
    exact, oracle = train(case.exact, values, grads, torch.float64)
    assert_trained_alike(opt, params, oracle, exact, torch.float32)
