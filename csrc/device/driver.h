#pragma once

// NVRTC and the CUDA driver as torch has them: one library of torch's brings both. Nothing of CUDA is
// needed to build this; what is here of its types is all that is used.

#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

namespace fusedopt {

namespace cuda {

using Result = int;  // 0 is success
using Device = int;
using Pointer = unsigned long long;  // into a device's memory
using Context = struct ContextOf*;
using Module = struct ModuleOf*;
using Function = struct FunctionOf*;
using Program = struct ProgramOf*;
using Stream = void*;

enum DeviceAttribute { kMajor = 75, kMinor = 76 };
enum FunctionAttribute { kLocalBytes = 3 };
enum CaptureMode { kRelaxed = 2 };
enum StreamFlags { kNonBlocking = 1 };
enum Errors {
  kOutOfMemory = 2,
  kInvalidImage = 200,
  kNoBinaryForGpu = 209,
  kUnsupportedPtxVersion = 222,
  kBuiltinOperationFailure = 7,  // of NVRTC
};

}  // namespace cuda

// Name and parameters of each function; X(pop_context, cuCtxPopCurrent_v2, (cuda::Context*)), say.
#define FUSEDOPT_CUDA_FUNCTIONS(X)                                                                 \
  X(init, cuInit, (unsigned))                                                                      \
  X(driver_version, cuDriverGetVersion, (int*))                                                    \
  X(error_string, cuGetErrorString, (cuda::Result, const char**))                                  \
  X(device_count, cuDeviceGetCount, (int*))                                                        \
  X(get_device, cuDeviceGet, (cuda::Device*, int))                                                 \
  X(device_name, cuDeviceGetName, (char*, int, cuda::Device))                                      \
  X(device_attribute, cuDeviceGetAttribute, (int*, int, cuda::Device))                             \
  X(retain_context, cuDevicePrimaryCtxRetain, (cuda::Context*, cuda::Device))                      \
  X(push_context, cuCtxPushCurrent_v2, (cuda::Context))                                            \
  X(pop_context, cuCtxPopCurrent_v2, (cuda::Context*))                                             \
  X(exchange_capture_mode, cuThreadExchangeStreamCaptureMode, (int*))                              \
  X(load_module, cuModuleLoadData, (cuda::Module*, const void*))                                   \
  X(unload_module, cuModuleUnload, (cuda::Module))                                                 \
  X(get_function, cuModuleGetFunction, (cuda::Function*, cuda::Module, const char*))               \
  X(function_attribute, cuFuncGetAttribute, (int*, int, cuda::Function))                           \
  X(launch, cuLaunchKernel,                                                                        \
    (cuda::Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,         \
     cuda::Stream, void**, void**))                                                                \
  X(is_capturing, cuStreamIsCapturing, (cuda::Stream, int*))                                       \
  X(create_stream, cuStreamCreate, (cuda::Stream*, unsigned))                                      \
  X(destroy_stream, cuStreamDestroy_v2, (cuda::Stream))                                            \
  X(wait, cuStreamSynchronize, (cuda::Stream))                                                     \
  X(allocate, cuMemAlloc_v2, (cuda::Pointer*, std::size_t))                                        \
  X(release, cuMemFree_v2, (cuda::Pointer))                                                        \
  X(copy_to_device, cuMemcpyHtoDAsync_v2, (cuda::Pointer, const void*, std::size_t, cuda::Stream)) \
  X(copy_to_host, cuMemcpyDtoHAsync_v2, (void*, cuda::Pointer, std::size_t, cuda::Stream))         \
  X(fill_words, cuMemsetD32Async, (cuda::Pointer, unsigned, std::size_t, cuda::Stream))            \
  X(nvrtc_version, nvrtcVersion, (int*, int*))                                                     \
  X(num_architectures, nvrtcGetNumSupportedArchs, (int*))                                          \
  X(get_architectures, nvrtcGetSupportedArchs, (int*))                                             \
  X(create_program, nvrtcCreateProgram,                                                            \
    (cuda::Program*, const char*, const char*, int, const char* const*, const char* const*))       \
  X(destroy_program, nvrtcDestroyProgram, (cuda::Program*))                                        \
  X(compile_program, nvrtcCompileProgram, (cuda::Program, int, const char* const*))                \
  X(log_size, nvrtcGetProgramLogSize, (cuda::Program, std::size_t*))                               \
  X(get_log, nvrtcGetProgramLog, (cuda::Program, char*))                                           \
  X(cubin_size, nvrtcGetCUBINSize, (cuda::Program, std::size_t*))                                  \
  X(get_cubin, nvrtcGetCUBIN, (cuda::Program, char*))                                              \
  X(ptx_size, nvrtcGetPTXSize, (cuda::Program, std::size_t*))                                      \
  X(get_ptx, nvrtcGetPTX, (cuda::Program, char*))

// Why a GPU, or a kernel, cannot be used, and what to do about it.
struct DeviceProblem : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// It is full, now.
struct OutOfMemory : DeviceProblem {
  using DeviceProblem::DeviceProblem;
};

// The process cannot use it any more: a kernel, be it another's, did what none may do, or the GPU failed.
struct ContextLost : DeviceProblem {
  ContextLost(const std::string& problem, bool may_be_a_kernels)
      : DeviceProblem(problem), may_be_a_kernels(may_be_a_kernels) {}
  bool may_be_a_kernels;  // not that of memory, a link, or somebody who ended it
};

struct Driver {
#define FUSEDOPT_MEMBER(name, symbol, parameters) cuda::Result(*name) parameters = nullptr;
  FUSEDOPT_CUDA_FUNCTIONS(FUSEDOPT_MEMBER)
#undef FUSEDOPT_MEMBER
  const char* (*nvrtc_error_string)(cuda::Result) = nullptr;
  int version = 0;    // of CUDA that the driver knows: 12040 is 12.4
  std::string build;  // of the driver: several know the same CUDA
  int nvrtc = 0;      // as `version`
  int num_devices = 0;
  std::vector<int> architectures;  // which NVRTC knows, 90 for sm_90; not empty

  // Throw DeviceProblem, or what is derived from it, if a function, of the driver or of NVRTC,
  // failed: what it did, in words.
  void check(cuda::Result result, const std::string& what) const;
  void check_nvrtc(cuda::Result result, const std::string& what) const;
  // The newest architecture that NVRTC knows, and a GPU of this one runs the code of; 0 if there is none.
  int nearest_known(int architecture) const;
};

// Where torch's library is; or why there is none. Before anybody asks for the driver.
void use_library(const std::string& path, const std::string& problem);

// Loaded at the first call. Throws DeviceProblem if it cannot be used, each time the same.
const Driver& driver();

std::string version_name(int version);  // 12.4 for 12040

}  // namespace fusedopt
