"""What the other tests here do with gloo on the CPU, with NCCL on GPUs."""

from __future__ import annotations

import inspect

import pytest
import test_ddp as ddp
import test_fsdp as fsdp
import test_zero as zero
import torch
from cases import richest
from worlds import on_world

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
both = pytest.mark.parametrize("switch", [False, True])


def on_gpus(ranks, test, **arguments):
    arguments |= {"backend": "native", "native": None, "device": "cuda"}
    takes = inspect.signature(test).parameters
    on_world(ranks, test, {name: value for name, value in arguments.items() if name in takes})


@richest
@both
def test_ddp(case, switch, native):
    on_gpus(2, ddp.test_is_stock_and_one_process, case=case, bucket_view=switch)
    on_gpus(2, ddp.test_grad_scaler, case=case, amp_fused=switch)


@richest
def test_ddp_clipping(case, native):
    on_gpus(2, ddp.test_clipping, case=case)


@fsdp.layouts_and_cases
@pytest.mark.parametrize("test", [fsdp.test_is_one_process, fsdp.test_clipping, fsdp.test_attach])
def test_fsdp(test, layout, case, native):
    on_gpus(layout.size, test, layout=layout, case=case)


@richest
def test_fsdp_on_two(case, native):
    layout = fsdp.LAYOUTS["fsdp_2"]
    on_gpus(2, fsdp.test_mixed_precision_policy, case=case, size=2)
    on_gpus(2, fsdp.test_flags_that_stock_refuses, case=case, layout=layout)
    on_gpus(2, fsdp.test_cpu_offload, case=case)
    for use_orig_params in (True, False):
        on_gpus(2, fsdp.test_flat_parameters, case=case, use_orig_params=use_orig_params)
    for amp_fused in (True, False):
        on_gpus(2, fsdp.test_grad_scaler, case=case, layout=layout, amp_fused=amp_fused)


@richest
@both
def test_zero(case, switch, native):
    on_gpus(2, zero.test_is_stock_and_one_process, size=2, case=case, bucket_view=switch)
