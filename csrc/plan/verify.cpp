#include "verify.h"

#include <cstdint>

#include "../device/gpu.h"
#include "../multi_tensor/tensor_lists.h"
#include "../storage/blockwise8.h"

namespace fusedopt {

namespace {

bool is_aligned(const TensorView& tensor) {
  return reinterpret_cast<std::uintptr_t>(tensor.data) % itemsize(tensor.dtype) == 0;
}

// A tensor with an element for each of the parameter's, in its layout.
bool can_store(const ParamRecord& param, Role role, Dtype dtype) {
  const Dtype of_param = param[Role::kParam].dtype;
  if (role == Role::kParam) return is_float(dtype);
  if (role == Role::kEma) return is_float(dtype) && dtype != Dtype::kFloat64;
  if (role != Role::kMaster) return dtype <= Dtype::kUInt8;
  const bool is_split = dtype == Dtype::kInt16 && of_param == Dtype::kBFloat16;
  return is_split || (dtype == Dtype::kFloat32 && itemsize(of_param) == 2);
}

// Random bits used, or scales.
bool can_list(const ParamRecord& param, Role role, const TensorView& now) {
  // A shard has one row of several, as long as the longest.
  if (now.ndim < 1 || (now.ndim > 1 && !param.is_shard)) return false;
  const std::int64_t length = now.shape[now.ndim - 1];
  if (numel(now) != length || (now.strides[now.ndim - 1] != 1 && length >= 2)) return false;
  if (role == Role::kRounding) {
    return now.dtype == Dtype::kInt64 && length == 2 &&
           param[Role::kParam].dtype == Dtype::kBFloat16;
  }
  const std::int64_t scales = num_scales(param.numel);
  return now.dtype == Dtype::kFloat32 && (length == scales || (param.is_shard && length > scales));
}

}  // namespace

bool Verification::counts_on_device(const ParamRecord& param, const TensorView& step) const {
  if constexpr (kKernelsOnHost) {
    const GroupRecord& group = records_->groups[param.group];
    return group.capturable || group.amp_fused;
  }
  return param.device != kCpu && step.device == param.device;
}

bool Verification::can_take(const ParamRecord& param, Role role, const TensorView& now) const {
  if (!is_aligned(now)) return false;
  if (kScalars.has(role)) {
    if (numel(now) != 1 || !is_float(now.dtype) || itemsize(now.dtype) < 4) return false;
    return counts_on_device(param, now) ? now.dtype == Dtype::kFloat32 : now.device == kHostDevice;
  }
  if (now.device != param.device) return false;
  if (!is_elementwise(role)) return can_list(param, role, now);
  return can_store(param, role, now.dtype) && same_layout(now, records_->view_of(param, role));
}

bool Verification::accepts(ParamRecord* param, Role role, const TensorView& now) {
  TensorRecord& tensor = (*param)[role];
  if (now.dtype != tensor.dtype || !can_take(*param, role, now)) return false;
  if (kScalars.has(role) && counts_on_device(*param, now) != param->device_step) return false;
  moved_ |= now.data != tensor.data;
  tensor.data = now.data;
  return true;
}

bool Verification::fits(const ParamRecord& param, const TensorView& grad) const {
  return grad.device == param.device && same_layout(grad, records_->view_of(param, Role::kParam)) &&
         can_combine({{param[Role::kParam].dtype, grad.dtype}, 2}) && is_aligned(grad);
}

bool Verification::follow(ParamRecord* param, const TorchLayout& layout, const char* impl) {
  TensorRecord& grad = (*param)[Role::kGrad];
  if (!records_->move_to(layout, impl, &grad)) return false;
  const auto begin = reinterpret_cast<std::uintptr_t>(grad.data);
  const auto num_bytes = static_cast<std::uintptr_t>(param->numel) * itemsize(grad.dtype);
  const bool is_free = overlaps_->is_free({begin, begin + num_bytes});
  param->free_since = is_free ? overlaps_->generation() : 0;
  return is_free;
}

bool Verification::is_free(const ParamRecord& param, const TensorView& grad) {
  const TensorRecord& before = param[Role::kGrad];
  if (param.free_since == overlaps_->generation() && before.data == grad.data &&
      before.dtype == grad.dtype) {
    return true;
  }
  const auto begin = reinterpret_cast<std::uintptr_t>(grad.data);
  const auto num_bytes = static_cast<std::uintptr_t>(param.numel) * itemsize(grad.dtype);
  return overlaps_->is_free({begin, begin + num_bytes});
}

bool is_complete(const ParamRecord& param, Roles needed) {
  if (!param.roles.has(needed)) return false;
  for (int s = 0; s < kMaxStates; ++s) {
    const bool is_code = param.roles.has(state(s)) && !is_float(param[state(s)].dtype);
    if (is_code && !param.roles.has(scale(s))) return false;
  }
  return can_combine(param.stored) &&
         (param.stored.is_plain() || param[Role::kParam].dtype != Dtype::kFloat64);
}

}  // namespace fusedopt
