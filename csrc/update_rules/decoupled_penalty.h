#pragma once

#include "host_device.h"
#include "number.h"
#include "penalized_grad.h"

namespace fusedopt {

// Penalties that do not pass through the state:
//   param -= lr * (weight_decay * param + l1 * sign(param))
template <typename T>
struct DecoupledPenalty {
  T decay;  // 1 - lr * weight_decay
  T l1;     // lr * l1

  FUSEDOPT_HD T operator()(T param) const {
    const T l1_step = l1 * PenalizedGrad<T>::sign(param);
    param = param * decay;
    return l1 != T(0) ? param - l1_step : param;
  }

  FUSEDOPT_HD bool has_penalty() const { return l1 != T(0); }
  FUSEDOPT_HD void drop_penalty() { l1 = T(0); }
};

// One that does nothing unless it is decoupled.
template <typename T>
FUSEDOPT_HD DecoupledPenalty<T> decoupled_penalty(bool decoupled, double lr, double weight_decay,
                                                  double l1) {
  return {static_cast<T>(decoupled && weight_decay != 0 ? 1 - lr * weight_decay : 1),
          static_cast<T>(decoupled && l1 != 0 ? lr * l1 : 0)};
}

// Whether what is left of the penalties fits: of decoupled ones lr * l1.
FUSEDOPT_HD bool penalties_fit(bool decoupled, double lr, double weight_decay, double l1,
                               double largest) {
  return decoupled ? fits(l1 != 0 ? lr * l1 : 0, largest)
                   : fits(weight_decay, largest) && fits(l1, largest);
}

}  // namespace fusedopt
