#pragma once

// Options that nobody chose: by them the kernels of all rules are found, and a kernel is tried out.

#include <vector>

#include "../multi_tensor/device_kernel.h"
#include "registry.h"

namespace fusedopt {

// A rule for each choice of what its options switch on and off, in an order that is always the same.
std::vector<std::unique_ptr<GroupRule>> sample_rules(const RuleEntry& rule);

// Dtypes of a parameter, its gradient and the states of a mask: all of one.
SlotDtypes plain_dtypes(unsigned state_mask, Dtype dtype);

// The kernels of all rules, and that of the norm.
const std::vector<const DeviceKernel*>& all_kernels();

}  // namespace fusedopt
