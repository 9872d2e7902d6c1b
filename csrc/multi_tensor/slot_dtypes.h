#pragma once

// What belongs to one parameter in a step, and how it is stored.

#include <cstddef>
#include <cstdint>

#include "../storage/dtype.h"
#include "../update_rules/host_device.h"

namespace fusedopt {

// A tensor being updated has a parameter, a gradient and up to three state tensors.
constexpr int kMaxStates = 3;
constexpr int kMaxSlots = 2 + kMaxStates;

// What a parameter may have beside its slots, and where the pointers to it stand behind them.
enum Extra { kMaster = kMaxSlots, kRounding, kEma, kScales, kMaxPointers = kScales + kMaxStates };
constexpr int kNumExtras = kMaxPointers - kMaxSlots;

// Whether an extra has an element for each of the parameter's; the others are lists.
constexpr bool is_elementwise(int extra) { return extra == kMaster || extra == kEma; }

constexpr Dtype kNone = Dtype::kFloat64;  // no extra is computed in double

// How the values of one parameter and its state are stored.
struct SlotDtypes {
  Dtype slots[kMaxSlots] = {};
  int num_slots = 0;
  // Of the extras that may be of several; the dtype of the others is fixed.
  Dtype master = kNone;  // kInt16 is the remainder of a split one
  Dtype ema = kNone;
  bool stochastic = false;  // the parameter is rounded at random

  // One number for the whole combination; the count is fixed per rule and need not be in it.
  std::uint32_t key() const {
    std::uint32_t key = stochastic;
    key = key * 8 + static_cast<std::uint32_t>(master);
    key = key * 8 + static_cast<std::uint32_t>(ema);
    for (int s = 0; s < num_slots; ++s) key = key * 8 + static_cast<std::uint32_t>(slots[s]);
    return key;
  }
  static constexpr int kKeyBits = 1 + 3 * (2 + kMaxSlots);

  bool all(Dtype dtype) const {
    for (int s = 0; s < num_slots; ++s) {
      if (slots[s] != dtype) return false;
    }
    return true;
  }

  FUSEDOPT_HD Dtype extra(int pointer) const {
    return pointer == kMaster     ? master
           : pointer == kEma      ? ema
           : pointer == kRounding ? Dtype::kInt64
                                  : Dtype::kFloat32;
  }

  // Every value is one element of one array, as it is.
  bool is_plain() const {
    bool floats = true;
    for (int s = 0; s < num_slots; ++s) floats &= is_float(slots[s]);
    return floats && master == kNone && ema == kNone && !stochastic;
  }

  // Some state is in 8 bits.
  bool has_codes() const {
    bool floats = true;
    for (int s = 2; s < num_slots; ++s) floats &= is_float(slots[s]);
    return !floats;
  }

  // All in bfloat16, with an exact master, and nothing else.
  bool is_split_bfloat16() const {
    return all(Dtype::kBFloat16) && master == Dtype::kInt16 && ema == kNone && !stochastic;
  }
};

// How the values of a step are stored, where that is not plain (SlotDtypes::is_plain).
struct StoredAs {
  SlotDtypes dtypes;
  float ema_weight = 0;  // ema += ema_weight * (param - ema)
  double step = 0;       // of the update, unless only the device knows it
};

// What the table holds for a kernel that needs to know how values are stored.
template <typename What>
struct Stored {
  What what;  // an update, or the rule if the device prepares it
  StoredAs as;
};

}  // namespace fusedopt
