#pragma once

// From a kernel's source to one that is loaded and has proven itself.

#include <map>
#include <string>
#include <vector>

#include "driver.h"
#include "kernel_state.h"

namespace fusedopt {

// What a load came to, in words.
struct LoadReport {
  std::vector<std::string> refused;  // what is not used, and why
  std::string slow;                  // if it took seconds: what did
};

// Those of who needs kernels, by device: what they were given before comes before a trial, which is not
// blamed for it.
using Streams = std::map<int, cuda::Stream>;

// Frees memory of GPUs that nobody uses; then what failed for want of it is tried once more. Called
// without the interpreter lock.
using MakeRoom = std::string (*)();  // why it failed, if it did

// Compiles and tries out what is not in the cache, and loads. Afterwards each is ready or refused; throws
// ContextLost if none can be. Takes seconds: without the interpreter lock. Not while a stream of this
// thread is captured.
LoadReport load_kernels(const NeededKernels& needed, const Streams& streams, MakeRoom make_room);

// What one kernel came to, for who asks: compiled if it is not in the cache, and tried out although it
// has been.
struct TrialReport {
  double compile_seconds = 0;  // 0: it was in the cache
  double trial_seconds = 0;
  std::string unkept;    // why what was compiled is not kept; empty if it is
  std::string problem;   // empty: it passed
  bool is_told = false;  // the problem is one that lasts
};

// Different kernels may be tried out at the same time.
TrialReport try_out(const DeviceKernel& kernel, int device, MakeRoom make_room);

// FUSEDOPT_SELF_TEST: whether a compiled kernel is tried out before its first use: once on a machine,
// in every process, or never. Throws std::invalid_argument if it is none of them.
enum class SelfTest { kOnce, kAlways, kNever };
SelfTest self_test_setting();

// Where compiled kernels are kept, or why they are not.
std::string describe_cache();

}  // namespace fusedopt
