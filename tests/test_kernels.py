"""The body of the GPU's kernels, run on the CPU over all blocks and threads, gives the bits of the
CPU path. What is left for a GPU to prove: alignment of its loads, streams, graphs, memory order."""

from __future__ import annotations

import ctypes
import math
import os
import random
from contextlib import contextmanager
from itertools import pairwise, product
from unittest import mock

import pytest
import seam
import torch
from cases import (
    DTYPES,
    RICHEST_OF,
    SCALARS,
    TABLES,
    Case,
    bits,
    every_case,
    every_case_or_dtype,
    every_dtype,
    every_name,
    richest,
    snapshot,
)
from conftest import SEED
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from seam import grad_norm

import fusedopt

pytestmark = pytest.mark.usefixtures("kernels")
relaxed = settings(
    deadline=None,
    max_examples=12,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# csrc/multi_tensor/tuning.h
BLOCK = 16384
VECTOR = {torch.float64: 2, torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}
TABLE_BYTES = 32764 // 16 * 16 - 96
NORM_CHUNK, NORM_COLUMNS, NORM_PARTIALS = 65536, 2048, 256

TAILS = [*range(18)]
AROUND_BLOCKS = [k * BLOCK + d for k in (1, 2) for d in (-1, 0, 1)] + [3 * BLOCK + 7]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# A case for every number of slots, and the bytes that its update takes in a table: prepared in
# float, prepared in double, and to be prepared by the kernel.
BY_SLOTS = {
    "2": (Case("SGD", {"lr": 0.1, "weight_decay": 0.1}), 2, (32, 64, 64)),
    "3": (Case("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}), 3, (32, 64, 64)),
    "3 and count": (RICHEST_OF["Adagrad"], 3, (32, 48, 64)),
    "4 and count": (Case("Adam", {"lr": 0.1, "weight_decay": 0.1}), 4, (48, 96, 112)),
    "5 and count": (RICHEST_OF["Adam"], 5, (48, 96, 112)),
    "5, centered": (RICHEST_OF["RMSprop"], 5, (48, 80, 80)),
}
by_slots = pytest.mark.parametrize("slots", BY_SLOTS)


# Running --------------------------------------------------------------------------------------


@contextmanager
def running(module):
    with mock.patch.object(fusedopt.backend, "native", module):
        yield


def canonical(tensor):
    """Its bits, where a NaN is a NaN: which one depends on the order of operands."""
    return bits(tensor.detach().masked_fill(tensor.detach().isnan(), math.nan))


def outcome(opt):
    """All that it wrote: lists of tensors of one dtype, which are compared faster together."""
    found = {}
    for p in (p for group in opt.param_groups for p in group["params"]):
        for key, tensor in [("parameter", p), *opt.state.get(p, {}).items()]:
            found.setdefault((key, tensor.dtype), []).append(tensor.detach().reshape(-1))
    if opt.grad_norm is not None:
        found["grad_norm"] = [opt.grad_norm.reshape(1)]
    return found


def assert_same_outcome(found, other):
    assert found.keys() == other.keys()
    for key, tensors in found.items():
        if canonical(torch.cat(tensors)) != canonical(torch.cat(other[key])):
            pairs = enumerate(zip(tensors, other[key], strict=True))
            differ = [(i, len(a)) for i, (a, b) in pairs if canonical(a) != canonical(b)]
            pytest.fail(f"{key}: these tensors (number, size) differ: {differ}")


def assert_same(kernels, run):
    """``run`` makes and steps an optimizer, and gets whether the kernels do it. Both end alike."""
    number = random.randrange(2**31)
    found = []
    for module in (fusedopt.backend.native, kernels):
        torch.manual_seed(number)
        random.seed(number)
        with running(module):
            found.append(outcome(run(module is kernels)))
    assert_same_outcome(*found)


def values_of(numel, dtype, special=False):
    values = torch.randn(numel, dtype=torch.float64)
    if special:
        choice = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 3e38, 65519.0])
        picked = choice[torch.randint(len(choice), (numel,))].double()
        values = torch.where(torch.rand(numel) < 0.1, picked, values)
    return values.to(dtype)


def params_of(sizes, dtype, special=False):
    return [values_of(n, dtype, special).requires_grad_() for n in sizes]


def set_grads(params, special=False):
    for dtype in dict.fromkeys(p.dtype for p in params):
        of_dtype = [p for p in params if p.dtype == dtype]
        sizes = [p.numel() for p in of_dtype]
        for p, grad in zip(
            of_dtype, values_of(sum(sizes), dtype, special).split(sizes), strict=True
        ):
            p.grad = grad.clone()


class Memory:
    """Tensors in one buffer, each some elements behind a multiple of 64 bytes, and the rest of
    the buffer, which nobody may touch."""

    def __init__(self, tensors, shifts):
        spans, at = [], 32
        for tensor, shift in zip(tensors, shifts, strict=True):
            spans.append((at + shift, at + shift + tensor.numel()))
            at = (spans[-1][1] + 16) // 32 * 32 + 32
        self.buffer = torch.full((at + 32,), 7.0, dtype=tensors[0].dtype)
        assert self.buffer.data_ptr() % 64 == 0
        self.views = [self.buffer[begin:end] for begin, end in spans]
        for view, tensor in zip(self.views, tensors, strict=True):
            view.copy_(tensor.detach())
        self.gaps = [
            self.buffer[end:begin] for (_, end), (begin, _) in pairwise([(0, 0), *spans, (at, at)])
        ]

    def check(self):
        assert all((gap == 7).all() for gap in self.gaps)


# Elements -------------------------------------------------------------------------------------


@every_case
@every_dtype
def test_every_count(case, dtype, kernels):
    def run(_):
        params = params_of(TAILS + AROUND_BLOCKS, dtype, special=True)
        opt = case.ours(params)
        for at in range(3):
            set_grads(params, special=at == 1)
            opt.step()
        return opt

    assert_same(kernels, run)


@by_slots
@every_dtype
def test_every_misalignment(slots, dtype, kernels):
    """Of parameter, gradient and one of the state tensors, each by itself, with a sentinel behind
    and before every tensor."""
    case = BY_SLOTS[slots][0]
    shifts = [*product(range(VECTOR[dtype] + 1), repeat=3)]

    def run(_):
        sizes = [random.choice(TAILS) for _ in shifts]
        for large in range(3):
            sizes[random.randrange(len(sizes))] = BLOCK + large
        memory = [Memory(params_of(sizes, dtype), [s[0] for s in shifts])]
        params = [view.detach().requires_grad_() for view in memory[0].views]
        opt = case.ours(params)
        grads = Memory(params_of(sizes, dtype), [s[1] for s in shifts])
        for at in range(3):
            for p, grad in zip(params, grads.views, strict=True):
                p.grad = grad.copy_(values_of(len(p), dtype))
            before = bits(grads.buffer)
            opt.step()
            assert bits(grads.buffer) == before
            keys = [key for key in opt.state.get(params[0], {}) if key not in SCALARS]
            for k, key in enumerate(keys if at == 0 else ()):
                moved = [s[2] if i % len(keys) == k else 0 for i, s in enumerate(shifts)]
                memory.append(Memory([opt.state[p][key] for p in params], moved))
                for p, view in zip(params, memory[-1].views, strict=True):
                    opt.state[p][key] = view
        for part in memory:
            part.check()
        return opt

    assert_same(kernels, run)


@by_slots
def test_every_mixture_of_dtypes(slots, kernels):
    """Parameter, gradient and each state tensor of their own dtype, aligned or not; one launch."""
    case = BY_SLOTS[slots][0]
    kinds = [*product(FLOATS, FLOATS)]
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")

    def run(on_kernels):
        params, grad_kinds = [], []
        for n, (kind, grad_kind) in product([*TAILS, BLOCK + 5], kinds):
            shift = random.choice([0, 0, 0, 1, 4, 8])
            params.append(Memory([values_of(n, kind)], [shift]).views[0].detach().requires_grad_())
            params[-1].grad_dtype = None
            grad_kinds.append(grad_kind)
        opt = case.ours(params)
        for at in range(3):
            for p, kind in zip(params, grad_kinds, strict=True):
                p.grad = Memory([values_of(len(p), kind)], [random.choice([0, 0, 0, 4])]).views[0]
            launches = kernels.num_launches()
            opt.step()
            if at:
                assert kernels.num_launches() - launches == on_kernels
            for state in (opt.state.get(p, {}) for p in params if at == 0):
                for key in [key for key in state if key not in SCALARS]:
                    value = state[key].to(random.choice(FLOATS))
                    state[key] = Memory([value], [random.choice([0, 0, 0, 4])]).views[0]
        return opt

    assert_same(kernels, run)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_only_read(case, dtype, kernels):
    """A NaN with a payload would come back as another one."""
    signalling = {torch.bfloat16: 0x7F81, torch.float16: 0x7C01}[dtype]
    (param,) = params_of([8 * 4 + 3], dtype)
    param.grad = torch.full(param.shape, signalling, dtype=torch.int16).view(dtype)
    before = bits(param.grad)
    with running(kernels):
        case.ours([param]).step()
    if case.name != "Lion":  # torch's sign of NaN is zero
        assert param.isnan().all()
    assert bits(param.grad) == before


def test_loaded_float32_moments_of_half_parameters(kernels):
    def run(_):
        wide = params_of(TAILS + AROUND_BLOCKS, torch.float32)
        first = RICHEST_OF["Adam"].ours(wide)
        set_grads(wide)
        first.step()
        params = [p.detach().to(torch.bfloat16).requires_grad_() for p in wide]
        opt = RICHEST_OF["Adam"].ours(params)
        opt.load_state_dict(first.state_dict())
        for _ in range(2):
            set_grads(params)
            opt.step()
        assert opt.state[params[0]]["exp_avg"].dtype == torch.float32
        return opt

    assert_same(kernels, run)


# Tables ---------------------------------------------------------------------------------------


def num_tables(tensors, num_pointers, update_bytes):
    """Of a list of tensors: (number of chunks, which update) each."""
    tables, used, updates = 0, TABLE_BYTES, set()
    for chunks, update in tensors:
        if not chunks:
            continue
        size = 8 * num_pointers + 8 + 2 * 4
        used += size + update_bytes * (update not in updates)
        if used > TABLE_BYTES:
            tables, used, updates = tables + 1, 4 + size + update_bytes, set()
        updates.add(update)
    return tables


def chunks_of(numel, counted=False):
    return max(math.ceil(numel / BLOCK), int(counted))


def test_the_tickets_suffice_for_any_table(kernels):
    assert num_tables([(1, 0)] * kernels.NUM_TICKETS, 2, 0) == 1
    assert num_tables([(1, 0)] * (kernels.NUM_TICKETS + 1), 2, 0) == 2


@by_slots
@pytest.mark.parametrize("shared", [True, False], ids=["one update", "an update each"])
@pytest.mark.parametrize("kind", ["float32", "float64", "capturable"])
def test_as_many_tensors_as_a_table_holds(slots, shared, kind, kernels):
    """And one more; and one more than two tables hold."""
    case, num_pointers, sizes = BY_SLOTS[slots]
    pointers = num_pointers + (kind == "capturable" and case.table.counts_steps)
    update_bytes = sizes[("float32", "float64", "capturable").index(kind)]
    dtype = torch.float64 if kind == "float64" else torch.float32

    def tables(n):
        return num_tables([(1, 0 if shared else i) for i in range(n)], pointers, update_bytes)

    limit = next(n for n in range(100, 1100) if tables(n + 1) > 1)
    # So many groups take long.
    for number in (limit, limit + 1, 2 * limit + 1) if shared else (limit, limit + 1):

        def run(on_kernels, number=number):
            params = list(values_of(number * 3, dtype).view(-1, 3))
            params = [p.detach().requires_grad_() for p in params]
            lr = [torch.tensor(0.1 + 0.001 * i) for i in range(number)]
            if kind != "capturable":
                lr = [x.item() for x in lr]
            groups = [{"params": [p], "lr": x} for p, x in zip(params, lr, strict=True)]
            if shared:
                groups = [{"params": params, "lr": lr[0]}]
            more = {"capturable": True} if kind == "capturable" and on_kernels else {}
            opt = case.ours(groups, **more)
            for _ in range(2):
                set_grads(params)
                launches = kernels.num_launches()
                opt.step()
                assert kernels.num_launches() - launches == (tables(number) if on_kernels else 0)
            return opt

        assert_same(kernels, run)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_model_is_one_launch(capturable, kernels):
    """600 tensors of many sizes, in groups with hyperparameters and step counts of their own."""
    number = 600 if not capturable else 550

    def run(on_kernels):
        sizes = [random.choice([0, 1, 3, 64, 1000, BLOCK, BLOCK + 1]) for _ in range(number)]
        params = params_of(sizes, torch.float32)
        groups = [
            {
                "params": params[i::12],
                "lr": 0.01 * (i + 1),
                "betas": (0.5 + i / 30, 0.9),
                "weight_decay": i / 100,
                "maximize": i % 5 == 0,
            }
            for i in range(12)
        ]
        opt = fusedopt.Adam(groups, capturable=capturable and on_kernels)
        for at in range(4):
            set_grads(params)
            for i in range(at + 1, 4):
                for p in params[i::12]:
                    p.grad = None
            launches = kernels.num_launches()
            opt.step()
            assert kernels.num_launches() - launches == on_kernels
        return opt

    assert_same(kernels, run)


@pytest.mark.parametrize("case", [BY_SLOTS[s][0] for s in BY_SLOTS], ids=str)
def test_one_launch_for_all_floats_and_one_for_doubles(case, kernels):
    def run(on_kernels):
        params = [p for dtype in DTYPES for p in params_of([0, 5, 33, BLOCK + 1], dtype)]
        random.shuffle(params)
        opt = case.ours([{"params": params[i::3], "lr": 0.1 * i} for i in range(3)])
        for _ in range(2):
            set_grads(params)
            launches = kernels.num_launches()
            opt.step()
            assert kernels.num_launches() - launches == 2 * on_kernels
        return opt

    assert_same(kernels, run)


def test_nothing_to_do_is_no_launch(kernels):
    params = params_of([0, 0], torch.float32)
    set_grads(params)
    with running(kernels):
        opt = fusedopt.Adam(params)
        launches = kernels.num_launches()
        opt.step()
    assert kernels.num_launches() == launches
    assert opt.state[params[0]]["step"] == 1


@pytest.mark.parametrize("capturable", [False, True])
def test_empty_parameters_do_not_take_the_python_rule(capturable, kernels):
    for module in (fusedopt.backend.native, kernels)[capturable:]:
        with running(module):
            params = [torch.zeros(s, requires_grad=True) for s in (0, 3, (4, 0), 0)]
            opt = fusedopt.Adam(params, capturable=capturable)
            with seam.no_python_steps(opt):
                for _ in range(3):
                    set_grads(params[:2] + params[3:])
                    params[2].grad = torch.zeros(4, 0)
                    opt.step()
        assert [opt.state[p]["step"] for p in params] == [3] * 4


@st.composite
def lists(draw):
    """Runs of tensors of one size, cut into groups, and which of them get a gradient when."""
    sizes = [0, 1, 2, 5, 8, 17, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3]
    kind = draw(st.sampled_from(["few", "many", "all alone", "late"]))
    runs = []
    for _ in range(draw(st.integers(1, 6))):
        size = draw(st.sampled_from(sizes))
        most = 3 if size > 100 else 500
        repeat = draw(st.integers(1, most) | st.just(most if kind != "few" else 1))
        runs.append((size, repeat, draw(st.integers(1, 1 if kind == "all alone" else repeat))))
    late = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9])) if kind == "late" else 0.0
    return runs, late, draw(st.integers(0, 2**20))


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adam capturable"])
@seed(SEED)
@given(chosen=lists())
@relaxed
def test_any_list_updates_every_element_once(name, chosen, kernels):
    runs, late, number = chosen
    stateful = name != "SGD"
    group_sizes, sizes = [], []
    for size, repeat, together in runs:
        sizes += [size] * repeat
        group_sizes += [together] * (repeat // together) + [repeat % together] * (
            repeat % together > 0
        )
    pick = random.Random(number)
    missing = [[pick.random() < late for _ in sizes] for _ in range(3)]

    def run(on_kernels):
        capturable = name == "Adam capturable" and on_kernels
        memory = Memory([torch.zeros(n) for n in sizes], [pick.randrange(9) for _ in sizes])
        params = [view.requires_grad_() for view in map(torch.Tensor.detach, memory.views)]
        ones = torch.ones(max(sizes))
        left = iter(params)
        groups = [{"params": [next(left) for _ in range(n)]} for n in group_sizes]
        more = {"lr": 1.0} | ({"capturable": capturable} if stateful else {})
        opt = getattr(fusedopt, name.split()[0])(groups, **more)
        steps = [0] * len(sizes)
        order = []  # of the tensors in the tables: parameters with state in the order they got it
        for without in missing:
            for i, p in enumerate(params):
                p.grad = None if without[i] else ones[: sizes[i]]
                order += [i] if not without[i] and not steps[i] else []
            there = [i for i in (order if stateful else range(len(sizes))) if not without[i]]
            # Groups have equal options, and so one update of each count.
            tensors = [
                (
                    chunks_of(sizes[i], capturable),
                    min(steps[i], 1) if capturable else steps[i] * stateful,
                )
                for i in there
            ]
            launches = kernels.num_launches()
            opt.step()
            if on_kernels:
                shape = (5, 112) if capturable else (4, 48) if stateful else (2, 32)
                assert kernels.num_launches() - launches == num_tables(tensors, *shape)
            for i in there:
                steps[i] += 1
        memory.check()
        for p, count in zip(params, steps, strict=True):
            if not stateful:
                assert (p == -count).all()
            elif count:
                assert opt.state[p]["step"] == count
        return opt

    assert_same(kernels, run)


