// NAdam (Dozat 2016, ICLR workshop). State: exp_avg m, exp_avg_sq v, and the number mu_product. At step
// t, with g and p penalized as by Adam or, decoupled, by AdamW:
//   m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2
//   mu(t) = beta1 * (1 - 0.96^(t * momentum_decay) / 2);  mu_product *= mu(t)
//   p -= lr * ((1 - mu(t)) / (1 - mu_product) * g + mu(t + 1) / (1 - mu_product * mu(t + 1)) * m)
//        / (sqrt(v / (1 - beta2^t)) + eps)
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
struct NAdamUpdate {
  static constexpr int kNumStates = 2;

  PenalizedGrad<T> penalized_grad;
  DecoupledPenalty<T> decoupled_penalty;
  T beta1, one_minus_beta1;
  T beta2, one_minus_beta2;
  T inv_sqrt_bias_correction2;
  T eps;
  T grad_size, exp_avg_size;  // what g and m are multiplied with

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
    const T denom = sqrt(exp_avg_sq) * inv_sqrt_bias_correction2 + eps;
    param = param - (grad_size * grad + exp_avg_size * exp_avg) / denom;
  }
};

struct NAdam {
  Number lr, beta1, beta2;
  double eps, weight_decay, l1, momentum_decay;
  bool maximize, decoupled_weight_decay;

  template <typename Options>
  static NAdam from(const Options& options) {
    return {options.number("lr"),
            options.number("betas", 0),
            options.number("betas", 1),
            options("eps"),
            options("weight_decay"),
            options.get("l1", 0.0),
            options("momentum_decay"),
            options.flag("maximize"),
            options.flag("decoupled_weight_decay")};
  }

  static constexpr Slot kSlots[] = {{"exp_avg"}, {"exp_avg_sq", kUnsigned}};
  static constexpr Scalars::Names kScalars = {"step", "mu_product"};
  static constexpr bool kFirstStepFills = false;
  unsigned state_mask() const { return 0b11u; }

  FUSEDOPT_HD Scalars advanced(const Scalars& before) const {
    const double factor = mu(before.step + 1);
    const double kept = before.second_is_double ? factor : static_cast<float>(factor);
    return {before.step + 1, before.second * kept};
  }

  // See Adam::is_defined.
  bool is_defined(const Scalars& scalars, double largest) const {
    const double power2 = std::pow(beta2, scalars.step), lr = this->lr;
    const double mu_product = scalars.second, next = mu_product * mu(scalars.step + 1);
    const Sizes sizes = this->sizes(scalars);
    return (!std::isinf(power2) || std::isinf(beta2)) && 1 - mu_product != 0 && 1 - next != 0 &&
           fits(sizes.grad, largest) && fits(sizes.exp_avg, largest) && fits(1 - beta1, largest) &&
           fits(1 - beta2, largest) &&
           penalties_fit(decoupled_weight_decay, lr, weight_decay, l1, largest);
  }

  template <typename T, typename Use>
  FUSEDOPT_HD auto prepare(const Scalars& scalars, Use&& use) const {
    const double lr = this->lr, beta1 = this->beta1, beta2 = this->beta2;
    const bool decoupled = decoupled_weight_decay;
    const Sizes sizes = this->sizes(scalars);
    return use(NAdamUpdate<T>{
        penalized_grad<T>(maximize, decoupled ? 0 : weight_decay, decoupled ? 0 : l1),
        decoupled_penalty<T>(decoupled, lr, weight_decay, l1), static_cast<T>(beta1),
        static_cast<T>(1 - beta1), static_cast<T>(beta2), static_cast<T>(1 - beta2),
        static_cast<T>(1 / std::sqrt(1 - std::pow(beta2, scalars.step))), static_cast<T>(eps),
        static_cast<T>(sizes.grad), static_cast<T>(sizes.exp_avg)});
  }

 private:
  struct Sizes {
    double grad, exp_avg;
  };

  FUSEDOPT_HD double mu(double step) const {
    return beta1 * (1 - 0.5 * std::pow(0.96, step * momentum_decay));
  }

  FUSEDOPT_HD Sizes sizes(const Scalars& scalars) const {
    const double lr = this->lr, mu_product = scalars.second, next = mu(scalars.step + 1);
    return {lr * (1 - mu(scalars.step)) / (1 - mu_product), lr * next / (1 - mu_product * next)};
  }
};

}  // namespace fusedopt
