"""``fusedopt.patch()``: torch.optim's names for our classes, and back."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle

import pytest
import torch
from cases import RICHEST_OF, TORCH_NAMES, bits, draw, every_torch_name, snapshot, step_through
from conftest import skip_or_fail
from torch import nn
from torch.optim import lr_scheduler

import fusedopt
from conversion import Run, assert_alike, drawn

STOCK = {name: getattr(torch.optim, name) for name in TORCH_NAMES}
OURS = {name: getattr(fusedopt, name) for name in TORCH_NAMES}


def names():
    return {name: getattr(torch.optim, name) for name in TORCH_NAMES}


@pytest.fixture(autouse=True)
def restored():
    yield
    for name, cls in STOCK.items():
        setattr(torch.optim, name, cls)


def test_patch_and_unpatch():
    fusedopt.unpatch()
    assert names() == STOCK
    for _ in range(2):
        fusedopt.patch()
        assert names() == OURS
    for _ in range(2):
        fusedopt.unpatch()
        assert names() == STOCK


def test_patch_nests():
    with fusedopt.patch():
        with fusedopt.patch():
            assert names() == OURS
        assert names() == OURS
        with pytest.raises(ZeroDivisionError), fusedopt.patch():
            raise ZeroDivisionError
        assert names() == OURS
    assert names() == STOCK
    fusedopt.patch()
    with fusedopt.patch():
        pass
    assert names() == OURS
    fusedopt.unpatch()


def test_patch_ends_with_an_exception():
    with pytest.raises(ZeroDivisionError), fusedopt.patch():
        assert names() == OURS
        raise ZeroDivisionError
    assert names() == STOCK


def test_patch_again():
    patched = fusedopt.patch()
    fusedopt.unpatch()
    for _ in range(2):
        with patched:
            assert names() == OURS
        assert names() == STOCK
    with fusedopt.patch():
        fusedopt.unpatch()
        assert names() == STOCK
    assert names() == STOCK


def test_patch_restores_what_it_found():
    """Also a name that somebody had set by hand."""
    torch.optim.AdamW = fusedopt.AdamW
    with fusedopt.patch():
        assert names() == OURS
    assert names() == {**STOCK, "AdamW": fusedopt.AdamW}
    fusedopt.unpatch()
    assert names() == STOCK


@pytest.mark.parametrize(
    "foreign",
    [type("Mine", (STOCK["AdamW"],), {}), functools.partial(STOCK["AdamW"], lr=0.1), None],
    ids=["class", "partial", "None"],
)
@pytest.mark.parametrize("name", ["Adam", "Adagrad", "RMSprop"])
def test_names_that_other_code_has_replaced(foreign, name):
    for change in (fusedopt.patch, fusedopt.unpatch):
        before = {**names(), name: foreign}
        setattr(torch.optim, name, foreign)
        with pytest.raises(RuntimeError, match=rf"torch.optim.{name} is .*other code has replaced"):
            change()
        assert names() == before
        setattr(torch.optim, name, STOCK[name])
        fusedopt.patch()
    with pytest.raises(RuntimeError, match="other code has replaced"), fusedopt.patch():
        setattr(torch.optim, name, foreign)
    assert names() == {**OURS, name: foreign}


@every_torch_name
def test_construction_while_patched(name, backend):
    """With positional arguments, as other code writes it."""
    signature = inspect.signature(STOCK[name].__init__).parameters.values()
    defaults = [p.default for p in signature if p.kind is p.POSITIONAL_OR_KEYWORD][2:]
    values, grads = draw([(3,), (4, 5)], 3)
    with fusedopt.patch():
        params = [v.clone() for v in values]
        opt = getattr(torch.optim, name)(params, 0.05, *defaults[1:])
        step_through(opt, params, grads)
    assert type(opt) is getattr(fusedopt, name)
    params = [v.clone() for v in values]
    expected = getattr(fusedopt, name)(params, lr=0.05)
    step_through(expected, params, grads)
    assert snapshot(opt) == snapshot(expected)


@every_torch_name
def test_stock_optimizers_while_patched(name, backend):
    values, grads = drawn(6)
    case = RICHEST_OF[name]
    expected = Run(case, "torch", values).go(grads)
    run = Run(case, "torch", values).go(grads[:2])
    with fusedopt.patch():
        run.go(grads[2:3])
        twins = [copy.deepcopy(run), pickle.loads(pickle.dumps(run))]
        pickled = pickle.dumps(run)
        assert isinstance(run.opt, torch.optim.Optimizer)
        assert not isinstance(run.opt, getattr(torch.optim, name))
    for twin in (run, *twins, pickle.loads(pickled)):
        assert type(twin.opt) is STOCK[name]
        assert_alike(twin.go(grads[3:]), expected)
        with fusedopt.patch():
            assert type(fusedopt.from_torch(twin.opt)) is OURS[name]
            assert type(fusedopt.to_torch(twin.opt)) is STOCK[name]


@every_torch_name
def test_what_is_made_while_patched_outlives_it(name, backend):
    values, grads = drawn(4)
    case = RICHEST_OF[name]
    expected = Run(case, "fusedopt", values).go(grads)
    with fusedopt.patch():
        run = Run(case, "torch", values).go(grads[:2])
        pickled = pickle.dumps(run)
    for twin in (run, pickle.loads(pickled)):
        assert type(twin.opt) is OURS[name]
        assert snapshot(twin.go(grads[2:]).opt) == snapshot(expected.opt)


@every_torch_name
def test_classes_that_inherit_while_patched(name, backend):
    with fusedopt.patch():

        class Theirs(getattr(torch.optim, name)):
            def __init__(self, params, lr):
                super().__init__(params, lr)

            def step(self, closure=None):
                self.steps = getattr(self, "steps", 0) + 1
                return super().step(closure)

    values, grads = draw([(3,)], 2)
    params = [v.clone() for v in values]
    opt = Theirs(params, 0.05)
    step_through(opt, params, grads)
    assert isinstance(opt, getattr(fusedopt, name)) and opt.steps == 2
    twins = [v.clone() for v in values]
    step_through(getattr(fusedopt, name)(twins, lr=0.05), twins, grads)
    assert bits(params[0]) == bits(twins[0])


def test_schedulers_and_checkpoints_while_patched(backend):
    """torch's own code asks for its base class only."""
    values, grads = drawn(6)
    case = RICHEST_OF["AdamW"]
    expected = Run(case, "torch", values)
    schedule = lr_scheduler.StepLR(expected.opt, 2, 0.5)
    with fusedopt.patch():
        run = Run(case, "torch", values)
        scheduler = lr_scheduler.StepLR(run.opt, 2, 0.5)
        for at, now in enumerate(grads):
            run.go([now])
            scheduler.step()
            expected.go([now])
            schedule.step()
            if at == 2:
                run.opt.load_state_dict(copy.deepcopy(expected.opt.state_dict()))
    assert_alike(run, expected)


def test_transformers_trainer(tmp_path):
    """The Trainer makes its optimizer itself."""
    try:
        import accelerate  # noqa: F401
        import transformers
    except ImportError as error:
        skip_or_fail(f"{error}; pip install 'fusedopt[interop]'")

    def trainer(optim):
        arguments = transformers.TrainingArguments(
            str(tmp_path), optim=optim, use_cpu=True, report_to=[], learning_rate=0.01
        )
        torch.manual_seed(0)
        return transformers.Trainer(nn.Linear(3, 2), arguments)

    for optim, name in [
        ("adamw_torch", "AdamW"),
        ("adamw_torch_fused", "AdamW"),
        ("sgd", "SGD"),
        ("rmsprop", "RMSprop"),
        ("adagrad", "Adagrad"),
    ]:
        with fusedopt.patch():
            opt = trainer(optim).create_optimizer()
        expected = trainer(optim).create_optimizer()
        assert type(opt) is OURS[name] and type(expected) is STOCK[name]
        assert snapshot(opt) == snapshot(expected)
