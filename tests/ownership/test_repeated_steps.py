"""Steps that take the list of work of the one before them, and what must make them look again."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import seam
import torch
from cases import bits, gradient_like, leaf, richest, snapshot

import fusedopt
from fusedopt import torch_layout

SHAPES = [(64,), (3, 5), (), (0,), (2, 3, 4, 5, 6), (4, 4), (64,), (5,)]
REST = [7]  # have no gradient until something has moved


class Run(NamedTuple):
    params: list[torch.Tensor]
    opt: Any


def state_of(run: Run, p: int = 0) -> dict[str, Any]:
    return run.opt.state[run.params[p]]


def first_state(run: Run) -> str:
    """Of the tensors like the parameter; its count where there is none."""
    names = [n for n, v in state_of(run).items() if v.shape == run.params[0].shape]
    return next(iter(names), "step")


def set_count(run: Run) -> None:
    if "step" in state_of(run):
        state_of(run)["step"].fill_(40)


def replace_state(run: Run) -> None:
    for name, value in state_of(run).items():
        state_of(run)[name] = value.clone()


def reorder_state(run: Run) -> None:
    state = run.opt.state
    state[run.params[0]] = dict(reversed(list(state.pop(run.params[0], {}).items())))


def new_state(run: Run) -> None:
    run.opt.state[run.params[1]] = {}


def move_state(run: Run) -> None:
    for value in state_of(run).values():
        value.data = value.data.clone()


def resize_and_back(run: Run) -> None:
    storage = run.params[0].untyped_storage()
    values = run.params[0].detach().clone()
    storage.resize_(4000)
    storage.resize_(storage.nbytes() // 2)
    run.params[0].detach().copy_(values)


def swap(run: Run) -> None:
    torch.utils.swap_tensors(run.params[0], leaf(run.params[0].detach() * 2))


def new_group(run: Run) -> None:
    run.opt.add_param_group({"params": [leaf(torch.ones(3))]})
    run.opt.param_groups[-1]["params"][0].grad = torch.ones(3)


def other_param(run: Run) -> None:
    other = leaf(run.params[0].detach() * 2)
    run.opt.param_groups[0]["params"][0] = other
    other.grad = torch.ones_like(other)


def option(name: str, value: Any) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        for group in run.opt.param_groups:
            group[name] = value

    return change


def in_place(run: Run) -> None:
    """Options that change without the dict of their group."""
    for group in run.opt.param_groups:
        group["lr"] = torch.tensor(0.02)
    run.opt.step()
    run.opt.step()
    for group in run.opt.param_groups:
        group["lr"].fill_(0.03)


MOVES: dict[str, Callable[[Run], Any]] = {
    "nothing": lambda run: None,
    "data": lambda run: setattr(run.params[0], "data", run.params[0].data * 2),
    "data of another dtype": lambda run: setattr(
        run.params[1], "data", run.params[1].data.to(torch.float16)
    ),
    "set_": lambda run: run.params[0].detach().set_(torch.ones(64)),
    "storage resized and back": resize_and_back,
    "swap": swap,
    "shared": lambda run: run.params[0].detach().share_memory_(),
    "frozen and back": lambda run: run.params[0].requires_grad_(False).requires_grad_(),
    "count": set_count,
    "state replaced": replace_state,
    "state reordered": reorder_state,
    "state anew": new_state,
    "state moved": move_state,
    "state zero": lambda run: state_of(run).update(
        {first_state(run): torch.zeros_like(state_of(run).get(first_state(run), torch.ones(())))}
        if state_of(run)
        else {}
    ),
    "new group": new_group,
    "other parameter": other_param,
    "lr": option("lr", 0.5),
    "lr of one group": lambda run: run.opt.param_groups[1].update(lr=0.5),
    "lr in place": in_place,
    "lr that is int": option("lr", 1),
    "weight decay": option("weight_decay", 0.3),
    "maximize": option("maximize", True),
    "group replaced": lambda run: run.opt.param_groups.__setitem__(
        0, {**run.opt.param_groups[0], "lr": 0.25}
    ),
    "loaded": lambda run: run.opt.load_state_dict(run.opt.state_dict()),
    "clipped": lambda run: setattr(run.opt, "max_grad_norm", 0.5),
}


def set_grads(run: Run) -> None:
    for i, p in enumerate(run.params):
        if i not in REST:
            p.grad = gradient_like(p)


def the_parameter_and_back(run: Run) -> None:
    grad = run.params[0].grad
    run.params[0].grad = run.params[0].detach().requires_grad_()
    run.opt.step()
    run.params[0].grad = grad


GRADS: dict[str, Callable[[Run], Any]] = {
    "none": lambda run: setattr(run.params[0], "grad", None),
    "transposed": lambda run: setattr(run.params[5], "grad", gradient_like(run.params[5]).t()),
    "expanded": lambda run: setattr(run.params[0], "grad", torch.ones(()).expand(64)),
    "with an offset": lambda run: setattr(run.params[0], "grad", torch.randn(99)[7:71]),
    "negated": lambda run: setattr(run.params[0], "grad", torch._neg_view(torch.randn(64))),
    "sparse": lambda run: setattr(
        run.params[0], "grad", torch.sparse_coo_tensor([[1, 5]], [1.0, 2.0], (64,))
    ),
    "the parameter": lambda run: setattr(run.params[0], "grad", run.params[0].detach()),
    "the parameter and back": the_parameter_and_back,
    "another parameter": lambda run: setattr(run.params[0], "grad", run.params[6].detach()),
    "of another's memory": lambda run: setattr(
        run.params[0], "grad", torch.from_numpy(run.params[4].detach().numpy()).view(-1)[:64]
    ),
    "read by others": lambda run: run.params[0].grad.numpy(),
    "in place": lambda run: run.params[0].grad.mul_(2),
    "resized": lambda run: run.params[0].grad.untyped_storage().resize_(1024),
    "of inference": lambda run: setattr(run.params[0], "grad", inference_grad()),
}


def inference_grad() -> torch.Tensor:
    with torch.inference_mode():
        return torch.full((64,), 0.5)


def outcome(case: Any, move: Callable[[Run], Any], new_each: bool, seed: int) -> Any:
    """All bits after some steps, and whether the steps before the move were repeated."""
    torch.manual_seed(seed)
    params = [leaf(torch.randn(shape)) for shape in SHAPES]
    opt = case.ours([{"params": params[:3]}, {"params": params[3:]}])
    run = Run(params, opt)
    set_grads(run)
    for _ in range(4):
        if new_each:
            set_grads(run)
        opt.step()
    repeated = seam.has_repeated(opt)
    if new_each:
        set_grads(run)
    seen = []
    for at in range(3):
        try:
            if at == 0:
                move(run)
            opt.step()
        except RuntimeError as error:
            seen.append(str(error))
        seen.append(snapshot(opt) if at else [bits(p) for p in params])
        for p in params:
            if p.grad is None or p.grad.dtype != p.dtype or p.grad.is_inference():
                p.grad = gradient_like(p)
    return seen, repeated


def assert_same_without(module: Any, case: Any, move: Callable[[Run], Any], new_each: bool) -> None:
    seed = int(torch.randint(1 << 30, ()))
    found, repeated = outcome(case, move, new_each, seed)
    assert repeated
    for what in torch_layout.WHAT:
        module.forget_layout(what)
    expected, repeated = outcome(case, move, new_each, seed)
    assert not repeated
    assert found == expected


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@richest
def test_what_moves_between_steps(module, case, move):
    assert_same_without(module, case, move, new_each=False)


@pytest.mark.parametrize("new_each", [False, True], ids=["in place", "anew"])
@pytest.mark.parametrize("move", GRADS.values(), ids=GRADS)
@richest
def test_other_gradients(module, case, move, new_each):
    assert_same_without(module, case, move, new_each)


@pytest.mark.parametrize("resting", [[39], [0, 15, 31, 39], [*range(16, 40)], [*range(1, 40)]])
def test_tensors_move_while_others_rest(module, resting):
    """Wherever those are among many; each of the tensors of one that steps is looked at."""
    params = [leaf(torch.randn(4)) for _ in range(40)]
    opt = fusedopt.Adam(params)
    for moved in sorted({*range(40)} - {*resting})[:: max(1, 10 - len(resting))]:
        for name in ["exp_avg", "step", None]:
            for i, p in enumerate(params):
                p.grad = None if i in resting else torch.randn(4)
            for _ in range(3):
                opt.step()
            assert seam.has_repeated(opt)
            tensor = params[moved] if name is None else opt.state[params[moved]][name]
            before = tensor.detach()
            tensor.data = before.clone()
            old = bits(before)
            opt.step()
            assert bits(before) == old, "the memory that it was in before is written"
            assert bits(tensor) != old


def test_gradients_go_in_another_thread():
    """Whichever a step finds, it is whole: nobody frees it while a short step reads it."""
    interval = sys.getswitchinterval()
    params = [leaf(torch.ones(64)) for _ in range(200)]
    opt = fusedopt.SGD(params, lr=0.0625)
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            for p in params:
                p.grad = torch.ones(64)

    for p in params:
        p.grad = torch.ones(64)
    thread = threading.Thread(target=replace)
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        repeated = 0
        for _ in range(500):
            opt.step()
            repeated += seam.has_repeated(opt)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert repeated > 0
    for p in params:
        assert p.tolist() == [1 - 0.0625 * 500] * 64


@richest
def test_steps_of_a_bucket_that_is_reached_in_part(case):
    """Between two whole ones, which do not follow each other."""
    values = [torch.randn(64) for _ in range(40)]
    weights = [torch.randn(64) for _ in values]
    whole, part = range(len(values)), range(0, len(values), 3)
    passes = [whole, whole, whole, whole, part, whole, whole, part, part, whole]

    def backward(params: list[torch.Tensor], reached: range) -> None:
        torch.stack([(params[i] * weights[i]).sum() for i in reached]).sum().backward()

    attached, plain = ([leaf(v.clone()) for v in values] for _ in range(2))
    kept = fusedopt.attach(attached, getattr(fusedopt, case.name), **copy.deepcopy(case.options))
    assert kept.param_groups
    opt = case.ours(plain)
    for reached in passes:
        backward(attached, reached)
        backward(plain, reached)
        opt.step()
        opt.zero_grad()
        assert [bits(p) for p in attached] == [bits(p) for p in plain]
