#pragma once

// The kernels of the rules and their launch. ops/*.cu instantiate prepare_cuda for each rule.

#include <cstring>

#include "apply.h"
#include "apply_kernel.h"
#include "launch_table.h"
#include "stored_kernel.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace fusedopt {

#if defined(__CUDACC__)

template <typename T, typename Rule, typename Update>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks)
    update_kernel(const __grid_constant__ LaunchTable table) {
  __shared__ BlockTask<Update> task;
  if (threadIdx.x == 0) begin_block<T, Rule>(table, blockIdx.x, &task);
  __syncthreads();
  run_block<T>(task, threadIdx.x, blockDim.x);
}

template <typename T, typename Rule, typename Update>
void launch(const LaunchTable& table, void* stream) {
  update_kernel<T, Rule, Update>
      <<<table.num_chunks, kBlockThreads, 0, static_cast<cudaStream_t>(stream)>>>(table);
}

template <typename Rule, typename Update>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks)
    stored_update_kernel(const __grid_constant__ LaunchTable table) {
  __shared__ StoredTask<Update> task;
  if (threadIdx.x == 0) begin_block<float, Rule>(table, blockIdx.x, &task);
  __syncthreads();
  run_stored_block(task);
}

template <typename Rule, typename Update>
void launch_stored(const LaunchTable& table, void* stream) {
  stored_update_kernel<Rule, Update>
      <<<table.num_chunks, kBlockThreads, 0, static_cast<cudaStream_t>(stream)>>>(table);
}

#else  // FUSEDOPT_CUDA_ON_HOST

template <typename Rule, typename Update>
void launch_stored(const LaunchTable& table, void*) {
  for (std::uint32_t block = 0; block < table.num_chunks; ++block) {
    StoredTask<Update> task = {};
    begin_block<float, Rule>(table, block, &task);
    run_stored_block(task);
  }
}

template <typename T, typename Rule, typename Update>
void launch(const LaunchTable& table, void*) {
  for (std::uint32_t block = 0; block < table.num_chunks; ++block) {
    BlockTask<Update> task = {};
    begin_block<T, Rule>(table, block, &task);
    for (std::uint32_t thread = 0; thread < kBlockThreads; ++thread) {
      run_block<T>(task, thread, kBlockThreads);
    }
  }
}

#endif

template <typename T, typename Rule, typename Update>
const DeviceKernel kDeviceKernel = {2 + Update::kNumStates, kNumScalars<Rule>, true,
                                    launch<T, Rule, Update>};

template <typename Rule, typename Update>
const DeviceKernel kStoredKernel = {kMaxPointers, kNumScalars<Rule>, false,
                                    launch_stored<Rule, Update>};

template <typename Rule>
PreparedUpdate prepare_cuda(const Rule& rule, const Scalars& scalars, const StoredAs& stored,
                            bool on_device) {
  const SlotDtypes& dtypes = stored.dtypes;
  PreparedUpdate prepared;
  prepared.stored = stored;
  prepared.stored.step = scalars.step;
  prepared.on_device = on_device;
  const auto use = [&](const DeviceKernel& kernel, const auto& update) {
    prepared.device_kernel = &kernel;
    const auto keep = [&](const auto& what) {
      static_assert(sizeof(what) <= kMaxCoefficientBytes);
      prepared.num_bytes = sizeof(what);
      std::memcpy(prepared.coefficients, &what, sizeof(what));
    };
    const auto keep_as_stored = [&](const auto& what) {
      if (kernel.is_plain) return keep(what);
      keep(Stored<std::decay_t<decltype(what)>>{what, prepared.stored});
    };
    if (on_device) {
      keep_as_stored(rule);
    } else {
      keep_as_stored(update);
    }
  };
  // What the device prepares is prepared here too, for its type alone.
  if (dtypes.all(Dtype::kFloat64)) {
    rule.template prepare<double>(scalars, [&](const auto& update) {
      use(kDeviceKernel<double, Rule, std::decay_t<decltype(update)>>, update);
    });
  } else {
    rule.template prepare<float>(scalars, [&](const auto& update) {
      using Update = std::decay_t<decltype(update)>;
      use(dtypes.is_plain() ? kDeviceKernel<float, Rule, Update> : kStoredKernel<Rule, Update>,
          update);
    });
  }
  return prepared;
}

}  // namespace fusedopt
