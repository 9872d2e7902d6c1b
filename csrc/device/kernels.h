#pragma once

// The kernels that are loaded on each GPU, and the GPUs themselves.

#include <cstdint>
#include <string>

#include "../multi_tensor/device_kernel.h"
#include "compiler.h"
#include "driver.h"
#include "kernel_state.h"

namespace fusedopt {

// What is known of a GPU once somebody has used it: for good, as its context is kept.
struct Device {
  int index;
  cuda::Context context;  // the primary one, which is torch's
  Compilation compilation;
  std::string model;
};

// Why no kernel can run on this GPU, and what to do about it; empty if they can.
std::string device_problem(int index);

// What runs there, in words.
std::string describe_device(int index);

// Throws DeviceProblem.
const Device& device(int index);

KernelState kernel_state(const DeviceKernel& kernel, int device);

// A kernel that was loaded, ready or on trial. Throws DeviceProblem if there is none.
cuda::Function function_of(const DeviceKernel& kernel, int device);

bool has_function(const DeviceKernel& kernel, int device);

void keep_function(const DeviceKernel& kernel, int device, cuda::Function function);
void set_state(const DeviceKernel& kernel, int device, KernelState state);

// Refuses a kernel that there is no memory for, and each time for twice as long: then it is unknown again.
// Whether this is the first time.
bool put_off(const DeviceKernel& kernel, int device);
bool was_put_off(const DeviceKernel& kernel, int device);
// How often that was over, or the kernel became ready before, all in all. Who steps without asking for
// kernels compares it with the last.
int num_put_off_no_longer();

// Forgets all, for tests that put another driver in the place of this one.
void forget_devices();

}  // namespace fusedopt
