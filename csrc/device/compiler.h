#pragma once

#include <string>
#include <vector>

#include "driver.h"

namespace fusedopt {

// Machine code for an architecture that NVRTC knows (90, say), else PTX for the newest that it does.
class Compilation {
 public:
  Compilation(const Driver& driver, int architecture);

  std::vector<std::string> options() const;
  // How large the argument of a kernel may be.
  std::size_t argument_bytes() const { return argument_bytes_; }

  // What the result depends on.
  std::string key(const std::string& source) const;
  // Throws DeviceProblem.
  std::string compile(const std::string& name, const std::string& source) const;

 private:
  const Driver& driver_;
  bool is_known_;
  int architecture_;
  std::size_t argument_bytes_;
};

}  // namespace fusedopt
