#pragma once

#include <string>

#include "driver.h"

namespace fusedopt {

// self_test of the kernel of the norm.
std::string norm_self_test(const Driver& driver, int device);

}  // namespace fusedopt
