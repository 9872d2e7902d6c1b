// The contract of an update rule, whose header defines two structs. One is the rule with the options
// of a param group, trivially copyable, for the GPU gets it as bytes:
//
//   struct Adam {
//     static constexpr Slot kSlots[] = {{"exp_avg"}, {"exp_avg_sq", kUnsigned}};  // state, in order
//     static constexpr Scalars::Names kScalars = {"step"};  // and numbers, of each tensor
//     static constexpr bool kFirstStepFills = false;        // the first step reads no state
//     static Adam from(const OptionReader&);
//     unsigned state_mask() const;  // bit s: these options need kSlots[s]
//     bool is_defined(scalars, largest) const;  // no coefficient is undefined, nor above the largest
//     auto prepare<T>(scalars, use) const;      // use(update), whose type follows from the options
//   };
//
// `scalars` is a Scalars, or a double where the step count is all that is needed. A rule that keeps a
// second number says how it moves on: Scalars advanced(const Scalars& before) const.
//
// The other is an update: a tensor's coefficients, folded in double, in float or double (T).
//
//   struct AdamUpdate<T> {
//     static constexpr int kNumStates = 2;  // those of the mask
//     PenalizedGrad<T> penalized_grad;      // clipping and loss scaling multiply its grad_factor
//     bool has_penalty() const;             // whether drop_penalty() would change the update, which
//     void drop_penalty();                  // sets all to zero that is tested for every element
//     void operator()(T& param, T grad, T& state...) const;
//   };
//
// All that the GPU calls is FUSEDOPT_HD: prepare, advanced, and the update.
#pragma once

#include <cstddef>

#include "host_device.h"

namespace fusedopt {

constexpr bool kUnsigned = true;

// A tensor of the parameter's shape. One that is unsigned holds squares or magnitudes, never below
// zero: in 8 bits it is stored without a sign.
struct Slot {
  const char* name;
  bool is_unsigned = false;
};

// Numbers that each tensor keeps, as they are in the step that is computed.
struct Scalars {
  static constexpr int kMost = 2;
  // Their names; the first is "step". A rule without them counts no steps.
  struct Names {
    const char* names[kMost] = {};
    constexpr int count() const { return names[0] == nullptr ? 0 : names[1] == nullptr ? 1 : 2; }
  };

  double step = 1;                // 1 at the first; where none are counted, 2 at all others
  double second = 1;              // if the rule has one
  bool second_is_double = false;  // else it is kept as a float, and torch multiplies floats

  FUSEDOPT_HD Scalars(double step = 1, double second = 1) : step(step), second(second) {}
  FUSEDOPT_HD operator double() const { return step; }
};

template <typename Rule>
constexpr int kNumScalars = Rule::kScalars.count();

// Those of the next step. The second is kept in its tensor's dtype, and read from there.
template <typename Rule>
FUSEDOPT_HD Scalars advanced(const Rule& rule, const Scalars& before) {
  if constexpr (kNumScalars<Rule> > 1) {
    return rule.advanced(before);
  } else {
    return before.step + 1;
  }
}

template <typename Rule>
constexpr int kNumSlots = static_cast<int>(sizeof(Rule::kSlots) / sizeof(Slot));

}  // namespace fusedopt
