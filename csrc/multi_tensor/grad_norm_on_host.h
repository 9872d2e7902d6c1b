#pragma once

// The kernel of the norm on the CPU, for tests; as update_on_host.h.

#include "grad_norm_kernel.h"
#include "launch_table.h"

namespace fusedopt {

template <typename T, typename Sum>
double sum_on_host(int num_columns, Sum&& sum_own_columns) {
  T sums[kNormColumns];
  for (int thread = 0; thread < kBlockThreads; ++thread) sum_own_columns(sums, thread);
  for (int half = num_columns / 2; half > 0; half /= 2) {
    for (int thread = 0; thread < kBlockThreads; ++thread) {
      fold_columns(sums, half, thread, kBlockThreads);
    }
  }
  return sums[0];
}

inline void grad_norm_on_host(const LaunchTable& table) {
  const GradNorm& norm = *static_cast<const GradNorm*>(table.update(0));
  for (std::uint32_t block = 0; block < table.num_chunks; ++block) {
    const auto sum_chunk = [&](auto* sums, int thread) { sum_block(table, block, sums, thread); };
    double sum = 0;
    bool in_double = is_double_block(table, block);
    if (!in_double) {
      sum = sum_on_host<float>(kNormColumns, sum_chunk);
      in_double = !is_accurate(static_cast<float>(sum));
    }
    if (in_double) sum = sum_on_host<double>(kNormColumns, sum_chunk);
    if (!hand_in(norm, block, sum)) continue;
    norm.finish(sum_on_host<double>(kPartialColumns, [&](double* sums, int thread) {
      sums[thread] = sum_partial_column(norm.partials, norm.num_partials, thread);
    }));
  }
}

}  // namespace fusedopt
