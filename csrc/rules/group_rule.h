#pragma once

#include "../multi_tensor/apply.h"

namespace fusedopt {

// A rule with the options of one group; what the plan needs to know of an algorithm.
class GroupRule {
 public:
  virtual ~GroupRule() = default;
  virtual unsigned state_mask() const = 0;
  virtual bool is_defined(double step, double largest) const = 0;
  virtual PreparedUpdate prepare(double step, const StoredAs& stored, Where where) const = 0;
};

}  // namespace fusedopt
