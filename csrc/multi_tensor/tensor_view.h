#pragma once

#include <cstddef>
#include <cstdint>

#include "../storage/dtype.h"
#include "slot_dtypes.h"

namespace fusedopt {

constexpr int kCpu = -1;  // a device; GPUs count from 0

// What a tensor is on this side: memory that someone else owns.
struct TensorView {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int ndim = 0;
  const std::int64_t* shape = nullptr;
  const std::int64_t* strides = nullptr;
  int device = kCpu;
};

}  // namespace fusedopt
