#pragma once

#include <cstdint>
#include <string>

namespace fusedopt {

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
