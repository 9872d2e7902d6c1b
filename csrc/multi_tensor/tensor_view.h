#pragma once

#include <cstddef>
#include <cstdint>

#include "../update_rules/host_device.h"

namespace fusedopt {

// Floats first; the others are parts of how a value is stored, see storage/.
enum class Dtype : std::uint8_t {
  kFloat32,
  kFloat64,
  kBFloat16,
  kFloat16,
  kInt8,
  kUInt8,
  kInt16,
  kInt64
};

constexpr bool is_float(Dtype dtype) { return dtype <= Dtype::kFloat16; }

constexpr std::size_t itemsize(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
    case Dtype::kInt64:
      return 8;
    case Dtype::kFloat32:
      return 4;
    case Dtype::kInt8:
    case Dtype::kUInt8:
      return 1;
    default:
      return 2;
  }
}

// Storage-only types: arithmetic happens in float.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

constexpr int kCpu = -1;  // a device; GPUs count from 0

// What a tensor is on this side: memory that someone else owns.
struct TensorView {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int ndim = 0;
  const std::int64_t* shape = nullptr;
  const std::int64_t* strides = nullptr;
  int device = kCpu;
};

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
};

}  // namespace fusedopt
