"""The body of the GPU's kernels, run on the CPU over all blocks and threads, gives the bits of the
CPU path. What is left for a GPU to prove: alignment of its loads, streams, graphs, memory order."""

from __future__ import annotations

import math
import random
from contextlib import contextmanager
from itertools import pairwise, product
from unittest import mock

import pytest
import torch
from cases import CASES, DTYPES, RICHEST, Case, bits, snapshot
from conftest import SEED
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from test_native import script

import fusedopt
from fusedopt.grad_norm import FACTOR, NORM, SKIP, GradNorm

pytestmark = pytest.mark.usefixtures("kernels")
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
    "3 and count": (RICHEST[4], 3, (32, 48, 64)),
    "4 and count": (Case("Adam", {"lr": 0.1, "weight_decay": 0.1}), 4, (48, 96, 112)),
    "5 and count": (RICHEST[1], 5, (48, 96, 112)),
    "5, centered": (RICHEST[3], 5, (48, 80, 80)),
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
    found = {}
    for g, group in enumerate(opt.param_groups):
        for i, p in enumerate(group["params"]):
            where = f"group {g}, parameter {i} ({p.numel()} x {p.dtype})"
            found[where] = canonical(p)
            for key, value in opt.state.get(p, {}).items():
                found[f"{key} of {where}"] = canonical(value)
    if opt.grad_norm is not None:
        found["grad_norm"] = canonical(opt.grad_norm)
    return found


def assert_same(kernels, run):
    """``run`` makes and steps an optimizer, and gets whether the kernels do it. Both end alike."""
    number = random.randrange(2**31)
    found = []
    for module in (fusedopt.backend.native, kernels):
        torch.manual_seed(number)
        random.seed(number)
        with running(module):
            found.append(outcome(run(module is kernels)))
    assert found[0].keys() == found[1].keys()
    assert not [key for key, value in found[0].items() if value != found[1][key]]


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
            keys = [key for key in opt.state.get(params[0], {}) if key != "step"]
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
            for p, key in ((p, key) for p in params for key in opt.state.get(p, {})):
                if at == 0 and key != "step":
                    state = opt.state[p][key].to(random.choice(FLOATS))
                    opt.state[p][key] = Memory([state], [random.choice([0, 0, 0, 4])]).views[0]
        return opt

    assert_same(kernels, run)


def test_loaded_float32_moments_of_half_parameters(kernels):
    def run(_):
        wide = params_of(TAILS + AROUND_BLOCKS, torch.float32)
        first = RICHEST[1].ours(wide)
        set_grads(wide)
        first.step()
        params = [p.detach().to(torch.bfloat16).requires_grad_() for p in wide]
        opt = RICHEST[1].ours(params)
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
    pointers = num_pointers + (kind == "capturable" and case.name != "SGD")
    update_bytes = sizes[("float32", "float64", "capturable").index(kind)]
    dtype = torch.float64 if kind == "float64" else torch.float32

    def tables(n):
        return num_tables([(1, 0 if shared else i) for i in range(n)], pointers, update_bytes)

    limits = [n for n in range(1, 3000) if tables(n) < tables(n + 1)][:2]
    for number in (limits[0], limits[0] + 1, limits[1] + 1):

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


@st.composite
def lists(draw):
    """Runs of tensors of one size, cut into groups, and which of them get a gradient when."""
    sizes = [0, 1, 2, 5, 8, 17, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3]
    kind = draw(st.sampled_from(["few", "many", "all alone", "late"]))
    runs = []
    for _ in range(draw(st.integers(1, 6))):
        size = draw(st.sampled_from(sizes))
        most = 5 if size > 100 else 700
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
    group_of = [g for g, n in enumerate(group_sizes) for _ in range(n)]
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
            tensors = [
                (
                    chunks_of(sizes[i], capturable),
                    (group_of[i], min(steps[i], 1) if capturable else steps[i] * stateful),
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
