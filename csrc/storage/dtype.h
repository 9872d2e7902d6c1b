#pragma once

#include <cstddef>
#include <cstdint>

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

}  // namespace fusedopt
