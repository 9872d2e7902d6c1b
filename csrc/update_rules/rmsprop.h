// RMSprop (Hinton 2012, Coursera lecture 6e), centered after Graves 2013 (arXiv:1308.0850).
// State: square_avg v, [centered] grad_avg a, [momentum > 0] momentum_buffer b.
//   g += weight_decay * p + l1 * sign(p);  v = alpha * v + (1 - alpha) * g^2;  [centered] a += (1 - alpha) * (g - a)
//   d = sqrt(v [- a^2]) + eps, or with eps_inside_sqrt sqrt(v [- a^2] + eps) (TensorFlow, Keras)
//   p -= lr * g / d, or with momentum b = momentum * b + g / d, p -= lr * b
#pragma once

#include <cmath>
#include <limits>

#include "host_device.h"
#include "lerp.h"
#include "number.h"
#include "penalized_grad.h"
#include "rule.h"

namespace fusedopt {

template <typename T, bool kCentered, bool kMomentum>
struct RMSpropUpdate {
  static constexpr int kNumStates = 1 + kCentered + kMomentum;

  PenalizedGrad<T> penalized_grad;
  T lr;
  T alpha, one_minus_alpha;
  T eps_inside, eps_outside;  // one of them is eps, the other 0
  T momentum;

  FUSEDOPT_HD bool has_penalty() const { return penalized_grad.has_penalty(); }
  FUSEDOPT_HD void drop_penalty() { penalized_grad.drop_penalty(); }

  FUSEDOPT_HD void operator()(T& param, T grad, T& square_avg) const {
    update(param, grad, square_avg, nullptr, nullptr);
  }

  FUSEDOPT_HD void operator()(T& param, T grad, T& square_avg, T& second) const {
    update(param, grad, square_avg, kCentered ? &second : nullptr, kCentered ? nullptr : &second);
  }

  FUSEDOPT_HD void operator()(T& param, T grad, T& square_avg, T& grad_avg,
                              T& momentum_buffer) const {
    update(param, grad, square_avg, &grad_avg, &momentum_buffer);
  }

 private:
  FUSEDOPT_HD void update(T& param, T grad, T& square_avg, T* grad_avg, T* momentum_buffer) const {
    using std::sqrt;
    grad = penalized_grad(grad, param);
    square_avg = alpha * square_avg + one_minus_alpha * grad * grad;
    T radicand = square_avg + eps_inside;
    if constexpr (kCentered) {
      *grad_avg = lerp(*grad_avg, grad, one_minus_alpha, alpha);
      // A square that leaves the range is its end, so that an infinite v stays infinite.
      const T square = *grad_avg * *grad_avg, end = std::numeric_limits<T>::max();
      radicand = square_avg - (end < square ? end : square) + eps_inside;
    }
    const T denom = sqrt(radicand) + eps_outside;
    if constexpr (kMomentum) {
      *momentum_buffer = momentum * *momentum_buffer + grad / denom;
      param = param - lr * *momentum_buffer;
    } else {
      param = param - lr * grad / denom;  // in this order, as torch, it overflows last
    }
  }
};

struct RMSprop {
  Number lr;
  double alpha, eps, weight_decay, l1, momentum;
  bool centered, maximize, eps_inside_sqrt;

  template <typename Options>
  static RMSprop from(const Options& options) {
    return {
        options.number("lr"),     options("alpha"),         options("eps"),
        options("weight_decay"),  options.get("l1", 0.0),   options("momentum"),
        options.flag("centered"), options.flag("maximize"), options.flag("eps_inside_sqrt", false)};
  }

  static constexpr Slot kSlots[] = {{"square_avg", kUnsigned}, {"grad_avg"}, {"momentum_buffer"}};
  static constexpr Scalars::Names kScalars = {"step"};
  static constexpr bool kFirstStepFills = false;
  unsigned state_mask() const { return 0b001u | centered * 0b010u | (momentum > 0) * 0b100u; }

  // See Adam::is_defined.
  bool is_defined(double, double largest) const {
    return fits(lr, largest) && fits(1 - alpha, largest) && fits(weight_decay, largest) &&
           fits(l1, largest);
  }

  template <typename T, typename Use>
  FUSEDOPT_HD auto prepare(double, Use&& use) const {
    if (momentum > 0) return centered ? use(fold<T, true, true>()) : use(fold<T, false, true>());
    return centered ? use(fold<T, true, false>()) : use(fold<T, false, false>());
  }

 private:
  template <typename T, bool kCentered, bool kMomentum>
  FUSEDOPT_HD RMSpropUpdate<T, kCentered, kMomentum> fold() const {
    return {penalized_grad<T>(maximize, weight_decay, l1),
            static_cast<T>(lr),
            static_cast<T>(alpha),
            static_cast<T>(1 - alpha),
            static_cast<T>(eps_inside_sqrt ? eps : 0),
            static_cast<T>(eps_inside_sqrt ? 0 : eps),
            static_cast<T>(momentum)};
  }
};

}  // namespace fusedopt
