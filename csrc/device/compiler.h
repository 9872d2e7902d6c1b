#pragma once

#include <string>
#include <vector>

#include "driver.h"

namespace fusedopt {

// For a GPU of an architecture, 90, say. If NVRTC does not know it: machine code for the first of the same
// generation, 100 for 103 (not for another, 101, which may be that of a system on a chip), else PTX for
// the newest that it knows and is not newer.
class Compilation {
 public:
  Compilation(const Driver& driver, int architecture);

  bool knows_gpu() const { return knows_gpu_; }
  // sm_90 for machine code, compute_90 for PTX.
  std::string target() const;
  std::vector<std::string> options() const;
  // How large the argument of a kernel may be.
  std::size_t argument_bytes() const { return argument_bytes_; }

  // What the result depends on.
  std::string key(const std::string& source) const;
  // Throws DeviceProblem.
  std::string compile(const std::string& name, const std::string& source) const;

 private:
  const Driver& driver_;
  bool knows_gpu_, is_machine_code_;
  int known_;
  std::size_t argument_bytes_;
};

}  // namespace fusedopt
