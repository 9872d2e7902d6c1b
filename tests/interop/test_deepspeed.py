"""DeepSpeed ZeRO with an optimizer of ours, in one process and in two."""

from __future__ import annotations

import copy
import os
import socket

import pytest
import torch
from cases import RICHEST
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

from interop import assert_same, ours

pytest.importorskip("deepspeed")

STEPS, ROWS = 6, 8
# float32, as ZeRO wants; a few roundings per step, which the model enlarges.
NEAR = {"rtol": 1e-3, "atol": 1e-4}


def engine(build, model, stage, **config):
    import deepspeed

    model = copy.deepcopy(model)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = build([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    made, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=ExponentialLR(optimizer, 0.9),
        config={
            "train_micro_batch_size_per_gpu": ROWS // torch.distributed.get_world_size(),
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.5,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            **config,
        },
    )
    assert made.optimizer.optimizer is optimizer
    return made


def train(engine, batches):
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses = []
    for batch in batches:
        inputs, targets = (t.chunk(world)[rank].to(next(engine.parameters())) for t in batch)
        loss = (engine(inputs) - targets).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, {k: v.float() for k, v in engine.module.state_dict().items()}, engine.get_lr()


def compare(rank, world, port, seed, folder):
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    import deepspeed

    torch.set_num_threads(1)
    torch.manual_seed(seed)  # the same model and data on all ranks
    deepspeed.init_distributed("gloo", verbose=False)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    batches = [(torch.randn(ROWS, 6), torch.randn(ROWS, 3)) for _ in range(2 * STEPS)]
    # Of any Adagrad, ZeRO makes a torch.optim.Adagrad of its own.
    for case in (case for case in RICHEST if not case.table.makes_state_at_once):

        def run(build, **config):
            return train(engine(build, model, **config), batches)

        for stage in (1, 2):
            expected = run(case.stock, stage=stage)
            assert_same(run(ours(case), stage=stage), expected, **NEAR)
        # From a checkpoint of stock.
        half = engine(case.stock, model, stage)
        losses, *_ = train(half, batches[:STEPS])
        half.save_checkpoint(folder)
        resumed = engine(ours(case), model, stage)
        resumed.load_checkpoint(folder)
        more, *end = train(resumed, batches[STEPS:])
        assert_same((losses + more, *end), expected, **NEAR)
        # Parameters in bfloat16; ZeRO gives the optimizer float32 copies.
        runs = [run(build, stage=2, bf16={"enabled": True}) for build in (ours(case), case.stock)]
        assert_same(*runs, rtol=0.05, atol=0.05)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_zero(world, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(
        compare, (world, port, torch.initial_seed(), str(tmp_path)), nprocs=world
    )
