"""FSDP2 and tensor parallel: parameters are DTensors, and each rank updates its shards."""

from __future__ import annotations

import copy
import math
from itertools import product

import pytest
import seam
import torch
import torch.distributed as dist
from cases import (
    CASES,
    RICHEST,
    RICHEST_OF,
    TOLERANCE,
    bits,
    each_class_or_backend,
    every_name,
    richest,
    those_with,
)
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from training import (
    LAYOUTS,
    assert_close,
    assert_laid_out_as_parameters,
    assert_ranks_agree,
    assert_trained_alike,
    draw_batches,
    fit,
    full,
    holds_first_element,
    local,
    loss,
    net,
    sharded,
    share,
    snapshot,
    world_mesh,
)
from worlds import on_ranks

import fusedopt

layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=str)
# Every layout, and every optimizer, but not all of them crossed.
LAYOUTS_AND_CASES = [
    (layout, case)
    for layout in LAYOUTS.values()
    for case in RICHEST
    if layout.name == "fsdp_3" or case.name == "AdamW"
]
layouts_and_cases = pytest.mark.parametrize(
    ("layout", "case"), LAYOUTS_AND_CASES, ids=lambda value: value.name
)
# And every backend: the layout is nothing to what steps a shard.
layouts_cases_and_backends = pytest.mark.parametrize(
    ("backend", "layout", "case"),
    [
        *(("native", *pair) for pair in LAYOUTS_AND_CASES),
        *product(
            ("python", "kernels"),
            (LAYOUTS["fsdp_3"], LAYOUTS["mixed"]),
            (RICHEST_OF["AdamW"],),
        ),
    ],
    indirect=["backend"],
    ids=lambda value: getattr(value, "name", None),
)


@on_ranks()
@layouts_and_cases
def test_is_stock_but_native_and_local(layout, case, native):
    """A rank asks others only where gradients must be redistributed; stock fails there."""
    start, batches = net(), draw_batches(3)
    model, redistributes = layout.spread(start, "cpu"), layout.name == "sequence_parallel"
    expected = None if redistributes else layout.spread(start, "cpu")
    assert any(isinstance(p, DTensor) for p in model.parameters())
    opt = case.ours(model.parameters())
    for inputs in map(layout.rows, batches):
        opt.zero_grad()
        loss(model, inputs).backward()
        with CommDebugMode() as collectives, seam.no_python_steps(opt):
            opt.step()
        assert redistributes or not collectives.get_total_counts(), collectives.get_comm_counts()
    assert_ranks_agree(model.parameters())
    fit(start, stock := case.stock(start.parameters()), batches)
    assert_trained_alike(model, opt, start, stock)
    if expected:
        fit(expected, stock := case.stock(expected.parameters()), map(layout.rows, batches))
        assert_trained_alike(model, opt, expected, stock)


@on_ranks()
@layouts
@pytest.mark.parametrize("case", [RICHEST_OF["SGD"]], ids=lambda case: case.name)
def test_is_one_process(layout, case, native, device="cpu"):
    start, batches = net(device), draw_batches(3, device)
    model = layout.spread(start, device)
    fit(model, opt := case.ours(model.parameters()), map(layout.rows, batches))
    fit(start, stock := case.stock(start.parameters()), batches)
    assert_trained_alike(model, opt, start, stock)
    assert_ranks_agree(model.parameters())


@on_ranks(2)
@every_name
@pytest.mark.parametrize("backend", ["python", "native"], indirect=True)
def test_all_options(name, backend):
    start, batches = net(), draw_batches(3)
    for case in CASES:
        if case.name != name:
            continue
        # The Python rule and stock compute with tensors of float32 in float32.
        narrow = any(isinstance(v, (torch.Tensor, tuple)) for v in case.options.values())
        near = {"rtol": 1e-5, "atol": 1e-6} if narrow else {}
        model, alone = LAYOUTS["fsdp_2"].spread(start, "cpu"), copy.deepcopy(start)
        fit(model, opt := case.ours(model.parameters()), map(share, batches))
        fit(alone, stock := case.exact(alone.parameters()), batches)
        assert_laid_out_as_parameters(opt)
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            assert_close(p, q, case, **near)
            for key in opt.state.get(p, {}):
                assert_close(opt.state[p][key], stock.state[q][key], (str(case), key), **near)


