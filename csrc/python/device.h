#pragma once

#include <string>

#include "../device/kernel_state.h"

namespace fusedopt {

// Makes kernels ready, or refuses them and warns. Throws if this process cannot use the GPU. Releases the interpreter lock. Throws what begins with
// `owner` where the current stream is captured.
void load_needed(const NeededKernels& needed, const std::string& owner);

}  // namespace fusedopt
