#pragma once

// What NVRTC is given: the headers of csrc/ that a kernel needs travel in the module.

#include <string>
#include <vector>

#include "../multi_tensor/device_kernel.h"

namespace fusedopt {

struct Header {
  const char* path;  // in csrc/
  const char* text;
};

// Defined in a file that device/embed.cmake writes.
const std::vector<Header>& kernel_headers();

// The whole program of a kernel, which includes nothing.
std::string kernel_source(const DeviceKernel& kernel);

// The options of a compilation: `architecture` is sm_90 for machine code, compute_90 for PTX.
std::vector<std::string> kernel_options(const std::string& architecture,
                                        std::size_t argument_bytes);

}  // namespace fusedopt
