#include "loader.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <optional>
#include <stdexcept>

#include "../multi_tensor/parallel.h"
#include "cache.h"
#include "gpu.h"
#include "kernel_source.h"
#include "kernels.h"
#include "self_test.h"

namespace fusedopt {

namespace {

constexpr char kPassed[] = "passed";
constexpr double kSlowSeconds = 1;

// What is done here may be done while another thread captures a graph.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Driver& driver) : driver_(driver), mode_(cuda::kRelaxed) {
    driver_.check(driver_.exchange_capture_mode(&mode_), "allowing loads during a capture");
  }
  ~RelaxedCapture() { driver_.exchange_capture_mode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  const Driver& driver_;
  int mode_;
};

class Loader {
 public:
  Loader(const DeviceKernel& kernel, int index)
      : kernel_(kernel),
        index_(index),
        driver_(driver()),
        device_(device(index)),
        source_(kernel_source(kernel)),
        key_(device_.compilation.key(source_)) {}

  // Why what was compiled is not kept; empty if it is.
  const std::string& unkept() const { return unkept_; }

  // Throws DeviceProblem. True if it was compiled.
  bool load() {
    if (has_function(kernel_, index_)) return false;
    const Gpu gpu(index_, nullptr);
    const RelaxedCapture relaxed(driver_);
    std::optional<std::string> binary = cache_.read(kernel_.name, key_);
    // What is wrong with a file is mended by another.
    cuda::Result result = binary ? try_to_load(*binary) : cuda::kInvalidImage;
    const bool was_kept = result == 0 || result == cuda::kOutOfMemory;
    if (!was_kept) {
      binary = device_.compilation.compile(kernel_.name, source_);
      result = try_to_load(*binary);
      if (result == 0 || result == cuda::kOutOfMemory) {
        unkept_ = cache_.write(kernel_.name, key_, *binary);
      }
      const bool is_unfit =
          result == cuda::kUnsupportedPtxVersion || result == cuda::kNoBinaryForGpu;
      if (is_unfit && !device_.compilation.knows_gpu()) {
        throw DeviceProblem("NVRTC " + version_name(driver_.nvrtc) +
                            " does not know this GPU, and the driver, which knows CUDA " +
                            version_name(driver_.version) +
                            ", does not take what NVRTC makes for " + device_.compilation.target() +
                            ": update the driver, or torch");
      }
    }
    driver_.check(result, "loading it");
    return !was_kept;
  }

  // Throws DeviceProblem if it does not pass. `stream`: of who needs the kernel.
  void prove(SelfTest setting, cuda::Stream stream) const {
    if (setting == SelfTest::kNever) return;
    const std::string name = kernel_.name + "-verdict";
    const std::string key = device_.model + ", driver " + version_name(driver_.version) + ", " +
                            driver_.build + "\n" + key_;
    std::optional<std::string> verdict;
    if (setting == SelfTest::kOnce) verdict = cache_.read(name, key);
    if (!verdict) {
      verdict = tried_out(stream, [&](const std::string& lost) {
        const std::string unkept = cache_.write(name, key, lost);
        return unkept.empty() ? "it does without this kernel"
                              : "with FUSEDOPT_BACKEND=python, as this is not kept: " + unkept;
      });
      cache_.write(name, key, *verdict);
    }
    if (*verdict != kPassed) throw DeviceProblem(*verdict);
  }

 private:
  // `keep` is given the verdict on a kernel after which this process cannot use the GPU; what is to be
  // done.
  using Keep = std::function<std::string(const std::string& verdict)>;
  std::string tried_out(cuda::Stream stream, const Keep& keep) const {
    // One at a time: it has to be clear which of them went wrong.
    static std::mutex* const mutex = new std::mutex;
    const std::lock_guard<std::mutex> lock(*mutex);
    const Gpu gpu(index_, stream);
    const RelaxedCapture relaxed(driver_);
    const UncountedLaunches uncounted;
    const FlushDenormal::Scope as_the_gpu(FlushDenormal::off());
    gpu.wait();
    try {
      const std::string difference = self_test(kernel_, index_);
      return difference.empty() ? kPassed : difference;
    } catch (const ContextLost& lost) {
      const std::string why = std::string("when it was tried out, ") + lost.what();
      std::string to_do = ", after which a process cannot use the GPU: start it again";
      if (lost.may_be_a_kernels) {
        to_do += ", " + keep(why + "; FUSEDOPT_SELF_TEST=always tries it out again");
      }
      throw ContextLost(why + to_do, lost.may_be_a_kernels);
    }
  }

