#pragma once

#include <cstdint>
#include <vector>

#include "norm_sum.h"
#include "tuning.h"

namespace fusedopt {

struct GradToMeasure {
  void* data;
  Dtype dtype;
  std::int64_t numel;

  std::int64_t num_chunks() const { return (numel + kNormElements - 1) / kNormElements; }
};

// Leave norm and factor in norm.clip. The caller has counted the chunks in norm.num_partials.
void grad_norm_cpu(const std::vector<GradToMeasure>& grads, const GradNorm& norm, int num_threads);

}  // namespace fusedopt
