#pragma once

#include "../update_rules/number.h"

namespace fusedopt {

// Options of one param group, read by name for a rule. Each throws what the caller is to see if there
// is no such option, or none of that kind.
class OptionReader {
 public:
  virtual double operator()(const char* name) const = 0;
  // Also where it is None.
  virtual double get(const char* name, double otherwise) const = 0;

  virtual bool flag(const char* name) const = 0;
  virtual bool flag(const char* name, bool otherwise) const = 0;

  // One that may be a tensor on the device, which a capturable step leaves there.
  virtual Number number(const char* name) const = 0;
  // One item of a pair of such.
  virtual Number number(const char* name, int item) const = 0;

 protected:
  ~OptionReader() = default;
};

}  // namespace fusedopt