# Prepared in the kernel -----------------------------------------------------------------------


def all_tickets(opt):
    return torch.cat([tickets.view(torch.int32) for tickets in seam.tickets(opt)])


@every_case_or_dtype
def test_steps_that_the_kernel_counts(case, dtype, kernels):
    """capturable=True ends as capturable=False does; with late gradients, empty tensors, and many
    blocks that all read the count of one tensor."""

    def run(on_kernels):
        params = params_of([1, 0, 9, BLOCK, 5 * BLOCK + 3, 7, 300], dtype)
        opt = case.ours(params, capturable=on_kernels)
        for at in range(5):
            set_grads(params)
            if at < 2:
                params[2].grad = params[4].grad = None
            params[5].grad = params[5].grad if at % 2 else None
            opt.step()
            assert not all_tickets(opt).any() if on_kernels else True
        if "step" in opt.state.get(params[0], {}):
            assert [opt.state[p]["step"].item() for p in params] == [5, 5, 3, 5, 3, 2, 5]
        return opt

    assert_same(kernels, run)


@richest
def test_groups_that_count_on_the_device_and_others(case, kernels):
    """One launch for each kind."""

    def run(on_kernels):
        params = params_of([3, BLOCK + 1, 5, 40_000], torch.float32)
        lr = [torch.tensor(0.1), 0.2, torch.tensor(0.3), 0.4]
        groups = [{"params": [p], "lr": x} for p, x in zip(params, lr, strict=True)]
        opt = case.ours(groups)
        for group in opt.param_groups[::2]:
            group["capturable"] = on_kernels
        for _ in range(3):
            set_grads(params)
            launches = kernels.num_launches()
            opt.step()
            assert kernels.num_launches() - launches == 2 * on_kernels
        return opt

    assert_same(kernels, run)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_tickets_of_several_tables(amsgrad, kernels):
    def run(on_kernels):
        sizes = [3] * 1500
        sizes[::100] = [random.choice([1, 0, BLOCK + 1, 3 * BLOCK]) for _ in sizes[::100]]
        params = params_of(sizes, torch.float32)
        opt = fusedopt.Adam(params, amsgrad=amsgrad, capturable=on_kernels)
        for at in range(3):
            set_grads(params)
            for p in params[: 700 if at == 0 else 0]:
                p.grad = None
            launches = kernels.num_launches()
            opt.step()
            if on_kernels:
                assert kernels.num_launches() - launches > 1
                assert not all_tickets(opt).any()
        return opt

    assert_same(kernels, run)


