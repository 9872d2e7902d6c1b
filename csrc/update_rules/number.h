#pragma once

#include <cmath>

#include "host_device.h"

namespace fusedopt {

// Whether a number is one of the dtype that has this largest one. torch's for-loop raises where it is
// not; as an infinity it would make a NaN of every zero that it is multiplied with.
FUSEDOPT_HD bool fits(double value, double largest) {
  return !(std::fabs(value) > largest) || std::isinf(value);
}

// A hyperparameter: a number, or one that the device reads from its memory when the update runs
// (capturable=True: a captured graph sees the values of its replay). The host does not know it.
struct Number {
  double value = 0;
  const void* address = nullptr;
  bool is_double = false;  // else a float is at the address

  FUSEDOPT_HD operator double() const {
#if defined(__CUDA_ARCH__) || defined(FUSEDOPT_KERNELS_ON_HOST)
    if (address != nullptr) {
      return is_double ? *static_cast<const double*>(address) : *static_cast<const float*>(address);
    }
#endif
    return value;
  }
};

}  // namespace fusedopt
