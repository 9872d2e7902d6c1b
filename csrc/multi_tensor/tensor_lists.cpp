#include "tensor_lists.h"

#include <algorithm>

namespace fusedopt {

std::int64_t numel(const TensorView& tensor) {
  std::int64_t n = 1;
  for (int d = 0; d < tensor.ndim; ++d) n *= tensor.shape[d];
  return n;
}

bool is_flat(const TensorView& tensor) {
  if (reinterpret_cast<std::uintptr_t>(tensor.data) % itemsize(tensor.dtype) != 0) return false;
  if (numel(tensor) == 0) return true;
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;  // stride, size
  for (int d = 0; d < tensor.ndim; ++d) {
    if (tensor.shape[d] != 1) dims.emplace_back(tensor.strides[d], tensor.shape[d]);
  }
  std::sort(dims.begin(), dims.end());
  std::int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool can_combine(const SlotDtypes& dtypes) {
  int num_float64 = 0;
  for (int s = 0; s < dtypes.num_slots; ++s) num_float64 += dtypes.slots[s] == Dtype::kFloat64;
  return num_float64 == 0 || num_float64 == dtypes.num_slots;
}

}  // namespace fusedopt