@every_name
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
@every_dtype
def test_options_on_the_device_change_between_steps(name, kind, dtype, kernels):
    """In place, and the plan stays."""

    def run(on_kernels):
        params = params_of([5, BLOCK + 3, 1], dtype)
        more = {"betas": (torch.tensor(0.9, dtype=kind), torch.tensor(0.95, dtype=kind))}
        more = more if "betas" in TABLES[name].numbers else {}
        lr = torch.tensor(0.1, dtype=kind)
        more |= {"momentum": 0.9} if "momentum" in TABLES[name].numbers else {}
        opt = getattr(fusedopt, name)(params, lr=lr, capturable=on_kernels, **more)
        with seam.new_plans(opt) as plans:
            for at in range(5):
                set_grads(params)
                opt.step()
                opt.param_groups[0]["lr"].fill_(0.1 / (at + 2))
                for i, beta in enumerate(more.get("betas", ())):
                    opt.param_groups[0]["betas"][i].copy_(beta * 0.99)
        assert len(plans) == 1
        return opt

    assert_same(kernels, run)


# Scaling --------------------------------------------------------------------------------------


@every_case_or_dtype
def test_scaling_clipping_and_skipping(case, dtype, kernels):
    """In one run: a step, a skipped one, one whose norm is not finite, one that is not clipped."""

    def run(on_kernels):
        params = params_of([1, 0, 9, 2 * BLOCK + 3, 7], dtype)
        opt = case.ours(params, max_grad_norm=0.5, amp_fused=True, capturable=on_kernels)
        opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        for at, skips in enumerate([True, False, True, False, True, False]):
            set_grads(params)
            opt.found_inf = torch.tensor(float(at in (0, 2)))
            if at == 4:
                params[3].grad[-1] = math.inf
            if at == 5:
                opt.max_grad_norm = 1e6
            before = snapshot(opt)
            opt.step()
            if skips:
                assert snapshot(opt)[:1] == before[:1]
                assert at == 0 or snapshot(opt) == before
            assert opt.grad_norm.isfinite() == (at != 4)
        return opt

    assert_same(kernels, run)


