#pragma once

#include <cstdint>
#include <string>

#include "tensor_view.h"

namespace fusedopt {

#if FUSEDOPT_HAS_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

// The kernels run on the CPU, for tests: then all memory is that of one GPU, number 0.
#if defined(FUSEDOPT_CUDA_ON_HOST)
constexpr bool kCudaOnHost = true;
#else
constexpr bool kCudaOnHost = false;
#endif

// The device of a tensor that can be read and written from here.
constexpr int kHostDevice = kCudaOnHost ? 0 : kCpu;

// Why the kernels cannot run on this device, and what to do about it; empty if they can.
std::string cuda_problem(int device);

bool is_capturing(void* stream);

// Kernels launched since the module was loaded.
std::int64_t num_launches();

// Makes a device current and then restores the one that was. Throws std::runtime_error.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  // Counts a launch. Throws std::runtime_error if it failed.
  void launched() const;

 private:
  int device_, previous_ = -1;
};

}  // namespace fusedopt
