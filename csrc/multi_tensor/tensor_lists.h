#pragma once

#include <cstdint>
#include <vector>

#include "tensor_view.h"

namespace fusedopt {

std::int64_t numel(const TensorView& tensor);

// Elements fill [data, data + numel) without gaps or overlap, in any order of dimensions, and each
// is aligned to its size: what the kernels can walk as one flat array.
bool is_flat(const TensorView& tensor);

// The same element sits at the same offset in both. Strides of size-1 dimensions do not matter.
// Inline: every tensor of every step goes through it.
inline bool same_layout(const TensorView& a, const TensorView& b) {
  if (a.ndim != b.ndim) return false;
  bool empty = false, strides_match = true;
  for (int d = 0; d < a.ndim; ++d) {
    if (a.shape[d] != b.shape[d]) return false;
    empty |= a.shape[d] == 0;
    strides_match &= a.strides[d] == b.strides[d] || a.shape[d] == 1;
  }
  return strides_match || empty;
}

// Dtypes that one update can combine: all float64, or any mix of the others (computed in float).
bool can_combine(const SlotDtypes& dtypes);

}  // namespace fusedopt
