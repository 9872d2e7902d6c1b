"""transformers.Trainer."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

import fusedopt
from interop import ADAMW, Recording, assert_same, every_case, ours, package, two_cases

transformers = package("transformers")
package("accelerate")

VOCABULARY, STEPS = 23, 6


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection():
    """The Trainer collects garbage when it starts, over all that was ever imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def data():
    rows = torch.randint(VOCABULARY, (48, 8))
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.fixture
def model():
    """Without biases: the gradient of a key's bias is nothing but rounding errors."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    return transformers.LlamaForCausalLM(config).double()


@pytest.fixture
def trainer(model, data, tmp_path):
    """Makes a Trainer of a copy of the model: two batches per step, clipping."""

    def make(**more):
        arguments = {
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 0.4,
            "warmup_steps": 3,
            "lr_scheduler_type": "cosine",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
        }
        build = more.pop("build", None)
        given = {key: more.pop(key, None) for key in ("optimizer_cls_and_kwargs", "callbacks")}
        made = copy.deepcopy(model).to(torch.float32 if more.get("bf16") else torch.float64)
        if build:
            optimizer = build(decayed_and_not(made))
            schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 3, STEPS)
            given["optimizers"] = (optimizer, schedule)
        made = transformers.Trainer(
            made,
            transformers.TrainingArguments(str(tmp_path), **arguments | more),
            train_dataset=data,
            **given,
        )
        made.remove_callback(transformers.PrinterCallback)
        return made

    return make


def decayed_and_not(model):
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def trained(trainer, checkpoint=None):
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == STEPS
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in log],
        "norms": [entry.get("grad_norm") for entry in log],
        "rates": [entry["learning_rate"] for entry in log],
        "weights": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
    }


def assert_same_but_for_norms(ours, stock):
    """The Trainer measures them, and here it finds no gradients or does not clip."""
    assert_same(ours | {"norms": None}, stock | {"norms": None})


@every_case
def test_optimizers(case, trainer):
    assert_same(trained(trainer(build=ours(case))), trained(trainer(build=case.stock)))


@every_case
def test_optimizer_cls_and_kwargs(case, trainer):
    results = []
    for module in (fusedopt, torch.optim):
        cls, kwargs = getattr(module, case.name), {"foreach": False, **case.options}
        made = trainer(optimizer_cls_and_kwargs=(cls, kwargs))
        results.append(trained(made))
        assert made.optimizer.optimizer.__class__ is cls
    assert_same(*results)


@every_case
def test_resuming_in_the_middle(case, trainer, tmp_path):
    """From checkpoints of fusedopt and of stock."""
    checkpoint = str(tmp_path / "checkpoint-3")
    expected = trained(trainer(build=ours(case), save_strategy="steps", save_steps=3))
    assert_same(trained(trainer(build=ours(case)), checkpoint), expected)
    trained(trainer(build=case.stock, save_strategy="steps", save_steps=3))
    assert_same(trained(trainer(build=ours(case)), checkpoint), expected)


@every_case
def test_bfloat16(case, trainer):
    made = trainer(build=ours(case), bf16=True)
    recording = Recording(made.optimizer)
    losses = trained(made)["losses"]
    assert all(p.dtype == torch.float32 for p in recording.params)
    assert len(recording.steps) == STEPS
    recording.assert_stock_agrees(case.stock)
    stock = trained(trainer(build=case.stock, bf16=True))["losses"]
    assert_same(losses, stock, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad"])
def test_patch(name, trainer):
    """``TrainingArguments.optim`` names classes of torch's."""
    more = {"optim": name, "learning_rate": 0.01, "weight_decay": 0.1}
    with fusedopt.patch():
        made = trainer(**more)
        result = trained(made)
    assert type(made.optimizer.optimizer).__module__.startswith("fusedopt")
    assert_same(result, trained(trainer(**more)))


class Convert(transformers.TrainerCallback):
    """After the third step the optimizer becomes one of fusedopt's."""

    def on_step_end(self, arguments, state, control, optimizer, lr_scheduler, **_):
        if state.global_step == 3:
            fusedopt.from_torch(optimizer.optimizer, lr_scheduler)


@two_cases
def test_from_torch(case, trainer):
    made = trainer(build=case.stock, callbacks=[Convert()])
    result = trained(made)
    assert type(made.optimizer.optimizer) is getattr(fusedopt, case.name)
    assert_same(result, trained(trainer(build=case.stock)))


@two_cases
def test_attach(case, trainer):
    """Without accumulation and clipping, which need whole gradients."""

    def attached(params):
        cls = getattr(fusedopt, case.name)
        return fusedopt.attach(params, cls, foreach=False, **case.options)

    more = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
    assert_same_but_for_norms(
        trained(trainer(build=attached, **more)), trained(trainer(build=case.stock, **more))
    )


def test_max_grad_norm(trainer):
    """The option takes the place of ``TrainingArguments.max_grad_norm``."""
    mine = trainer(build=lambda p: ours(ADAMW)(p, max_grad_norm=0.4), max_grad_norm=0.0)
    assert_same_but_for_norms(trained(mine), trained(trainer(build=ADAMW.stock)))
