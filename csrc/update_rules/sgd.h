// SGD with momentum (Polyak 1964), Nesterov's form after Sutskever et al. 2013. State: momentum_buffer b.
//   g += weight_decay * p + l1 * sign(p)
//   b = g at the first step, then momentum * b + (1 - dampening) * g
//   g = b, or with nesterov g + momentum * b
//   p -= lr * g
#pragma once

#include "host_device.h"
#include "number.h"
#include "penalized_grad.h"
#include "rule.h"

namespace fusedopt {

template <typename T, bool kMomentum>
struct SGDUpdate {
  static constexpr int kNumStates = kMomentum ? 1 : 0;

  PenalizedGrad<T> penalized_grad;
  T lr;
  T momentum;
  T one_minus_dampening;
  bool nesterov;
  bool first_step;

  FUSEDOPT_HD bool has_penalty() const { return penalized_grad.has_penalty(); }
  FUSEDOPT_HD void drop_penalty() { penalized_grad.drop_penalty(); }

  FUSEDOPT_HD void operator()(T& param, T grad) const {
    grad = penalized_grad(grad, param);
    param = param - lr * grad;
  }

  FUSEDOPT_HD void operator()(T& param, T grad, T& momentum_buffer) const {
    grad = penalized_grad(grad, param);
    const T decayed = momentum * momentum_buffer + one_minus_dampening * grad;
    momentum_buffer = first_step ? grad : decayed;
    grad = nesterov ? grad + momentum * momentum_buffer : momentum_buffer;
    param = param - lr * grad;
  }
};

struct SGD {
  Number lr;
  double momentum, dampening, weight_decay, l1;
  bool nesterov, maximize;

  template <typename Options>
  static SGD from(const Options& options) {
    return {options.number("lr"),    options("momentum"),    options("dampening"),
            options("weight_decay"), options.get("l1", 0.0), options.flag("nesterov"),
            options.flag("maximize")};
  }

  static constexpr Slot kSlots[] = {{"momentum_buffer"}};
  static constexpr Scalars::Names kScalars = {};
  static constexpr bool kFirstStepFills = true;
  unsigned state_mask() const { return momentum != 0 ? 0b1u : 0b0u; }

  // See Adam::is_defined.
  bool is_defined(double step, double largest) const {
    const bool dampens = momentum != 0 && step != 1;
    return fits(lr, largest) && (!dampens || fits(1 - dampening, largest)) &&
           fits(weight_decay, largest) && fits(l1, largest);
  }

  template <typename T, typename Use>
  FUSEDOPT_HD auto prepare(double step, Use&& use) const {
    return momentum != 0 ? use(fold<T, true>(step)) : use(fold<T, false>(step));
  }

 private:
  template <typename T, bool kMomentum>
  FUSEDOPT_HD SGDUpdate<T, kMomentum> fold(double step) const {
    return {penalized_grad<T>(maximize, weight_decay, l1),
            static_cast<T>(lr),
            static_cast<T>(momentum),
            static_cast<T>(1 - dampening),
            nesterov,
            step == 1};
  }
};

}  // namespace fusedopt
