// Adamax (Kingma & Ba 2015, arXiv:1412.6980, section 7.1). State: exp_avg m, exp_inf u. At step t:
//   g += weight_decay * p + l1 * sign(p)
//   m += (1 - beta1) * (g - m)
//   u = max(beta2 * u, |g| + eps)
//   p -= lr / (1 - beta1^t) * m / u
#pragma once

#include <cmath>

#include "host_device.h"
#include "lerp.h"
#include "number.h"
#include "penalized_grad.h"
#include "rule.h"

namespace fusedopt {

template <typename T>
struct AdamaxUpdate {
  static constexpr int kNumStates = 2;

  PenalizedGrad<T> penalized_grad;
  T beta1, one_minus_beta1;
  T beta2;
  T eps;
  T step_size;  // lr / (1 - beta1^t)

  FUSEDOPT_HD bool has_penalty() const { return penalized_grad.has_penalty(); }
  FUSEDOPT_HD void drop_penalty() { penalized_grad.drop_penalty(); }

  FUSEDOPT_HD void operator()(T& param, T grad, T& exp_avg, T& exp_inf) const {
    using std::fabs;
    grad = penalized_grad(grad, param);
    exp_avg = lerp(exp_avg, grad, one_minus_beta1, beta1);
    const T decayed = beta2 * exp_inf, norm = fabs(grad) + eps;
    // torch.maximum: a NaN on either side stays.
    exp_inf = decayed > norm || decayed != decayed ? decayed : norm;
    param = param - step_size * exp_avg / exp_inf;
  }
};

struct Adamax {
  Number lr, beta1, beta2;
  double eps, weight_decay, l1;
  bool maximize;

  template <typename Options>
  static Adamax from(const Options& options) {
    return {options.number("lr"),    options.number("betas", 0), options.number("betas", 1),
            options("eps"),          options("weight_decay"),    options.get("l1", 0.0),
            options.flag("maximize")};
  }

  static constexpr Slot kSlots[] = {{"exp_avg"}, {"exp_inf", kUnsigned}};
  static constexpr Scalars::Names kScalars = {"step"};
  static constexpr bool kFirstStepFills = false;
  unsigned state_mask() const { return 0b11u; }

  // See Adam::is_defined.
  bool is_defined(double step, double largest) const {
    const double power1 = std::pow(beta1, step);
    return (!std::isinf(power1) || std::isinf(beta1)) && 1 - power1 != 0 &&
           fits(lr / (1 - power1), largest) && fits(1 - beta1, largest) &&
           fits(weight_decay, largest) && fits(l1, largest);
  }

  template <typename T, typename Use>
  FUSEDOPT_HD auto prepare(double step, Use&& use) const {
    const double beta1 = this->beta1;
    return use(AdamaxUpdate<T>{penalized_grad<T>(maximize, weight_decay, l1), static_cast<T>(beta1),
                               static_cast<T>(1 - beta1), static_cast<T>(beta2),
                               static_cast<T>(eps),
                               static_cast<T>(lr / (1 - std::pow(beta1, step)))});
  }
};

}  // namespace fusedopt
