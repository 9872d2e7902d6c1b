#pragma once

#include "host_device.h"

namespace fusedopt {

// from + weight * (to - from), where rest is 1 - weight; as torch.lerp, in the form that is exact at
// the nearer end.
template <typename T>
FUSEDOPT_HD T lerp(T from, T to, T weight, T rest) {
  const T diff = to - from;
  return weight < T(0.5) ? from + weight * diff : to - rest * diff;
}

}  // namespace fusedopt
