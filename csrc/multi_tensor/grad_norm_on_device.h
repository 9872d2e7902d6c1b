#pragma once

// What the kernel of the norm does: grad_norm_kernel.h by a block of threads. Compiled by NVRTC only.

#include "grad_norm_kernel.h"
#include "launch_table.h"

namespace fusedopt {

// The sum over the columns of all threads, valid in thread 0.
template <typename T, typename Sum>
__device__ T sum_in_block(T* sums, int num_columns, Sum&& sum_own_columns) {
  sum_own_columns();
  for (int half = num_columns / 2; half > 0; half /= 2) {
    __syncthreads();
    fold_columns(sums, half, threadIdx.x, blockDim.x);
  }
  __syncthreads();
  return sums[0];
}

__device__ __forceinline__ void grad_norm_on_device(const LaunchTable& table) {
  __shared__ double shared[kNormColumns];
  __shared__ bool is_last;
  const GradNorm& norm = *static_cast<const GradNorm*>(table.update(0));
  const int thread = threadIdx.x;
  double sum;
  bool in_double = is_double_block(table, blockIdx.x);
  if (!in_double) {
    float* const sums = reinterpret_cast<float*>(shared);
    sum = sum_in_block(sums, kNormColumns, [&] { sum_block(table, blockIdx.x, sums, thread); });
    in_double = !is_accurate(static_cast<float>(sum));
    __syncthreads();  // all have read the sum: its place is free
  }
  if (in_double) {
    sum = sum_in_block(shared, kNormColumns, [&] { sum_block(table, blockIdx.x, shared, thread); });
  }
  if (thread == 0) is_last = hand_in(norm, blockIdx.x, sum);
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  sum = sum_in_block(shared, kPartialColumns, [&] {
    shared[thread] = sum_partial_column(norm.partials, norm.num_partials, thread);
  });
  if (thread == 0) norm.finish(sum);
}

}  // namespace fusedopt
