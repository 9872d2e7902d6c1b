#pragma once

// The norm of all gradients together, and the factor that clips them to a largest norm. The sum of
// squares has one order, on every device and for every number of threads: columns over the rows of
// a chunk, then a tree over the columns, then the same over the chunks.

#include <cmath>
#include <cstdint>

#include "../update_rules/host_device.h"
#include "launch_table.h"
#include "tuning.h"

namespace fusedopt {

struct GradNorm {
  double max_norm;          // infinity: only measure
  bool skip_nonfinite;      // a norm that is not finite skips the step
  const float* loss_scale;  // as in StepScaling
  double* clip;             // StepScaling::Clip, written at the end
  double* partials;         // room for one sum per chunk
  std::uint32_t num_partials;
  std::uint32_t first_partial;  // of a launch
  std::uint32_t* ticket;        // zero, and zero again afterwards; unused on the CPU

  // torch.nn.utils.clip_grad_norm_: gradients times max_norm / (norm + 1e-6), if that is below 1.
  FUSEDOPT_HD void finish(double sum_of_squares) const {
    using std::sqrt;
    const double norm = sqrt(sum_of_squares);
    const double factor = max_norm / (norm + 1e-6);
    clip[StepScaling::kNorm] = norm;
    clip[StepScaling::kFactor] = factor >= 1.0 ? 1.0 : factor;  // a NaN stays one
    clip[StepScaling::kSkip] = skip_nonfinite && !(norm - norm == 0.0) ? 1.0 : 0.0;
  }
};

// Whether squares in float made this sum of a chunk: none of them can have left the range of float,
// and what fell below it counts for less than a rounding. Else the chunk is summed again in double,
// which adds nothing to the time of ordinary gradients.
FUSEDOPT_HD bool is_accurate(float sum) { return sum >= 0x1p-86f && sum <= 0x1.fffffep127f; }

// One level of the tree over `sums`: this thread's share of folding the upper half onto the lower.
template <typename T>
FUSEDOPT_HD void fold_columns(T* sums, int half, int thread, int num_threads) {
  for (int c = thread; c < half; c += num_threads) sums[c] = sums[c] + sums[c + half];
}

// The columns of the tree over the chunks.
constexpr int kPartialColumns = kBlockThreads;

FUSEDOPT_HD double sum_partial_column(const volatile double* partials, std::uint32_t num_partials,
                                      int column) {
  double sum = 0;
  for (std::uint32_t i = column; i < num_partials; i += kPartialColumns) sum = sum + partials[i];
  return sum;
}

}  // namespace fusedopt
