#pragma once

#include "host_device.h"

namespace fusedopt {

// Gradient of the penalised objective, the first line of every rule:
//   grad = (maximize ? -grad : grad) + weight_decay * param + l1 * sign(param)
// where clipping and loss scaling have multiplied grad before, at no cost: by way of the sign.
// A penalty that is zero is left out, as torch does: 0 * inf must not reach the gradient.
template <typename T>
struct PenalizedGrad {
  T grad_factor;
  T weight_decay;
  T l1;

  FUSEDOPT_HD T operator()(T grad, T param) const {
    grad = grad_factor * grad;
    grad = weight_decay != T(0) ? grad + weight_decay * param : grad;
    grad = l1 != T(0) ? grad + l1 * sign(param) : grad;
    return grad;
  }

  // Of an update without penalties, a copy that has dropped them is the same and can be faster.
  FUSEDOPT_HD bool has_penalty() const { return weight_decay != T(0) || l1 != T(0); }
  FUSEDOPT_HD void drop_penalty() { weight_decay = l1 = T(0); }

  FUSEDOPT_HD static T sign(T x) { return x > T(0) ? T(1) : (x < T(0) ? T(-1) : T(0)); }
};

template <typename T>
FUSEDOPT_HD PenalizedGrad<T> penalized_grad(bool maximize, double weight_decay, double l1) {
  return {maximize ? T(-1) : T(1), static_cast<T>(weight_decay), static_cast<T>(l1)};
}

}  // namespace fusedopt
