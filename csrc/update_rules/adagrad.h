// Adagrad (Duchi, Hazan & Singer 2011, JMLR 12). State: sum. At step t:
//   g += weight_decay * p + l1 * sign(p)
//   sum += g^2
//   p -= lr / (1 + (t - 1) * lr_decay) * g / (sqrt(sum) + eps)
#pragma once

#include <cmath>

#include "host_device.h"
#include "number.h"
#include "penalized_grad.h"
#include "rule.h"

namespace fusedopt {

template <typename T>
struct AdagradUpdate {
  static constexpr int kNumStates = 1;

  PenalizedGrad<T> penalized_grad;
  T decayed_lr;
  T eps;

  FUSEDOPT_HD bool has_penalty() const { return penalized_grad.has_penalty(); }
  FUSEDOPT_HD void drop_penalty() { penalized_grad.drop_penalty(); }

  FUSEDOPT_HD void operator()(T& param, T grad, T& sum) const {
    using std::sqrt;
    grad = penalized_grad(grad, param);
    sum = sum + grad * grad;
    param = param - decayed_lr * grad / (sqrt(sum) + eps);
  }
};

struct Adagrad {
  Number lr;
  double lr_decay, eps, weight_decay, l1;
  bool maximize;

  template <typename Options>
  static Adagrad from(const Options& options) {
    return {options.number("lr"),    options("lr_decay"),    options("eps"),
            options("weight_decay"), options.get("l1", 0.0), options.flag("maximize")};
  }

  static constexpr Slot kSlots[] = {{"sum", kUnsigned}};
  static constexpr Scalars::Names kScalars = {"step"};
  static constexpr bool kFirstStepFills = false;
  unsigned state_mask() const { return 0b1u; }

  // See Adam::is_defined.
  bool is_defined(double step, double largest) const {
    const double divisor = 1 + (step - 1) * lr_decay;
    return divisor != 0 && fits(lr / divisor, largest) && fits(weight_decay, largest) &&
           fits(l1, largest);
  }

  template <typename T, typename Use>
  FUSEDOPT_HD auto prepare(double step, Use&& use) const {
    return use(AdagradUpdate<T>{penalized_grad<T>(maximize, weight_decay, l1),
                                static_cast<T>(lr / (1 + (step - 1) * lr_decay)),
                                static_cast<T>(eps)});
  }
};

}  // namespace fusedopt
