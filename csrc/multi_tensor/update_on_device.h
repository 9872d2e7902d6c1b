#pragma once

// What the kernels of the rules do: a block of threads does what apply_kernel.h and stored_kernel.h
// say that a block does. Compiled by NVRTC only.

#include "apply_kernel.h"
#include "launch_table.h"
#include "stored_kernel.h"

namespace fusedopt {

template <typename T, typename Rule, typename Update>
__device__ __forceinline__ void update_on_device(const LaunchTable& table) {
  __shared__ BlockTask<Update> task;
  Scalars scalars;
  if (threadIdx.x == 0) scalars = begin_block<T, Rule>(table, blockIdx.x, &task);
  __syncthreads();
  if (threadIdx.x == 0) count_block<Rule>(table, blockIdx.x, task, scalars);
  run_block<T>(task, threadIdx.x, blockDim.x);
}

template <typename Rule, typename Update>
__device__ __forceinline__ void stored_update_on_device(const LaunchTable& table) {
  __shared__ StoredTask<Update> task;
  Scalars scalars;
  if (threadIdx.x == 0) scalars = begin_block<float, Rule>(table, blockIdx.x, &task);
  __syncthreads();
  if (threadIdx.x == 0) count_block<Rule>(table, blockIdx.x, task, scalars);
  run_stored_block(task);
}

}  // namespace fusedopt
