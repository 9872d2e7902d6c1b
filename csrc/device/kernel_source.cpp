#include "kernel_source.h"

#include <filesystem>
#include <set>
#include <sstream>
#include <stdexcept>

namespace fusedopt {

namespace {

class Program {
 public:
  // A text, with each header in place of the first line that includes it. Those of the standard
  // library, and what is for the preprocessor of separate files, are left out.
  void add(const std::string& text, const std::string& path) {
    const std::string folder = std::filesystem::path(path).parent_path().string();
    std::istringstream lines(text);
    std::string line;
    for (int number = 1; std::getline(lines, line); ++number) {
      if (line.rfind("#include \"", 0) == 0) {
        const std::string name = line.substr(10, line.rfind('"') - 10);
        add_header((std::filesystem::path(folder) / name).lexically_normal().generic_string());
        text_ += "#line " + std::to_string(number + 1) + " \"" + path + "\"\n";
      } else if (line.rfind("#include <", 0) == 0 || line.rfind("#pragma once", 0) == 0) {
        text_ += "\n";
      } else {
        text_ += line + "\n";
      }
    }
  }

  void add_header(const std::string& path) {
    if (!added_.insert(path).second) return;
    for (const Header& header : kernel_headers()) {
      if (path != header.path) continue;
      text_ += "#line 1 \"" + path + "\"\n";
      return add(header.text, path);
    }
    throw std::logic_error("fusedopt: a kernel includes " + path + ", which is not in the module");
  }

  const std::string& text() const { return text_; }

 private:
  std::string text_;
  std::set<std::string> added_;
};

}  // namespace

std::string kernel_source(const DeviceKernel& kernel) {
  Program program;
  program.add_header("device/standard_library.h");
  program.add(kernel.program, kernel.name);
  return program.text();
}

std::vector<std::string> kernel_options(const std::string& architecture,
                                        std::size_t argument_bytes) {
  // No contraction into FMA, and every operation as IEEE 754 has it: the bits of the CPU.
  return {"--std=c++17", "--fmad=false", "--gpu-architecture=" + architecture,
          "--define-macro=FUSEDOPT_ARGUMENT_BYTES=" + std::to_string(argument_bytes),
          "--device-as-default-execution-space"};
}

}  // namespace fusedopt
