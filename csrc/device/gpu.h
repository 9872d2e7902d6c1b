#pragma once

#include <cstdint>

#include "../multi_tensor/device_kernel.h"
#include "../multi_tensor/tensor_view.h"
#include "driver.h"

namespace fusedopt {

// The module for tests: all memory is that of one GPU, number 0.
#if defined(FUSEDOPT_KERNELS_ON_HOST)
constexpr bool kKernelsOnHost = true;
#else
constexpr bool kKernelsOnHost = false;
#endif

// The device of a tensor that can be read and written from here.
constexpr int kHostDevice = kKernelsOnHost ? 0 : kCpu;

// A GPU at work on a stream: its context is that of this thread meanwhile. All throw DeviceProblem.
class Gpu {
 public:
  Gpu(int device, cuda::Stream stream);
  ~Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  // How large a table may be.
  std::size_t table_bytes() const { return table_bytes_; }
  // Of a kernel that was loaded.
  void launch(const DeviceKernel& kernel, const LaunchTable& table) const;
  // For all that the stream was given.
  void wait() const;
  // Without an error: for memory that a failure left behind.
  void try_to_zero(std::uint32_t* word) const;

 private:
  const Driver& driver_;
  const int device_;
  const cuda::Stream stream_;
  std::size_t table_bytes_;
};

bool is_capturing(cuda::Stream stream);

// Kernels launched since the module was loaded, by steps.
std::int64_t num_launches();

// While it lives, what this thread launches is a trial.
class UncountedLaunches {
 public:
  UncountedLaunches();
  ~UncountedLaunches();
  UncountedLaunches(const UncountedLaunches&) = delete;
  UncountedLaunches& operator=(const UncountedLaunches&) = delete;
};

}  // namespace fusedopt
