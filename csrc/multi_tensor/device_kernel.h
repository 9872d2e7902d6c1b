#pragma once

// A kernel of the device before it is compiled: there is one for each update of each rule, in float, in
// double, and for values that are not stored as they are.

#include <functional>
#include <string>
#include <vector>

#include "launch_table.h"

namespace fusedopt {

struct DeviceKernel {
  // `min_blocks` must fit a multiprocessor.
  DeviceKernel(std::string name, const std::string& header, const std::string& call,
               int min_blocks);

  std::string name;     // of its function
  std::string program;  // which includes headers of csrc/
  // Of the kernels of rules:
  int num_slots = 0;    // pointers of a tensor
  int num_scalars = 0;  // that a tensor has on the device if the kernel prepares
  // For values that are not stored as they are: how they are, and the kernel for those that are.
  SlotDtypes stored;
  const DeviceKernel* plain = nullptr;
  bool is_plain() const { return plain == nullptr; }
  // What it does, on the CPU; only in the module for tests.
  void (*on_host)(const LaunchTable& table) = nullptr;
};

const DeviceKernel& grad_norm_kernel();

// That of the same update for values that are not stored as they are, made when it is first asked for
// and never moved or forgotten. `make`: one whose name ends like this.
const DeviceKernel& stored_kernel(
    const DeviceKernel& plain, const SlotDtypes& dtypes,
    const std::function<DeviceKernel(const std::string& suffix)>& make);

// All that somebody has asked for.
std::vector<const DeviceKernel*> stored_kernels();

namespace internal {

template <typename T>
const char* signature() {
  return __PRETTY_FUNCTION__;
}

}  // namespace internal

// The type as it is written in C++. GCC and Clang end the signature with "T = TYPE]".
template <typename T>
std::string type_name() {
  const std::string signature = internal::signature<T>();
  const std::size_t begin = signature.find("T = ") + 4;
  return signature.substr(begin, signature.size() - 1 - begin);
}

}  // namespace fusedopt
