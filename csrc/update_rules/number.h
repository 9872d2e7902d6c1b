#pragma once

#include "host_device.h"

namespace fusedopt {

// A hyperparameter: a number, or one that the device reads from its memory when the update runs
// (capturable=True: a captured graph sees the values of its replay). The host does not know it.
struct Number {
  double value = 0;
  const void* address = nullptr;
  bool is_double = false;  // else a float is at the address

  FUSEDOPT_HD operator double() const {
#if defined(__CUDA_ARCH__) || defined(FUSEDOPT_CUDA_ON_HOST)
    if (address != nullptr) {
      return is_double ? *static_cast<const double*>(address) : *static_cast<const float*>(address);
    }
#endif
    return value;
  }
};

}  // namespace fusedopt
