#include "record.h"

#include "../multi_tensor/tensor_lists.h"

namespace fusedopt {

void ParamRecord::add(Role role, const TensorView& tensor) {
  (*this)[role].data = tensor.data;
  (*this)[role].dtype = tensor.dtype;
  roles.add(role);
}

void Records::add_param(const TensorView& tensor, ParamRecord* param) {
  param->ndim = tensor.ndim;
  param->dims = dims_.size();
  dims_.insert(dims_.end(), tensor.shape, tensor.shape + tensor.ndim);
  dims_.insert(dims_.end(), tensor.strides, tensor.strides + tensor.ndim);
  param->numel = numel(tensor);
  param->device = tensor.device;
  param->add(Role::kParam, tensor);
  param->stored = stored_as(*param);
}

void Records::remember(const TorchLayout& layout, const char* impl, int ndim,
                       TensorRecord* tensor) {
  if (!layout.trusts_words) return;
  if (tensor->words < 0) {
    tensor->words = static_cast<std::int32_t>(words_.size());
    words_.emplace_back();
  }
  if (kinds_.size() >= kMostKinds) {
    for (TensorWords& words : words_) words.forget();
    kinds_.clear();
  }
  words_[static_cast<std::size_t>(tensor->words)].remember(layout, impl, ndim, &kinds_);
}

bool Records::move_to(const TorchLayout& layout, const char* impl, TensorRecord* tensor) {
  if (tensor->words < 0) return false;
  TensorWords moved = words_[static_cast<std::size_t>(tensor->words)];
  std::ptrdiff_t distance;
  if (!moved.move_to(layout, impl, &distance)) return false;
  if (distance % static_cast<std::ptrdiff_t>(itemsize(tensor->dtype)) != 0) return false;
  words_[static_cast<std::size_t>(tensor->words)] = moved;
  if (tensor->data != nullptr) tensor->data = static_cast<char*>(tensor->data) + distance;
  return true;
}

SlotDtypes stored_as(const ParamRecord& param) {
  SlotDtypes dtypes;
  dtypes.num_slots = 2;
  dtypes.slots[0] = dtypes.slots[1] = param[Role::kParam].dtype;
  (param.roles & kStates).for_each([&](Role role) {
    dtypes.slots[dtypes.num_slots++] = param[role].dtype;
  });
  if (param.roles.has(Role::kMaster)) dtypes.master = param[Role::kMaster].dtype;
  if (param.roles.has(Role::kEma)) dtypes.ema = param[Role::kEma].dtype;
  dtypes.stochastic = param.roles.has(Role::kRounding);
  return dtypes;
}

}  // namespace fusedopt