@richest
def test_late_parameters_in_a_skipped_step(case, kernels):
    """Their first step is the one that is not skipped."""

    def run(on_kernels):
        params = params_of([5, BLOCK + 1], torch.float32)
        opt = case.ours(params, amp_fused=True, capturable=on_kernels)
        for at in range(4):
            set_grads(params)
            params[1].grad = params[1].grad if at else None
            opt.found_inf = torch.tensor(float(at == 1))
            opt.step()
        return opt

    assert_same(kernels, run)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_without_amp(scaled, value, kernels):
    """Nothing is skipped: NaN is what torch's clipping gives, too."""

    def run(on_kernels):
        params = params_of([5, BLOCK + 1], torch.float32)
        opt = fusedopt.SGD(params, lr=0.1, max_grad_norm=1.0, capturable=on_kernels)
        set_grads(params)
        params[0].grad[2] = value
        opt.step()
        assert not params[0].isfinite().all()
        return opt

    assert_same(kernels, run)


NORM_SIZES = [
    *TAILS,
    *(k * NORM_COLUMNS + d for k in (1, 2) for d in (-1, 0, 1, 7)),
    *(k * NORM_CHUNK + d for k in (1, 2) for d in (-1, 0, 1, NORM_COLUMNS + 3)),
]


def measured(grads, *more):
    clip = next(iter(grad_norm.GradNorm().measure(grads, *more).values()))
    assert not clip[grad_norm.SKIP + 1 :][:1].view(torch.int64).any()  # the ticket of the kernel
    return canonical(clip[: grad_norm.SKIP + 1]), clip[grad_norm.NORM].item()


