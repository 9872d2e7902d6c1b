#pragma once

#include <cstdint>

#include "../multi_tensor/device_kernel.h"
#include "../multi_tensor/tensor_view.h"

namespace fusedopt {

// The module for tests: all memory is that of one GPU, number 0.
#if defined(FUSEDOPT_KERNELS_ON_HOST)
constexpr bool kKernelsOnHost = true;
#else
constexpr bool kKernelsOnHost = false;
#endif

// The device of a tensor that can be read and written from here.
constexpr int kHostDevice = kKernelsOnHost ? 0 : kCpu;

// A device as it is used by one step.
class Gpu {
 public:
  Gpu(int device, void* stream) : device_(device), stream_(stream) {}
  void launch(const DeviceKernel& kernel, const LaunchTable& table) const;

 private:
  int device_;
  void* stream_;
};

bool is_capturing(void* stream);

// Kernels launched since the module was loaded.
std::int64_t num_launches();

}  // namespace fusedopt
