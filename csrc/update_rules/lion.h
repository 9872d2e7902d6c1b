// Lion (Chen et al. 2023, arXiv:2302.06675). State: exp_avg m.
//   p -= lr * (weight_decay * p + l1 * sign(p))
//   p -= lr * sign(beta1 * m + (1 - beta1) * g)
//   m = beta2 * m + (1 - beta2) * g
#pragma once

#include "decoupled_penalty.h"
#include "host_device.h"
#include "number.h"
#include "penalized_grad.h"
#include "rule.h"

namespace fusedopt {

template <typename T>
struct LionUpdate {
  static constexpr int kNumStates = 1;

  PenalizedGrad<T> penalized_grad;  // without penalties
  DecoupledPenalty<T> decoupled_penalty;
  T lr;
  T beta1, one_minus_beta1;
  T beta2, one_minus_beta2;

  FUSEDOPT_HD bool has_penalty() const { return decoupled_penalty.has_penalty(); }
  FUSEDOPT_HD void drop_penalty() {
    penalized_grad.drop_penalty();
    decoupled_penalty.drop_penalty();
  }

  FUSEDOPT_HD void operator()(T& param, T grad, T& exp_avg) const {
    grad = penalized_grad(grad, param);
    param = decoupled_penalty(param);
    param = param - lr * PenalizedGrad<T>::sign(beta1 * exp_avg + one_minus_beta1 * grad);
    exp_avg = beta2 * exp_avg + one_minus_beta2 * grad;
  }
};

struct Lion {
  Number lr, beta1, beta2;
  double weight_decay, l1;
  bool maximize;

  template <typename Options>
  static Lion from(const Options& options) {
    return {options.number("lr"),    options.number("betas", 0), options.number("betas", 1),
            options("weight_decay"), options.get("l1", 0.0),     options.flag("maximize")};
  }

  static constexpr Slot kSlots[] = {{"exp_avg"}};
  static constexpr Scalars::Names kScalars = {};
  static constexpr bool kFirstStepFills = false;
  unsigned state_mask() const { return 0b1u; }

  // See Adam::is_defined.
  bool is_defined(double, double largest) const {
    return fits(lr, largest) && fits(1 - beta1, largest) && fits(1 - beta2, largest) &&
           penalties_fit(true, lr, weight_decay, l1, largest);
  }

  template <typename T, typename Use>
  FUSEDOPT_HD auto prepare(double, Use&& use) const {
    const double lr = this->lr, beta1 = this->beta1, beta2 = this->beta2;
    return use(LionUpdate<T>{penalized_grad<T>(maximize, 0, 0),
                             decoupled_penalty<T>(true, lr, weight_decay, l1), static_cast<T>(lr),
                             static_cast<T>(beta1), static_cast<T>(1 - beta1),
                             static_cast<T>(beta2), static_cast<T>(1 - beta2)});
  }
};

}  // namespace fusedopt
