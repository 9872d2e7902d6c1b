#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedopt {

enum class Dtype : std::uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr std::size_t itemsize(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
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

struct SlotDtypes {
  Dtype slots[kMaxSlots] = {};
  int num_slots = 0;

  // One number for the whole combination; the count is fixed per rule and need not be in it.
  std::uint32_t key() const {
    std::uint32_t key = 0;
    for (int s = 0; s < num_slots; ++s) key = key * 4 + static_cast<std::uint32_t>(slots[s]);
    return key;
  }

  bool all(Dtype dtype) const {
    for (int s = 0; s < num_slots; ++s) {
      if (slots[s] != dtype) return false;
    }
    return true;
  }
};

}  // namespace fusedopt
