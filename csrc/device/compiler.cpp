#include "compiler.h"

#if defined(__APPLE__)
#include <xlocale.h>
#else
#include <locale.h>
#endif

#include "../multi_tensor/tuning.h"
#include "kernel_source.h"

namespace fusedopt {

namespace {

constexpr int kLargeArguments = 12010;  // 32,764 bytes since CUDA 12.1
constexpr std::size_t kSmallArgumentBytes = 4096;

// NVRTC leaves the thread with the locale "C" (12.1 to 13.0), in which Python takes files for ASCII.
class KeptLocale {
 public:
  KeptLocale() : before_(uselocale(nullptr)) {}
  ~KeptLocale() { uselocale(before_); }
  KeptLocale(const KeptLocale&) = delete;
  KeptLocale& operator=(const KeptLocale&) = delete;

 private:
  const locale_t before_;
};

class OwnedProgram {
 public:
  OwnedProgram(const Driver& driver, const std::string& name, const std::string& source)
      : driver_(driver) {
    driver.check_nvrtc(
        driver.create_program(&program_, source.c_str(), name.c_str(), 0, nullptr, nullptr),
        "giving NVRTC a program");
  }
  ~OwnedProgram() { driver_.destroy_program(&program_); }
  OwnedProgram(const OwnedProgram&) = delete;
  OwnedProgram& operator=(const OwnedProgram&) = delete;

  template <typename Size, typename Get>
  std::string read(Size&& size_of, Get&& get, const char* what) const {
    std::size_t size = 0;
    driver_.check_nvrtc(size_of(program_, &size), what);
    std::string text(size, '\0');
    driver_.check_nvrtc(get(program_, text.data()), what);
    return text;
  }

  operator cuda::Program() const { return program_; }

 private:
  const Driver& driver_;
  cuda::Program program_ = nullptr;
};

}  // namespace

Compilation::Compilation(const Driver& driver, int architecture) : driver_(driver) {
  const int first = architecture / 10 * 10, nearest = driver.nearest_known(architecture);
  knows_gpu_ = nearest == architecture;
  is_machine_code_ = knows_gpu_ || driver.nearest_known(first) == first;
  known_ = is_machine_code_ && !knows_gpu_ ? first : nearest;
  const bool is_large = driver.version >= kLargeArguments && driver.nvrtc >= kLargeArguments;
  argument_bytes_ = is_large ? kMaxArgumentBytes : kSmallArgumentBytes;
}

std::string Compilation::target() const {
  return (is_machine_code_ ? "sm_" : "compute_") + std::to_string(known_);
}

std::vector<std::string> Compilation::options() const {
  return kernel_options(target(), argument_bytes_);
}

std::string Compilation::key(const std::string& source) const {
  std::string key = "NVRTC " + version_name(driver_.nvrtc) + "\n";
  for (const std::string& option : options()) key += option + "\n";
  return key + source;
}

std::string Compilation::compile(const std::string& name, const std::string& source) const {
  const KeptLocale locale;
  const OwnedProgram program(driver_, name, source);
  const std::vector<std::string> options = this->options();
  std::vector<const char*> words;
  for (const std::string& option : options) words.push_back(option.c_str());
  const cuda::Result result =
      driver_.compile_program(program, static_cast<int>(words.size()), words.data());
  if (result == cuda::kBuiltinOperationFailure) {
    throw DeviceProblem(
        "NVRTC cannot find libnvrtc-builtins, which belongs beside it: install torch, or the "
        "package of NVRTC that it needs, again");
  }
  if (result != 0) {
    const std::string log = program.read(driver_.log_size, driver_.get_log, "reading NVRTC's log");
    throw DeviceProblem("NVRTC " + version_name(driver_.nvrtc) + " cannot compile it (" +
                        std::to_string(result) + "): " + log.substr(0, 2000));
  }
  const char* const what = "reading what NVRTC compiled";
  return is_machine_code_ ? program.read(driver_.cubin_size, driver_.get_cubin, what)
                          : program.read(driver_.ptx_size, driver_.get_ptx, what);
}

}  // namespace fusedopt
