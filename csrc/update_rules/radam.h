// RAdam (Liu et al. 2020, arXiv:1908.03265). State: exp_avg m, exp_avg_sq v. At step t, with g and p
// penalized as by Adam or, decoupled, by AdamW:
//   m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2
//   n = 2 / (1 - beta2) - 1;     r = n - 2 * t * beta2^t / (1 - beta2^t)
//   p -= lr / (1 - beta1^t) * m, if r > 5 times sqrt(1 - beta2^t) / (sqrt(v) + eps)
//        and sqrt((r - 4) * (r - 2) * n / ((n - 4) * (n - 2) * r))
#pragma once

#include <cmath>

#include "decoupled_penalty.h"
#include "host_device.h"
#include "lerp.h"
#include "number.h"
#include "penalized_grad.h"
#include "rule.h"

namespace fusedopt {

template <typename T>
struct RAdamUpdate {
  static constexpr int kNumStates = 2;

  PenalizedGrad<T> penalized_grad;
  DecoupledPenalty<T> decoupled_penalty;
  T beta1, one_minus_beta1;
  T beta2, one_minus_beta2;
  T eps;
  T step_size;  // all that m is multiplied with
  bool rectified;

  FUSEDOPT_HD bool has_penalty() const {
    return penalized_grad.has_penalty() || decoupled_penalty.has_penalty();
  }
  FUSEDOPT_HD void drop_penalty() {
    penalized_grad.drop_penalty();
    decoupled_penalty.drop_penalty();
  }

  FUSEDOPT_HD void operator()(T& param, T grad, T& exp_avg, T& exp_avg_sq) const {
    using std::sqrt;
    grad = penalized_grad(grad, param);
    param = decoupled_penalty(param);
    exp_avg = lerp(exp_avg, grad, one_minus_beta1, beta1);
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad;
    const T denom = sqrt(exp_avg_sq) + eps;
    param = param - step_size * exp_avg / (rectified ? denom : T(1));
  }
};

struct RAdam {
  Number lr, beta1, beta2;
  double eps, weight_decay, l1;
  bool maximize, decoupled_weight_decay;

  template <typename Options>
  static RAdam from(const Options& options) {
    return {options.number("lr"),       options.number("betas", 0),
            options.number("betas", 1), options("eps"),
            options("weight_decay"),    options.get("l1", 0.0),
            options.flag("maximize"),   options.flag("decoupled_weight_decay")};
  }

  static constexpr Slot kSlots[] = {{"exp_avg"}, {"exp_avg_sq", kUnsigned}};
  static constexpr Scalars::Names kScalars = {"step"};
  static constexpr bool kFirstStepFills = false;
  unsigned state_mask() const { return 0b11u; }

  // See Adam::is_defined. A beta2 from 1 on has roots of negative numbers.
  bool is_defined(double step, double largest) const {
    const double power1 = std::pow(beta1, step);
    const double lr = this->lr;
    const bool finite = !std::isinf(power1) || std::isinf(beta1);
    return finite && 1 - power1 != 0 && !(beta2 >= 1) && fits(lr / (1 - power1), largest) &&
           fits(rectification(step).factor * lr, largest) && fits(1 - beta1, largest) &&
           fits(1 - beta2, largest) &&
           penalties_fit(decoupled_weight_decay, lr, weight_decay, l1, largest);
  }

  template <typename T, typename Use>
  FUSEDOPT_HD auto prepare(double step, Use&& use) const {
    const double lr = this->lr, beta1 = this->beta1, beta2 = this->beta2;
    const bool decoupled = decoupled_weight_decay;
    const Rectification by = rectification(step);
    return use(RAdamUpdate<T>{
        penalized_grad<T>(maximize, decoupled ? 0 : weight_decay, decoupled ? 0 : l1),
        decoupled_penalty<T>(decoupled, lr, weight_decay, l1), static_cast<T>(beta1),
        static_cast<T>(1 - beta1), static_cast<T>(beta2), static_cast<T>(1 - beta2),
        static_cast<T>(eps), static_cast<T>(lr / (1 - std::pow(beta1, step)) * by.factor),
        by.rectified});
  }

 private:
  struct Rectification {
    bool rectified;
    double factor;
  };

  FUSEDOPT_HD Rectification rectification(double step) const {
    const double beta2 = this->beta2, power2 = std::pow(beta2, step);
    const double n = 2 / (1 - beta2) - 1, r = n - 2 * step * power2 / (1 - power2);
    if (!(r > 5)) return {false, 1};
    const double square = (r - 4) * (r - 2) * n / ((n - 4) * (n - 2) * r);
    return {true, std::sqrt(1 - power2) * std::sqrt(square)};
  }
};

}  // namespace fusedopt
