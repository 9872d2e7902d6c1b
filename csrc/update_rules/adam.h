// Adam (Kingma & Ba 2015, arXiv:1412.6980), AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101),
// AMSGrad (Reddi et al. 2018). State: exp_avg m, exp_avg_sq v, max_exp_avg_sq. At step t:
//   Adam: g += weight_decay * p + l1 * sign(p)    AdamW: p -= lr * (weight_decay * p + l1 * sign(p))
//   m += (1 - beta1) * (g - m)                    v = beta2 * v + (1 - beta2) * g^2
//   p -= lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)     AMSGrad: max over t of v
#pragma once

#include <cmath>

#include "decoupled_penalty.h"
#include "host_device.h"
#include "lerp.h"
#include "number.h"
#include "penalized_grad.h"
#include "rule.h"

namespace fusedopt {

template <typename T, bool kAmsgrad>
struct AdamUpdate {
  static constexpr int kNumStates = kAmsgrad ? 3 : 2;

  PenalizedGrad<T> penalized_grad;
  DecoupledPenalty<T> decoupled_penalty;
  T beta1, one_minus_beta1;
  T beta2, one_minus_beta2;
  T inv_sqrt_bias_correction2;
  T eps;
  T step_size;  // lr / (1 - beta1^t)

  FUSEDOPT_HD bool has_penalty() const {
    return penalized_grad.has_penalty() || decoupled_penalty.has_penalty();
  }
  FUSEDOPT_HD void drop_penalty() {
    penalized_grad.drop_penalty();
    decoupled_penalty.drop_penalty();
  }

  FUSEDOPT_HD void operator()(T& param, T grad, T& exp_avg, T& exp_avg_sq) const {
    update_moments(param, grad, exp_avg, exp_avg_sq);
    update_param(param, exp_avg, exp_avg_sq);
  }

  FUSEDOPT_HD void operator()(T& param, T grad, T& exp_avg, T& exp_avg_sq,
                              T& max_exp_avg_sq) const {
    update_moments(param, grad, exp_avg, exp_avg_sq);
    // torch.maximum: a NaN on either side stays.
    const bool keep = max_exp_avg_sq > exp_avg_sq || max_exp_avg_sq != max_exp_avg_sq;
    max_exp_avg_sq = keep ? max_exp_avg_sq : exp_avg_sq;
    update_param(param, exp_avg, max_exp_avg_sq);
  }

 private:
  FUSEDOPT_HD void update_moments(T& param, T grad, T& exp_avg, T& exp_avg_sq) const {
    grad = penalized_grad(grad, param);
    param = decoupled_penalty(param);
    exp_avg = lerp(exp_avg, grad, one_minus_beta1, beta1);
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad;
  }

  FUSEDOPT_HD void update_param(T& param, T exp_avg, T exp_avg_sq) const {
    using std::sqrt;
    const T denom = sqrt(exp_avg_sq) * inv_sqrt_bias_correction2 + eps;
    param = param - step_size * exp_avg / denom;
  }
};

struct Adam {
  Number lr, beta1, beta2;
  double eps, weight_decay, l1;
  bool amsgrad, maximize, decoupled_weight_decay;

  template <typename Options>
  static Adam from(const Options& options) {
    return {options.number("lr"),
            options.number("betas", 0),
            options.number("betas", 1),
            options("eps"),
            options("weight_decay"),
            options.get("l1", 0.0),
            options.flag("amsgrad"),
            options.flag("maximize"),
            options.flag("decoupled_weight_decay")};
  }

  static constexpr Slot kSlots[] = {
      {"exp_avg"}, {"exp_avg_sq", kUnsigned}, {"max_exp_avg_sq", kUnsigned}};
  static constexpr Scalars::Names kScalars = {"step"};
  static constexpr bool kFirstStepFills = false;
  unsigned state_mask() const { return amsgrad ? 0b111u : 0b011u; }

  // Whether the numbers of step t are defined and of the dtype: fusedopt/adam.py says what is
  // not. What only the device knows counts as defined.
  bool is_defined(double step, double largest) const {
    const double power1 = std::pow(beta1, step), power2 = std::pow(beta2, step);
    const bool finite =
        (!std::isinf(power1) || std::isinf(beta1)) && (!std::isinf(power2) || std::isinf(beta2));
    const double lr = this->lr;
    return finite && 1 - power1 != 0 && !(1 - power2 <= 0 && !std::isinf(power2)) &&
           fits(lr / (1 - power1), largest) && fits(1 - beta1, largest) &&
           fits(1 - beta2, largest) &&
           penalties_fit(decoupled_weight_decay, lr, weight_decay, l1, largest);
  }

  // Calls use(update) with the update for step t, its coefficients folded in double.
  template <typename T, typename Use>
  FUSEDOPT_HD auto prepare(double step, Use&& use) const {
    return amsgrad ? use(fold<T, true>(step)) : use(fold<T, false>(step));
  }

 private:
  template <typename T, bool kAmsgrad>
  FUSEDOPT_HD AdamUpdate<T, kAmsgrad> fold(double step) const {
    const double lr = this->lr, beta1 = this->beta1, beta2 = this->beta2;
    const bool decoupled = decoupled_weight_decay;
    return {penalized_grad<T>(maximize, decoupled ? 0 : weight_decay, decoupled ? 0 : l1),
            decoupled_penalty<T>(decoupled, lr, weight_decay, l1),
            static_cast<T>(beta1),
            static_cast<T>(1 - beta1),
            static_cast<T>(beta2),
            static_cast<T>(1 - beta2),
            static_cast<T>(1 / std::sqrt(1 - std::pow(beta2, step))),
            static_cast<T>(eps),
            static_cast<T>(lr / (1 - std::pow(beta1, step)))};
  }
};

}  // namespace fusedopt