@pytest.mark.parametrize("shift", range(9))
@every_dtype
def test_norm_of_every_count(shift, dtype, kernels):
    """Each gradient alone, and all together, at every misalignment."""
    memory = Memory([values_of(n, dtype) for n in NORM_SIZES], [shift] * len(NORM_SIZES))
    before = bits(memory.buffer)
    scale = {torch.device("cpu"): torch.tensor(3.0)}
    for grads in (memory.views, *([view] for view in memory.views if len(view))):
        exact = torch.cat([g.double() for g in grads]).norm().item()
        for more, times in (((1.0,), 1), ((0.5, scale, True), 3)):
            ours = measured(grads, *more)
            with running(kernels):
                launches = kernels.num_launches()
                assert measured(grads, *more) == ours
                assert kernels.num_launches() == launches + 1
            assert ours[1] * times == pytest.approx(
                exact, rel=1e-12 if dtype.itemsize == 8 else 1e-6
            )
    assert bits(memory.buffer) == before


def test_norm_of_mixed_dtypes_is_one_launch(kernels):
    grads = [values_of(n, dtype) for n in NORM_SIZES[-4:] for dtype in DTYPES]
    expected = measured(grads)
    with running(kernels):
        launches = kernels.num_launches()
        assert measured(grads) == expected
    assert kernels.num_launches() == launches + 1
    assert expected[1] == pytest.approx(torch.cat([g.double() for g in grads]).norm().item())


