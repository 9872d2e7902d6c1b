#include "kernels.h"

#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

namespace fusedopt {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kOldestArchitecture = 75;
constexpr std::chrono::milliseconds kFirstWait{250};

struct Loaded {
  cuda::Function function = nullptr;
  KernelState state = KernelState::kUnknown;
  Clock::duration wait{0};  // not 0: it was put off, for so long
  Clock::time_point due{};
  bool is_counted = false;  // that it is due

  bool is_due() const {
    return state == KernelState::kRefused && wait.count() != 0 && Clock::now() >= due;
  }
};

struct Known {
  std::mutex mutex;
  std::map<int, std::unique_ptr<Device>> devices;
  std::map<std::pair<const DeviceKernel*, int>, Loaded> kernels;
  int num_due = 0;
};

Known& known() {
  static Known* const known = new Known;  // threads may outlive the statics
  return *known;
}

cuda::Device handle_of(const Driver& driver, int index) {
  if (index >= driver.num_devices) {
    throw DeviceProblem("the driver has " + std::to_string(driver.num_devices) +
                        " GPUs, and cuda:" + std::to_string(index) +
                        " is not among them: set CUDA_VISIBLE_DEVICES before the process starts");
  }
  cuda::Device handle = 0;
  driver.check(driver.get_device(&handle, index), "finding cuda:" + std::to_string(index));
  return handle;
}

int architecture_of(const Driver& driver, cuda::Device handle) {
  int major = 0, minor = 0;
  driver.check(driver.device_attribute(&major, cuda::kMajor, handle), "asking a GPU what it is");
  driver.check(driver.device_attribute(&minor, cuda::kMinor, handle), "asking a GPU what it is");
  const int architecture = major * 10 + minor;
  if (architecture < kOldestArchitecture) {
    throw DeviceProblem("it is sm_" + std::to_string(architecture) +
                        ", and the kernels need sm_75 (Turing) or newer");
  }
  if (driver.nearest_known(architecture) == 0) {
    throw DeviceProblem("it is sm_" + std::to_string(architecture) + ", and NVRTC " +
                        version_name(driver.nvrtc) +
                        " makes nothing for GPUs so old: install a torch for an older CUDA");
  }
  return architecture;
}

std::string model_of(const Driver& driver, cuda::Device handle) {
  char name[256] = "";
  driver.check(driver.device_name(name, sizeof(name), handle), "asking a GPU for its name");
  return name;
}

}  // namespace

std::string device_problem(int index) {
  try {
    const Driver& driver = fusedopt::driver();
    architecture_of(driver, handle_of(driver, index));
    return "";
  } catch (const DeviceProblem& problem) {
    return problem.what();
  }
}

std::string describe_device(int index) {
  const Driver& driver = fusedopt::driver();
  const cuda::Device handle = handle_of(driver, index);
  const int architecture = architecture_of(driver, handle);
  const Compilation compilation(driver, architecture);
  return model_of(driver, handle) + ", sm_" + std::to_string(architecture) +
         ": kernels compiled by NVRTC " + version_name(driver.nvrtc) +
         (compilation.knows_gpu() ? ""
                                  : ", which does not know this GPU, for " + compilation.target()) +
         "; the driver knows CUDA " + version_name(driver.version);
}

const Device& device(int index) {
  const Driver& driver = fusedopt::driver();
  Known& all = known();
  const std::lock_guard<std::mutex> lock(all.mutex);
  std::unique_ptr<Device>& found = all.devices[index];
  if (found == nullptr) {
    const cuda::Device handle = handle_of(driver, index);
    const int architecture = architecture_of(driver, handle);
    cuda::Context context = nullptr;
    driver.check(driver.retain_context(&context, handle), "taking the context of a GPU");
    found.reset(new Device{index, context, {driver, architecture}, model_of(driver, handle)});
  }
  return *found;
}

KernelState kernel_state(const DeviceKernel& kernel, int device) {
  Known& all = known();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.kernels.find({&kernel, device});
  if (found == all.kernels.end() || found->second.is_due()) return KernelState::kUnknown;
  return found->second.state;
}

cuda::Function function_of(const DeviceKernel& kernel, int device) {
  Known& all = known();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.kernels.find({&kernel, device});
  if (found == all.kernels.end() || found->second.function == nullptr) {
    throw DeviceProblem("fusedopt: " + kernel.name +
                        " is not loaded on cuda:" + std::to_string(device));
  }
  return found->second.function;
}

bool has_function(const DeviceKernel& kernel, int device) {
  Known& all = known();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.kernels[{&kernel, device}].function != nullptr;
}

void keep_function(const DeviceKernel& kernel, int device, cuda::Function function) {
  Known& all = known();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.kernels[{&kernel, device}].function = function;
}

void set_state(const DeviceKernel& kernel, int device, KernelState state) {
  Known& all = known();
  const std::lock_guard<std::mutex> lock(all.mutex);
  Loaded& one = all.kernels[{&kernel, device}];
  one.state = state;
  all.num_due += one.wait.count() != 0 && !one.is_counted;
  one.wait = {};
}

bool put_off(const DeviceKernel& kernel, int device) {
  Known& all = known();
  const std::lock_guard<std::mutex> lock(all.mutex);
  Loaded& one = all.kernels[{&kernel, device}];
  const bool is_first = one.wait.count() == 0;
  one.state = KernelState::kRefused;
  one.wait = is_first ? kFirstWait : 2 * one.wait;
  one.due = Clock::now() + one.wait;
  one.is_counted = false;
  return is_first;
}

bool was_put_off(const DeviceKernel& kernel, int device) {
  Known& all = known();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.kernels[{&kernel, device}].wait.count() != 0;
}

int num_put_off_no_longer() {
  Known& all = known();
  const std::lock_guard<std::mutex> lock(all.mutex);
  for (auto& [kernel, one] : all.kernels) {
    if (one.is_counted || !one.is_due()) continue;
    one.is_counted = true;
    ++all.num_due;
  }
  return all.num_due;
}

void forget_devices() {
  Known& all = known();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.devices.clear();
  all.kernels.clear();
}

}  // namespace fusedopt
