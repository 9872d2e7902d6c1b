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

WrittenRange written_range(const TensorView& tensor, std::int64_t owner) {
  std::int64_t lowest = 0, highest = 0;
  for (int d = 0; d < tensor.ndim; ++d) {
    const std::int64_t reach = (tensor.shape[d] - 1) * tensor.strides[d];
    (reach < 0 ? lowest : highest) += reach;
  }
  const auto base = reinterpret_cast<std::uintptr_t>(tensor.data);
  const auto size = static_cast<std::int64_t>(itemsize(tensor.dtype));
  if (numel(tensor) == 0) return {base, base, owner};
  return {base + lowest * size, base + (highest + 1) * size, owner};
}

std::vector<std::int64_t> overlapping_owners(std::vector<WrittenRange> ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](const WrittenRange& a, const WrittenRange& b) { return a.begin < b.begin; });
  std::vector<std::int64_t> owners;
  const WrittenRange* reaching = nullptr;  // of the ranges so far, the one that ends last
  for (const WrittenRange& range : ranges) {
    if (range.begin == range.end) continue;
    if (reaching != nullptr && range.begin < reaching->end) {
      owners.push_back(reaching->owner);
      owners.push_back(range.owner);
    }
    if (reaching == nullptr || range.end > reaching->end) reaching = &range;
  }
  std::sort(owners.begin(), owners.end());
  owners.erase(std::unique(owners.begin(), owners.end()), owners.end());
  return owners;
}

}  // namespace fusedopt