GRADS_PER_TABLE = (TABLE_BYTES - 4 - 64) // 24


@pytest.mark.parametrize(
    "number",
    [
        *(k * NORM_PARTIALS + d for k in (1, 2) for d in (-1, 0, 1)),
        *(k * GRADS_PER_TABLE + d for k in (1, 2) for d in (0, 1)),
    ],
)
def test_norm_of_many_gradients(number, kernels):
    """Every element counts once: the squares of ones have an exact sum. ``number`` chunks, and
    as many tables as it takes."""
    grads = [torch.ones(5)[: 1 + i % 4] for i in range(number)]
    expected = measured(grads)
    assert expected[1] == math.sqrt(sum(map(len, grads)))
    with running(kernels):
        launches = kernels.num_launches()
        assert measured(grads) == expected
    assert kernels.num_launches() - launches == math.ceil(number / GRADS_PER_TABLE)


@seed(SEED)
@given(
    runs=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 7, 8, 2047, 2048, 2049, 65535, 65536, 65537, 140_000]),
            st.integers(1, 4) | st.sampled_from([1000]),
            st.sampled_from(DTYPES),
            st.integers(0, 9),
        ),
        min_size=1,
        max_size=5,
    ),
    threads=st.integers(1, 4),
)
@relaxed
def test_norm_of_any_list(runs, threads, kernels):
    grads = []
    for size, number, dtype, shift in runs:
        one = torch.ones(size + shift, dtype=dtype)[shift:]
        grads += [one] * (number if size < 2048 else min(number, 4))
    torch.set_num_threads(threads)
    expected = measured(grads)
    assert expected[1] == math.sqrt(sum(map(len, grads)))
    torch.set_num_threads(1)
    with running(kernels):
        assert measured(grads) == expected


