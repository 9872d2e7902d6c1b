#pragma once

#include <utility>
#include <vector>

namespace fusedopt {

struct DeviceKernel;

enum class KernelState {
  kUnknown,  // nobody has asked for it yet: see load_kernels
  kReady,
  kRefused,  // for good, or for now: see put_off
};

// Kernels that somebody needs, with the device.
using NeededKernels = std::vector<std::pair<const DeviceKernel*, int>>;

}  // namespace fusedopt