  cuda::Result try_to_load(const std::string& binary) const {
    cuda::Module module = nullptr;
    cuda::Function function = nullptr;
    int local_bytes = 0;
    if (const cuda::Result error = driver_.load_module(&module, binary.c_str())) return error;
    cuda::Result error = driver_.get_function(&function, module, kernel_.name.c_str());
    // What is loaded lazily is loaded now: a launch may be in a capture.
    if (error == 0) {
      error = driver_.function_attribute(&local_bytes, cuda::kLocalBytes, function);
    }
    if (error != 0) {
      driver_.unload_module(module);
      return error;
    }
    keep_function(kernel_, index_, function);
    return 0;
  }

  const DeviceKernel& kernel_;
  const int index_;
  const Driver& driver_;
  const Device& device_;
  const std::string source_, key_;
  const Cache cache_;
  std::string unkept_;
};

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

std::string in_tenths(double number) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f", number);
  return text;
}

std::string refusal(const DeviceKernel& kernel, int device, const std::string& why) {
  return "the kernel " + kernel.name + " is not used on cuda:" + std::to_string(device) + ": " +
         why;
}

// Throws DeviceProblem.
void load_and_prove_once(const DeviceKernel& kernel, int device, cuda::Stream stream,
                         SelfTest setting, TrialReport* report) {
  Loader loader(kernel, device);
  const Stopwatch compilation;
  if (loader.load()) {
    report->compile_seconds = compilation.seconds();
    report->unkept = loader.unkept();
  }
  const Stopwatch trial;
  loader.prove(setting, stream);
  report->trial_seconds = trial.seconds();
}

// Throws ContextLost.
TrialReport load_and_prove(const DeviceKernel& kernel, int device, cuda::Stream stream,
                           SelfTest setting, MakeRoom make_room) {
  TrialReport report;
  try {
    try {
      load_and_prove_once(kernel, device, stream, setting, &report);
    } catch (const OutOfMemory& full) {
      const RelaxedCapture relaxed(driver());
      const std::string failed = make_room();
      if (!failed.empty()) throw OutOfMemory(full.what() + ("; making room failed: " + failed));
      load_and_prove_once(kernel, device, stream, setting, &report);
    }
    set_state(kernel, device, KernelState::kReady);
  } catch (const ContextLost& lost) {
    throw ContextLost("fusedopt: " + refusal(kernel, device, lost.what()), lost.may_be_a_kernels);
  } catch (const OutOfMemory& problem) {
    report.is_told = !put_off(kernel, device);
    report.problem = problem.what() + std::string("; later steps try again");
  } catch (const DeviceProblem& problem) {
    set_state(kernel, device, KernelState::kRefused);
    report.problem = problem.what();
  }
  return report;
}

}  // namespace

LoadReport load_kernels(const NeededKernels& needed, const Streams& streams, MakeRoom make_room) {
  static std::mutex* const mutex = new std::mutex;  // threads may outlive the statics
  const std::lock_guard<std::mutex> lock(*mutex);
  LoadReport report;
  int compiled = 0;
  std::string unkept;
  const Stopwatch watch;
  for (const auto& [kernel, device] : needed) {
    if (kernel_state(*kernel, device) != KernelState::kUnknown)
      continue;  // another thread was here
    const TrialReport one =
        load_and_prove(*kernel, device, streams.at(device), self_test_setting(), make_room);
    compiled += one.compile_seconds > 0;
    if (!one.unkept.empty()) unkept = one.unkept;
    if (!one.problem.empty() && !one.is_told) {
      report.refused.push_back(refusal(*kernel, device, one.problem));
    }
  }
  const double taken = watch.seconds();
  if (compiled > 0 && taken >= kSlowSeconds) {
    report.slow = "compiled " + std::to_string(compiled) +
                  (compiled == 1 ? " kernel" : " kernels") + " in " + in_tenths(taken) + " s, " +
                  (unkept.empty() ? describe_cache() : "not kept: " + unkept);
  }
  return report;
}

TrialReport try_out(const DeviceKernel& kernel, int device, MakeRoom make_room) {
  try {
    return load_and_prove(kernel, device, nullptr, SelfTest::kAlways, make_room);
  } catch (const ContextLost& lost) {
    TrialReport report;
    report.problem = lost.what();
    return report;
  }
}

SelfTest self_test_setting() {
  const char* const value = std::getenv("FUSEDOPT_SELF_TEST");
  const std::string text = value == nullptr ? "" : value;
  if (text.empty()) return SelfTest::kOnce;
  if (text == "always") return SelfTest::kAlways;
  if (text == "never") return SelfTest::kNever;
  throw std::invalid_argument("FUSEDOPT_SELF_TEST=" + text + ": it is always or never");
}

std::string describe_cache() {
  const Cache cache;
  return cache.problem().empty() ? "kept in " + cache.folder() : "not kept: " + cache.problem();
}

}  // namespace fusedopt