@on_ranks()
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (LAYOUTS["fsdp_3"], torch.bfloat16),
        (LAYOUTS["sharded_tensor_parallel"], torch.float32),
    ],
    ids=str,
)
def test_shards_change_no_bit(layout, dtype, backend):
    """Each shard becomes what it would be as an ordinary tensor, for all five."""
    start, batches = net(dtype=dtype), draw_batches(2, dtype=dtype)
    for case in RICHEST:
        model = layout.spread(start, "cpu")
        opt = case.ours(model.parameters())
        plain = [local(p).clone().requires_grad_() for p in model.parameters()]
        expected = case.ours(plain)
        for inputs in map(layout.rows, batches):
            opt.zero_grad()
            loss(model, inputs).backward()
            for p, q in zip(model.parameters(), plain, strict=True):
                q.grad = local(p.grad).clone()
            opt.step()
            with seam.only_by_the_rule():  # as shards go
                expected.step()
        for p, q in zip(model.parameters(), plain, strict=True):
            pairs = [(p, q), *((opt.state[p][k], v) for k, v in expected.state[q].items())]
            assert all(bits(local(here)) == bits(there) for here, there in pairs), case


# Precision --------------------------------------------------------------------------------------


@on_ranks()
@each_class_or_backend
@pytest.mark.parametrize("size", [2, 3])
def test_mixed_precision_policy(case, size, backend, device="cpu"):
    """float32 parameters, bfloat16 in between. Both optimizers get the same gradients: bfloat16
    would blow up every difference between two runs."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(net(device, torch.float32), world_mesh(device), mp_policy=policy)
    opt = case.ours(model.parameters())
    exact = [local(p).double().requires_grad_() for p in model.parameters()]
    oracle = case.stock(exact)
    for inputs in map(share, draw_batches(4, device, torch.float32)):
        opt.zero_grad()
        loss(model, inputs).backward()
        for p, q in zip(model.parameters(), exact, strict=True):
            assert p.grad.dtype == torch.float32
            q.grad = local(p.grad).double()
        opt.step()
        oracle.step()
    rtol, atol = TOLERANCE[torch.float32]
    for p, q in zip(model.parameters(), exact, strict=True):
        assert p.dtype == torch.float32
        assert_close(local(p), q, "parameter", rtol=rtol, atol=atol)
        for key, value in opt.state[p].items():
            assert value.dtype == torch.float32
            assert_close(local(value), oracle.state[q][key], key, rtol=rtol, atol=atol)


@on_ranks()
@pytest.mark.parametrize(
    ("backend", "layout", "case"),
    [
        ("native", LAYOUTS["sharded_tensor_parallel"], RICHEST_OF["AdamW"]),
        *(("native", LAYOUTS["fsdp_3"], case) for case in RICHEST),
        *((backend, LAYOUTS["fsdp_3"], RICHEST_OF["AdamW"]) for backend in ("python", "kernels")),
    ],
    indirect=["backend"],
    ids=lambda value: getattr(value, "name", None),
)
@pytest.mark.parametrize("amp_fused", [False, True])
def test_grad_scaler(layout, case, amp_fused, backend, device="cpu"):
    """One element of one shard overflows, and all ranks skip the step."""
    start, batches = net(device), draw_batches(4, device)
    model = layout.spread(start, device)
    runs = (
        (model, case.ours(model.parameters(), amp_fused=amp_fused), layout.rows),
        (start, case.stock(start.parameters()), lambda batch: batch),
    )
    scales = []
    for trained, opt, rows in runs:
        scaler = torch.amp.GradScaler(device, init_scale=64.0)
        for at, batch in enumerate(batches):
            opt.zero_grad()
            scaler.scale(loss(trained, rows(batch))).backward()
            grad = trained.first.weight.grad
            if at == 2 and holds_first_element(grad):
                local(grad)[0, 0] = math.inf
            before = full(trained.first.weight).clone()
            scaler.step(opt)
            assert torch.equal(before, full(trained.first.weight)) == (at == 2)
            scaler.update()
        scales.append(scaler.state_dict())
    assert scales[0] == scales[1]
    assert_trained_alike(*runs[0][:2], *runs[1][:2])


# Clipping ---------------------------------------------------------------------------------------

MAX_NORM = 0.7


def clipped(model, opt, batches, clip=None):
    """Trains, and returns the norms before they were clipped: by ``clip`` or in the step."""
    norms = []
    for inputs in batches:
        opt.zero_grad()
        loss(model, inputs).backward()
        norm = clip(model.parameters(), MAX_NORM) if clip else None
        opt.step()
        norms.append(norm if clip else opt.grad_norm)
    return norms


@on_ranks()
@layouts_cases_and_backends
def test_clipping(layout, case, backend, device="cpu"):
    """The norm is that of one process, which torch itself cannot tell of several meshes."""
    start, batches = net(device), draw_batches(2, device)
    expected = copy.deepcopy(start)
    stock = case.stock(expected.parameters())
    norms = clipped(expected, stock, batches, nn.utils.clip_grad_norm_)
    assert max(norms) > MAX_NORM
    by_hand = [fusedopt.clip_grad_norm_] if case.name == "AdamW" else []
    if by_hand and layout.name in ("fsdp_2", "fsdp_3", "columns", "hybrid"):
        by_hand.append(nn.utils.clip_grad_norm_)
    for clip in (None, *by_hand):
        model = layout.spread(start, device)
        opt = case.ours(model.parameters(), **({} if clip else {"max_grad_norm": MAX_NORM}))
        measured = clipped(model, opt, map(layout.rows, batches), clip)
        for ours, norm in zip(measured, norms, strict=True):
            assert_close(ours, norm, "norm")
        assert_trained_alike(model, opt, expected, stock)
        assert_ranks_agree([*measured, *model.parameters()])


@on_ranks()
@layouts
def test_norms_of_other_kinds_and_non_finite_ones(layout, backend):
    model = layout.spread(net(), "cpu")
    loss(model, layout.rows(draw_batches(1)[0])).backward()
    grads = [p.grad for p in model.parameters()]
    if layout.name.startswith("fsdp"):
        for kind in (1.0, 3.0):
            norm = fusedopt.clip_grad_norm_(model.parameters(), math.inf, kind)
            expected = nn.utils.clip_grad_norm_(model.parameters(), math.inf, kind)
            assert_close(norm, expected, kind)
    if holds_first_element(grads[0]):
        local(grads[0])[0, 0] = math.nan
    opt = fusedopt.AdamW(model.parameters(), max_grad_norm=1.0, amp_fused=True)
    before = [bits(local(p)) for p in model.parameters()], [bits(local(g)) for g in grads]
    with pytest.raises(RuntimeError, match="non-finite"):
        fusedopt.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    opt.step()  # is skipped on all ranks
    assert before == ([bits(local(p)) for p in model.parameters()], [bits(local(g)) for g in grads])
    assert opt.grad_norm.isnan()
    assert fusedopt.clip_grad_norm_(model.parameters(), 1.0).isnan()
    assert all(local(g).isnan().all() for g in grads)


# Loops ------------------------------------------------------------------------------------------


@on_ranks()
@richest
@pytest.mark.parametrize("layout", [LAYOUTS["fsdp_2"], LAYOUTS["mixed"]], ids=str)
def test_flags_that_stock_refuses(layout, case, native, device="cpu"):
    """For stock, foreach must not meet mixed tensors, nor fused SGD and Adagrad DTensors."""
    start, batches = net(device), draw_batches(3, device)
    expected = copy.deepcopy(start)
    fit(expected, stock := case.stock(expected.parameters()), batches)
    for flags in ({"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}):
        if case.name not in those_with("fused") and "fused" in flags:
            continue
        model = layout.spread(start, device)
        opt = case.ours(model.parameters(), **flags)
        fit(model, opt, map(layout.rows, batches))
        assert_trained_alike(model, opt, expected, stock)


@on_ranks(3)
@each_class_or_backend
def test_a_loop_with_everything(case, backend):
    """A frozen layer, one without gradients at times, groups that are added and scheduled,
    accumulation, closures, a model that moves."""
    start, batches = net(), draw_batches(6)
    start.second.requires_grad_(False)
    frozen = [p.float() for p in start.second.parameters()]
    model = LAYOUTS["fsdp_3"].spread(start, "cpu")
    runs = (
        (model, case.ours([*model.first.parameters(), *model.second.parameters()]), share),
        (start, case.stock([*start.first.parameters(), *start.second.parameters()]), lambda b: b),
    )
    for trained, opt, rows in runs:
        norm = trained.norm
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.8)
        for at in range(5):
            if at == 2:
                late = [*norm.parameters(), *trained.last.parameters()]
                opt.add_param_group({"params": late, "lr": 0.02})
                scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.8)
            if at == 3:
                trained.float().double()  # moves all memory, and rounds
            trained.norm = nn.Identity() if at in (2, 4) else norm

            def closure(trained=trained, opt=opt, rows=rows, at=at):
                opt.zero_grad(set_to_none=at % 2 == 0)
                value = loss(trained, rows(batches[at]))
                value.backward()
                loss(trained, rows(batches[at + 1])).backward()
                return value

            opt.step(closure)
            scheduler.step()
        trained.norm = norm
    assert_trained_alike(*runs[0][:2], *runs[1][:2])
    for p, before in zip(model.second.parameters(), frozen, strict=True):
        assert torch.equal(full(p), before.double())


@on_ranks(2)
@each_class_or_backend
def test_cpu_offload(case, backend, device="cpu"):
    """On GPUs, the shards are in host memory while the mesh is one of GPUs."""
    policy = CPUOffloadPolicy(pin_memory=device != "cpu")
    start, batches = net(device), draw_batches(3, device)
    model = sharded(copy.deepcopy(start), world_mesh(device), offload_policy=policy)
    fit(model, opt := case.ours(model.parameters()), map(share, batches))
    assert all(local(p).device.type == "cpu" for p in model.parameters())
    fit(start, case.stock(start.parameters()), batches)
    for p, q in zip(model.parameters(), start.parameters(), strict=True):
        whole = p.to(device).full_tensor() if device != "cpu" else p
        assert_close(whole, q, "parameter")
    assert_laid_out_as_parameters(opt)


@on_ranks(2)
@each_class_or_backend
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_flat_parameters(case, use_orig_params, backend, device="cpu"):
    """FullyShardedDataParallel: pieces of one flat parameter, some of no elements."""
    start, batches = net(device), draw_batches(4, device)
    runs = []
    for build in (case.ours, case.stock):
        model = FullyShardedDataParallel(
            copy.deepcopy(start),
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu") if device == "cpu" else dist.get_rank(),
        )
        opt = build(model.parameters())
        fit(model, opt, map(share, batches))
        runs += [model, opt]
    assert_trained_alike(*runs)


@on_ranks(3)
@each_class_or_backend
def test_conversion_within_a_run(case, backend):
    """From stock to ours and back, in place, with sharded state."""
    start, batches = net(), draw_batches(6)
    model = LAYOUTS["fsdp_3"].spread(start, "cpu")
    opt = case.stock(model.parameters())
    fit(model, opt, map(share, batches[:2]))
    assert fusedopt.from_torch(opt) is opt
    fit(model, opt, map(share, batches[2:4]))
    assert_laid_out_as_parameters(opt)
    fusedopt.to_torch(opt)
    fit(model, opt, map(share, batches[4:]))
    fit(start, stock := case.stock(start.parameters()), batches)
    assert_trained_alike(model, opt, start, stock)


# The optimizer in the backward ------------------------------------------------------------------


@on_ranks()
@layouts_cases_and_backends
def test_attach(layout, case, backend, device="cpu"):
    """Each parameter is updated when its gradient has been reduced, and the gradient freed."""
    start, batches = net(device), draw_batches(3, device)
    model = layout.spread(start, device)
    opt = fusedopt.attach(model, getattr(fusedopt, case.name), **case.options)
    stock = case.stock(start.parameters())
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (opt, stock)]
    assert type(opt) is getattr(fusedopt, case.name)
    for batch in batches:
        loss(model, layout.rows(batch)).backward()
        assert all(p.grad is None for p in model.parameters())
        after = snapshot(opt)
        opt.step()
        opt.zero_grad()
        assert snapshot(opt) == after
        fit(start, stock, [batch])
        for scheduler in schedulers:
            scheduler.step()
    assert_trained_alike(model, opt, start, stock)
    fusedopt.detach(opt)
    fit(model, opt, [layout.rows(batches[0])])
    fit(start, stock, [batches[0]])
    assert_trained_alike(model, opt, start, stock)


@on_ranks(2)
def test_attach_gathers_what_a_process_holds():
    """A bucket is full of shards, not of the gradients that they are parts of."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(6))).double()
    for layer in model:
        fully_shard(layer, mesh=world_mesh("cpu"))
    fully_shard(model, mesh=world_mesh("cpu"))
    opt = fusedopt.attach(model, fusedopt.AdamW, bucket_bytes=150)  # a shard has 64
    for _ in range(2):
        with seam.attached_steps(opt) as steps:
            model(torch.ones(3, 4, dtype=torch.float64)).square().mean().backward()
        assert [*map(len, steps)] == [3, 3]
        assert all(p.grad is None for p in model.parameters())