@every_dtype
def test_threads_do_not_change_the_norm(dtype, kernels):
    grads = [values_of(n, dtype) for n in (300_001, 5, 70_000, 0, NORM_CHUNK)]
    found = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        found.append(measured(grads, 1.0))
    assert found == [found[0]] * 4


@every_dtype
def test_threads_do_not_change_a_clipped_step(dtype, kernels, step_threads):
    found = []
    for threads in (1, 2, 4):
        torch.manual_seed(SEED)
        step_threads(threads)
        params = params_of([300_001, 5, 70_000], dtype)
        opt = fusedopt.Adam(params, max_grad_norm=0.1)
        for _ in range(2):
            set_grads(params)
            opt.step()
        found.append(outcome(opt))
    assert_same_outcome(found[0], found[1])
    assert_same_outcome(found[0], found[2])


def norms():
    """Of ordinary and special gradients; the same in every process."""
    torch.manual_seed(20)
    found = {}
    for dtype, special in product(DTYPES, (False, True)):
        for n in NORM_SIZES:
            grad = values_of(n, dtype, special)
            grad = grad.masked_fill(~grad.isfinite(), 1e-3) if n % 2 else grad
            norm = measured([grad, grad[: n // 2]], 1.0)[0][-1].hex()
            found[f"{dtype}, {special}, {n}"] = norm
    return found


# More than 2^32 -------------------------------------------------------------------------------


@contextmanager
def repeated(pattern, numel):
    """A tensor of ``numel`` elements in little memory: after the pattern it begins again, because
    the same pages are mapped again. What writes one element writes all its copies."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    size, period = numel * pattern.itemsize, pattern.nbytes
    whole = math.ceil(size / period) * period
    read_write, shared, fixed, private, anonymous, no_reserve = 3, 1, 0x10, 2, 0x20, 0x4000
    failed = ctypes.c_void_p(-1).value
    base = libc.mmap(None, whole, 0, private | anonymous | no_reserve, -1, 0)
    if base == failed:
        pytest.skip("not enough address space")
    pages = os.memfd_create("pattern")
    try:
        os.truncate(pages, period)
        for at in range(0, whole, period):
            assert libc.mmap(base + at, period, read_write, shared | fixed, pages, 0) != failed
        tensor = torch.frombuffer((ctypes.c_char * size).from_address(base), dtype=pattern.dtype)
        tensor[: len(pattern)] = pattern
        yield tensor
    finally:
        os.close(pages)
        libc.munmap(base, whole)


linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
# No divisor of 2^32: were an offset cut to 32 bits, other elements would be touched.
PERIOD = 48 * 2**20


@linux
@pytest.mark.parametrize(
    ("backend", "dtype", "numel"),
    [
        ("native", torch.bfloat16, 2**32 + 12345),
        ("kernels", torch.float64, 2**29 + 12345),
        ("kernels", torch.bfloat16, 2**32 + 12345),
    ],
    indirect=["backend"],
    ids=str,
)
def test_offsets_beyond_32_bits(backend, dtype, numel, step_threads):
    """Bytes beyond 2^32, and elements beyond 2^32. Counts how often each element is updated."""
    if backend == "kernels" and numel > 2**32 and not os.environ.get("FUSEDOPT_TEST_LARGE"):
        pytest.skip("takes half a minute; set FUSEDOPT_TEST_LARGE=1")
    step_threads(1)
    period = PERIOD // dtype.itemsize
    with (
        repeated(torch.zeros(period, dtype=dtype), numel) as values,
        repeated(torch.ones(PERIOD // 16 // dtype.itemsize, dtype=dtype), numel) as grad,
    ):
        param = values.requires_grad_()
        param.grad = grad
        opt = fusedopt.SGD([param], lr=1.0)
        opt.step()
        full, rest = divmod(numel, period)
        found = param.detach()[:period]
        assert (found[:rest] == -full - 1).all()
        assert (found[rest:] == -full).all()
        del param.grad, param, opt, found


@linux
@pytest.mark.parametrize("backend", ["native", "kernels"], indirect=True)
def test_norm_beyond_32_bits(backend):
    """Of so many elements that their count does not fit into 32 bits; the sum is exact."""
    numel, period = 2**32 + 12345, PERIOD // 2
    pattern = torch.ones(period, dtype=torch.bfloat16)
    pattern[: period // 4] = 2
    full, rest = divmod(numel, period)
    with repeated(pattern, numel) as grad:
        norm = next(iter(grad_norm.GradNorm().measure([grad]).values()))[grad_norm.NORM].item()
    squares = [full * pattern.double().square().sum(), pattern[:rest].double().square().sum()]
    assert norm == math.sqrt(sum(squares))
