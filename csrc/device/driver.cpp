#include "driver.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <iterator>
#include <mutex>

namespace fusedopt {

namespace {

constexpr int kOldestDriver = 12000;  // R525
constexpr int kOldestNvrtc = 12000;
constexpr char kNoDriver[] = "there is no NVIDIA driver, install it to use a GPU: ";

// After which every call fails, whatever it is: see cuda.h. 701, a launch that asks for too much, is none.
bool is_lasting(cuda::Result result) {
  static constexpr cuda::Result kLasting[] = {214, 220, 226, 700, 702, 709, 710,
                                              714, 715, 716, 717, 718, 719, 721};
  return std::find(std::begin(kLasting), std::end(kLasting), result) != std::end(kLasting);
}

// What a kernel can bring about by itself: accesses to other memory, assertions, bad instructions.
bool may_be_a_kernels(cuda::Result result) {
  return result == 700 || result == 710 || (result >= 714 && result <= 719);
}

struct Library {
  std::mutex mutex;
  std::string path, problem = "no library of torch's was named";
  bool is_loaded = false;
  Driver driver;
  std::atomic<pid_t> process{0};  // which has initialized the driver
};

Library& library() {
  static Library* const library = new Library;  // threads may outlive the statics
  return *library;
}

// The file that a function is in, empty if nobody knows; where links to it lead.
std::filesystem::path file_of(void* function) {
  Dl_info info;
  std::error_code none;
  if (dladdr(function, &info) == 0) return {};
  return std::filesystem::canonical(info.dli_fname, none);
}

// NVRTC opens its builtins by name, and finds them only where the process has opened them before.
void open_builtins(const Driver& driver) {
  std::error_code none;
  const auto folder = file_of(reinterpret_cast<void*>(driver.nvrtc_version)).parent_path();
  for (const auto& entry : std::filesystem::directory_iterator(folder, none)) {
    const std::string name = entry.path().filename().string();
    if (name.rfind("libnvrtc-builtins", 0) == 0 && name.find(".alt.") == std::string::npos) {
      dlopen(entry.path().c_str(), RTLD_NOW | RTLD_GLOBAL);
    }
  }
}

// libcuda.so.580.95.05, and its size, as not every system has it under such a name.
std::string build_of(const Driver& driver) {
  std::error_code none;
  const auto file = file_of(reinterpret_cast<void*>(driver.init));
  return file.filename().string() + ", " + std::to_string(std::filesystem::file_size(file, none)) +
         " bytes";
}

void load(const std::string& path, Driver* driver) {
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const std::string why = dlerror();
    if (why.find("libcuda.so") != std::string::npos) throw DeviceProblem(kNoDriver + why);
    throw DeviceProblem("torch's NVRTC and the driver cannot be loaded: " + why);
  }
  const auto find = [&](const char* symbol) {
    void* const found = dlsym(handle, symbol);
    if (found == nullptr) {
      throw DeviceProblem("the driver or NVRTC of " + path + " has no " + symbol +
                          ": update the driver, or torch");
    }
    return found;
  };
#define FUSEDOPT_FIND(name, symbol, parameters) \
  driver->name = reinterpret_cast<decltype(driver->name)>(find(#symbol));
  FUSEDOPT_CUDA_FUNCTIONS(FUSEDOPT_FIND)
#undef FUSEDOPT_FIND
  driver->nvrtc_error_string =
      reinterpret_cast<decltype(driver->nvrtc_error_string)>(find("nvrtcGetErrorString"));
  int major = 0, minor = 0;
  driver->check_nvrtc(driver->nvrtc_version(&major, &minor), "asking NVRTC for its version");
  driver->nvrtc = major * 1000 + minor * 10;
  if (driver->nvrtc < kOldestNvrtc) {
    throw DeviceProblem("NVRTC is " + version_name(driver->nvrtc) + ", fusedopt needs " +
                        version_name(kOldestNvrtc) + ": update torch");
  }
  driver->check(driver->driver_version(&driver->version), "asking the driver for its version");
  if (driver->version == 0) {
    throw DeviceProblem(kNoDriver + std::string("its library is here, and knows no version"));
  }
  if (driver->version < kOldestDriver) {
    throw DeviceProblem("this driver knows CUDA " + version_name(driver->version) +
                        ", fusedopt needs " + version_name(kOldestDriver) + ": update the driver");
  }
  driver->build = build_of(*driver);
  driver->check(driver->init(0), "starting the driver");
  driver->check(driver->device_count(&driver->num_devices), "counting the GPUs");
  int count = 0;
  driver->check_nvrtc(driver->num_architectures(&count), "asking NVRTC for its architectures");
  if (count < 1) throw DeviceProblem("NVRTC knows no architecture");
  driver->architectures.resize(static_cast<std::size_t>(count));
  driver->check_nvrtc(driver->get_architectures(driver->architectures.data()),
                      "asking NVRTC for its architectures");
  open_builtins(*driver);
}

}  // namespace

void Driver::check(cuda::Result result, const std::string& what) const {
  if (result == 0) return;
  const char* text = nullptr;
  if (error_string(result, &text) != 0 || text == nullptr) text = "unknown error";
  const std::string problem = what + " failed: " + text + " (" + std::to_string(result) + ")";
  if (result == cuda::kOutOfMemory) throw OutOfMemory(problem);
  if (is_lasting(result)) throw ContextLost(problem, may_be_a_kernels(result));
  throw DeviceProblem(problem);
}

void Driver::check_nvrtc(cuda::Result result, const std::string& what) const {
  if (result == 0) return;
  throw DeviceProblem(what + " failed: " + nvrtc_error_string(result) + " (" +
                      std::to_string(result) + ")");
}

int Driver::nearest_known(int architecture) const {
  int nearest = 0;
  for (const int known : architectures) {
    if (known <= architecture) nearest = std::max(nearest, known);
  }
  return nearest;
}

void use_library(const std::string& path, const std::string& problem) {
  Library& loaded = library();
  const std::lock_guard<std::mutex> lock(loaded.mutex);
  loaded.path = path;
  loaded.problem = problem;
  loaded.is_loaded = false;
  loaded.process = 0;
}

const Driver& driver() {
  Library& loaded = library();
  // Before the lock, which a thread of the parent may have held.
  const pid_t process = loaded.process;
  if (process != 0 && process != getpid()) {
    throw DeviceProblem(
        "this process was forked from one that had used the GPU: start it with the method 'spawn'");
  }
  const std::lock_guard<std::mutex> lock(loaded.mutex);
  if (!loaded.is_loaded && loaded.problem.empty()) {
    try {
      load(loaded.path, &loaded.driver);
      loaded.is_loaded = true;
      loaded.process = getpid();
    } catch (const DeviceProblem& problem) {
      loaded.problem = problem.what();
    }
  }
  if (!loaded.is_loaded) throw DeviceProblem(loaded.problem);
  return loaded.driver;
}

std::string version_name(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace fusedopt
