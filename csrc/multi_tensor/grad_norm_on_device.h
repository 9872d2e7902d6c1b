#pragma once

// What the kernel of the norm does: grad_norm_kernel.h by a block of threads. Compiled by NVRTC only.

#include "grad_norm_kernel.h"
#include "launch_table.h"

namespace fusedopt {

// Leaves the sum over the columns of all threads in the first, where thread 0 may read it; others
// after a barrier. A thread that folds from what it has itself written waits for nobody.
template <typename T, typename Sum>
__device__ void sum_in_block(T* sums, int num_columns, Sum&& sum_own_columns) {
  sum_own_columns();
  for (int half = num_columns / 2; half > 0; half /= 2) {
    if (half == num_columns / 2 || half < kBlockThreads) __syncthreads();
    fold_columns(sums, half, threadIdx.x, kBlockThreads);
  }
}

// From the last chunk to the first: the update, which begins with the first, finds its gradients in
// the cache.
__device__ __forceinline__ void grad_norm_on_device(const LaunchTable& table) {
  __shared__ double shared[kNormColumns];
  __shared__ bool is_last;
  const GradNorm& norm = *static_cast<const GradNorm*>(table.update(0));
  const int thread = threadIdx.x;
  const std::uint32_t block = gridDim.x - 1 - blockIdx.x;
  double sum = 0;
  bool in_double = is_double_block(table, block);
  if (!in_double) {
    float* const sums = reinterpret_cast<float*>(shared);
    sum_in_block(sums, kNormColumns, [&] { sum_block(table, block, sums, thread); });
    __syncthreads();
    sum = sums[0];
    in_double = !is_accurate(sums[0]);
    if (in_double) __syncthreads();  // all have read the sum: its place is free
  }
  if (in_double) {
    sum_in_block(shared, kNormColumns, [&] { sum_block(table, block, shared, thread); });
  }
  if (thread == 0) is_last = hand_in(norm, block, in_double ? shared[0] : sum);
  __syncthreads();
  if (!is_last) return;
  fence();
  sum_in_block(shared, kPartialColumns, [&] {
    shared[thread] = sum_partial_column(norm.partials, norm.num_partials, thread);
  });
  if (thread == 0) norm.finish(shared[0]);
}

}  // namespace fusedopt
