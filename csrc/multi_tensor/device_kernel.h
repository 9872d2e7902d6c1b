#pragma once

// A kernel of the device before it is compiled: there is one for each update of each rule, in float, in
// double, and for values that are not stored as they are.

#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "launch_table.h"

namespace fusedopt {

struct DeviceKernel {
  DeviceKernel(std::string name, const std::string& header, const std::string& call);

  std::string name;     // of its function
  std::string program;  // which includes headers of csrc/
  // Of the kernels of rules:
  int num_slots = 0;    // pointers of a tensor
  int num_scalars = 0;  // that a tensor has on the device if the kernel prepares
  bool is_plain = true;
  SlotDtypes stored;  // how values are stored, if they are not as they are
  // What it does, on the CPU; only in the module for tests.
  void (*on_host)(const LaunchTable& table) = nullptr;
};

const DeviceKernel& grad_norm_kernel();

// The kernels of one update for values that are not stored as they are, of which somebody has asked
// for each. They are never moved or forgotten.
class StoredKernels {
 public:
  // `make`: one whose name ends like this.
  const DeviceKernel& get(const SlotDtypes& dtypes,
                          const std::function<DeviceKernel(const std::string& suffix)>& make);

 private:
  std::mutex mutex_;
  std::map<std::uint32_t, DeviceKernel> kernels_;
};

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
