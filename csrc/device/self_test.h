#pragma once

#include <string>

#include "../multi_tensor/device_kernel.h"

namespace fusedopt {

// Runs a loaded kernel on a few thousand elements of every kind, and on the CPU the same: with every
// choice of options, of dtypes, aligned and not, in one piece and with a rest, several tensors at a
// time. What differs, and where; empty if nothing does. (In double a kernel that prepares its updates
// itself may differ in the last digits, as the device's pow does.) Throws DeviceProblem if it does not
// come to a verdict.
std::string self_test(const DeviceKernel& kernel, int device);

}  // namespace fusedopt
