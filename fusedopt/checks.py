"""Whether the tensors of a parameter can be updated: each check raises a Problem that says why not.

State that is alive and state that is being loaded go through the same checks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backend, dtensor, formats, memory, options, stock_step, tensor_kinds
from .problem import Problem
from .record import Record
from .rule import STEP, STORAGE_OPTIONS, Scalar, Slot

# Steps are counted up to here: adding 1 no longer changes a float64.
LAST_STEP = 2**53


def check(record: Record) -> None:
    """Raises a Problem if the parameter, its gradient or its state cannot be updated."""
    param, grad, state = record.param, record.grad, record.state
    left_to_torch = stock_step.concerns(param, grad, state)
    check_param(record, left_to_torch)
    if left_to_torch:
        stock_step.check(record)
    check_grad(record)
    if state is not None and not isinstance(state, dict):
        raise Problem(TypeError, f"its state is a {type(state).__name__}, not a dict")
    check_storage(record)
    if state:
        check_state(record, state, left_to_torch)
    options.check_numbers(record)


def check_param(record: Record, left_to_torch: bool) -> None:
    param, group = record.param, record.group
    if not (param.is_floating_point() or param.is_complex()):
        raise Problem(
            TypeError,
            "only floating point and complex parameters can be optimized; leave it out of the "
            "optimizer or convert it",
        )
    if param.device.type == "meta":
        raise Problem(ValueError, "a meta tensor has no data; materialize it with to_empty() first")
    if param.is_inference() and not torch.is_inference_mode_enabled():
        raise Problem(RuntimeError, "it was made in inference mode; clone() it outside")
    if (problem := memory.problem(param)) is not None:
        raise Problem(RuntimeError, f"it {problem}")
    if not (left_to_torch and record.is_unusual) and _overlaps_itself(record.held):
        raise Problem(
            ValueError,
            "several of its elements share one memory location (an expanded tensor?); clone() it "
            "before optimizing",
        )
    if group.get("capturable") and not backend.is_accelerator(param.device):
        raise Problem(
            RuntimeError,
            "If capturable=True, params and state_steps must be on an accelerator; set "
            "capturable=False for parameters on the CPU",
        )
    if group.get("fused") and not param.is_floating_point():
        raise Problem(
            RuntimeError,
            "`fused=True` requires all the params to be floating point Tensors; leave fused unset "
            "for complex parameters",
        )
    dtensor.check_param(param)


def check_grad(record: Record) -> None:
    param, grad = record.param, record.grad
    if record.has_sparse_grad:
        _check_sparse_grad(record)
    if tensor_kinds.shape(grad) != tensor_kinds.shape(param):
        raise Problem(
            ValueError,
            f"its grad has shape {tensor_kinds.shape(grad)}; set grad to None and run backward "
            "again",
        )
    if grad.device != param.device:
        raise Problem(ValueError, f"its grad is on {grad.device}; move both to one device")
    if (problem := memory.reading_problem(grad)) is not None:
        raise Problem(RuntimeError, f"its grad {problem}")
    if not _is_number_like(grad, param):
        raise Problem(
            TypeError, f"its grad has dtype {grad.dtype}; set it to a grad of matching kind"
        )
    dtensor.check_grad(param, grad)


def _check_sparse_grad(record: Record) -> None:
    grad, group, rule = record.grad, record.group, record.rule
    # Here torch's loop decides.
    unusual = record.is_unusual or tensor_kinds.has_own_operators(grad)
    if not (rule.sparse_update if grad.layout is torch.sparse_coo else unusual):
        name = type(record.members.optimizer).__name__
        raise Problem(RuntimeError, f"{name} does not support sparse gradients{rule.sparse_advice}")
    on = ["weight_decay"] * bool(group["weight_decay"] != 0 and not unusual)
    on += [name for name in STORAGE_OPTIONS if group.get(name) is not None]
    on += ["l1"] * bool(group.get("l1"))
    if on:
        raise Problem(RuntimeError, f"{on[0]} option is not compatible with sparse gradients")


def check_storage(record: Record) -> None:
    """Raises a Problem if the parameter cannot be stored as its group declares."""
    if record.param.dtype != torch.float16:
        return
    if record.group.get("master_weights") == "split":
        raise Problem(ValueError, "master_weights='split' is for bfloat16; use 'fp32' for float16")
    if record.group.get("rounding"):
        raise Problem(
            ValueError, "rounding='stochastic' is for bfloat16; use master_weights='fp32'"
        )


# State --------------------------------------------------------------------------------------------


def check_state(record: Record, state: dict[str, Any], left_to_torch: bool) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor) and (problem := memory.problem(value)) is not None:
            raise Problem(RuntimeError, f"state[{key!r}] {problem}")
    for scalar in record.rule.scalars:
        _check_scalar(record, scalar, state.get(scalar.name))
    for slot in record.slots:
        value = state.get(slot.name)
        if value is None:
            continue
        check_slot(record, slot, value, state)
        _check_device(record, slot.name, value)
        if left_to_torch:
            continue
        if value.layout is not torch.strided and not record.has_sparse_grad:
            raise Problem(
                RuntimeError, f"state[{slot.name!r}] is sparse, but the gradient is dense"
            )
        if value.layout is torch.strided and _overlaps_itself(dtensor.local(value)):
            raise Problem(ValueError, _overlapping(slot.name))
    for key in record.extras.names:
        if state.get(key) is not None:
            check_extra(record, key, state[key])
            _check_device(record, key, state[key])


def check_slot(record: Record, slot: Slot, value: Any, state: dict[str, Any]) -> None:
    """Raises a Problem if a value is no state tensor of this parameter, wherever it is."""
    key, param = slot.name, record.param
    if not isinstance(value, Tensor):
        raise Problem(TypeError, f"state[{key!r}] is a {type(value).__name__}, not a tensor")
    if not record.is_lazy:
        shape = tensor_kinds.shape(value)
        if shape != tensor_kinds.shape(param):
            raise Problem(
                ValueError,
                f"state[{key!r}] has shape {shape}, the parameter {tensor_kinds.shape(param)}; "
                "load the state of this parameter, or delete it to start anew",
            )
        dtensor.check_state(param, key, value)
        if formats.is_code(value):
            _check_codes(record, slot, value, state)
    if not formats.is_code(value) and not _is_number_like(value, param):
        raise Problem(TypeError, f"state[{key!r}] has dtype {value.dtype}")


def _check_codes(record: Record, slot: Slot, value: Tensor, state: dict[str, Any]) -> None:
    key, param, codes = slot.name, record.param, dtensor.local(value)
    if param.is_complex() or codes.dtype != formats.code_dtype(slot):
        raise Problem(TypeError, f"state[{key!r}] has dtype {codes.dtype}")
    if not formats.is_dense(codes):
        raise Problem(
            ValueError, f"state[{key!r}] must be without gaps, its strides {codes.stride()}"
        )
    scale_key, length = f"{key}_scale", formats.num_scales(dtensor.longest_shard(param))
    scale: Any = state.get(scale_key)
    _check_row(scale_key, scale, torch.float32, length, param)
    _check_dense(scale_key, scale)
    if scale.device != codes.device:
        raise Problem(
            ValueError, f"state['{scale_key}'] is on {scale.device}; move it to {codes.device}"
        )


def check_extra(record: Record, key: str, value: Any) -> None:
    """Raises a Problem if a value is not what this extra is, wherever it is."""
    param = record.param
    if key == "rounding_state":
        _check_row(key, value, torch.int64, 2, param)
    else:
        dtypes = {"master_remainder": (torch.int16,), "master": (torch.float32,)}.get(
            key, (torch.float32, *formats.HALVES, param.dtype)
        )
        _check_shape(key, value, dtypes, param.shape)
        dtensor.check_state(param, key, value)
    _check_dense(key, value)


def _check_row(key: str, value: Any, dtype: torch.dtype, length: int, param: Tensor) -> None:
    shape, placements = dtensor.rows(length, param)
    _check_shape(key, value, (dtype,), shape)
    if not dtensor.is_placed(value, param, placements):
        raise Problem(
            ValueError,
            f"state[{key!r}] is {dtensor.placed(value)}, but it must have a row for each shard of "
            f"the parameter, which is {dtensor.placed(param)}",
        )


def _check_shape(key: str, value: Any, dtypes: tuple[torch.dtype, ...], shape: torch.Size) -> None:
    if not isinstance(value, Tensor) or value.dtype not in dtypes or value.shape != shape:
        is_tensor = isinstance(value, Tensor)
        got = f"shape {tuple(value.shape)}, {value.dtype}" if is_tensor else type(value).__name__
        dtype = str(dtypes[0]).removeprefix("torch.")
        raise Problem(
            ValueError,
            f"state[{key!r}] must be a {dtype} tensor of shape {tuple(shape)}, got {got}",
        )


def _check_dense(key: str, value: Tensor) -> None:
    if value.layout is not torch.strided:
        raise Problem(ValueError, f"state[{key!r}] is sparse; it must be dense")
    if not tensor_kinds.is_unusual(value) and _overlaps_itself(dtensor.local(value)):
        raise Problem(ValueError, _overlapping(key))


def _check_device(record: Record, key: str, value: Tensor) -> None:
    if value.device != record.param.device:
        raise Problem(
            ValueError, f"state[{key!r}] is on {value.device}; move it to {record.param.device}"
        )


def _check_scalar(record: Record, scalar: Scalar, value: Any) -> None:
    key = scalar.name
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        raise Problem(TypeError, f"state[{key!r}] must be a tensor of one number, got {value!r}")
    if value.device.type != "cpu" and value.device != record.param.device:
        raise Problem(ValueError, f"state[{key!r}] is on {value.device}; move it to the CPU")
    if record.group.get("differentiable") and value.requires_grad:
        raise Problem(
            RuntimeError, f"`requires_grad` is not supported for `{key}` in differentiable mode"
        )
    if scalar is not STEP and not value.is_floating_point():
        raise Problem(TypeError, f"state[{key!r}] is {value.dtype}; it must be floating point")
    if scalar is STEP and value.device.type == "cpu":
        check_count(tensor_kinds.number(value))


def check_count(count: float | None) -> None:
    """Of steps; None if only the device knows it."""
    if count is not None and not 0 <= count < LAST_STEP:
        raise Problem(ValueError, f"state['step'] is {count}, not a count")


def _is_number_like(tensor: Tensor, param: Tensor) -> bool:
    """Whether it is floating point or complex, as the parameter is."""
    is_complex = tensor.is_complex()
    return is_complex == param.dtype.is_complex and (is_complex or tensor.is_floating_point())


def _overlaps_itself(tensor: Tensor) -> bool:
    return torch._debug_has_internal_overlap(tensor) == 1


def _overlapping(key: str) -> str:
    return f"elements of state[{key!r}] share one memory location; clone it"
