// Adadelta (Zeiler 2012, arXiv:1212.5701). State: square_avg v, acc_delta a.
//   g += weight_decay * p + l1 * sign(p)
//   v = rho * v + (1 - rho) * g^2
//   d = sqrt(a + eps) / sqrt(v + eps) * g
//   a = rho * a + (1 - rho) * d^2
//   p -= lr * d
#pragma once

#include <cmath>

#include "host_device.h"
#include "number.h"
#include "penalized_grad.h"
#include "rule.h"

namespace fusedopt {

template <typename T>
struct AdadeltaUpdate {
  static constexpr int kNumStates = 2;

  PenalizedGrad<T> penalized_grad;
  T lr;
  T rho, one_minus_rho;
  T eps;

  FUSEDOPT_HD bool has_penalty() const { return penalized_grad.has_penalty(); }
  FUSEDOPT_HD void drop_penalty() { penalized_grad.drop_penalty(); }

  FUSEDOPT_HD void operator()(T& param, T grad, T& square_avg, T& acc_delta) const {
    using std::sqrt;
    grad = penalized_grad(grad, param);
    square_avg = rho * square_avg + one_minus_rho * grad * grad;
    const T delta = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * grad;
    acc_delta = rho * acc_delta + one_minus_rho * delta * delta;
    param = param - lr * delta;
  }
};

struct Adadelta {
  Number lr;
  double rho, eps, weight_decay, l1;
  bool maximize;

  template <typename Options>
  static Adadelta from(const Options& options) {
    return {options.number("lr"),    options("rho"),         options("eps"),
            options("weight_decay"), options.get("l1", 0.0), options.flag("maximize")};
  }

  static constexpr Slot kSlots[] = {{"square_avg", kUnsigned}, {"acc_delta", kUnsigned}};
  static constexpr Scalars::Names kScalars = {"step"};
  static constexpr bool kFirstStepFills = false;
  unsigned state_mask() const { return 0b11u; }

  // See Adam::is_defined.
  bool is_defined(double, double largest) const {
    return fits(lr, largest) && fits(1 - rho, largest) && fits(weight_decay, largest) &&
           fits(l1, largest);
  }

  template <typename T, typename Use>
  FUSEDOPT_HD auto prepare(double, Use&& use) const {
    return use(AdadeltaUpdate<T>{penalized_grad<T>(maximize, weight_decay, l1), static_cast<T>(lr),
                                 static_cast<T>(rho), static_cast<T>(1 - rho),
                                 static_cast<T>(eps)});
  }
};

}  // namespace fusedopt
