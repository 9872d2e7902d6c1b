#pragma once

// What a GPU has one instruction for, where the compiler would take several; and the same on the CPU.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../update_rules/host_device.h"

namespace fusedopt {

// All 64 bits. By itself NVRTC multiplies 64 bits with 64 in philox.h, at twice the cost.
FUSEDOPT_HD std::uint64_t wide_product(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__)
  std::uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return std::uint64_t{a} * b;
#endif
}

// Four of the eight bytes of two words: a hexadecimal digit says which, the last one the first, and with
// 8 in it that its sign is repeated.
FUSEDOPT_HD std::uint32_t picked_bytes(std::uint32_t first, std::uint32_t second,
                                       std::uint32_t which) {
  std::uint32_t picked = 0;
#if defined(__CUDA_ARCH__)
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(picked) : "r"(first), "r"(second), "r"(which));
#else
  const std::uint64_t both = first | std::uint64_t{second} << 32;
  for (int at = 0; at < 32; at += 8) {
    const std::uint32_t digit = which >> at / 2, byte = both >> 8 * (digit & 7u) & 0xFFu;
    picked |= ((digit & 8u) != 0 ? (byte >> 7) * 0xFFu : byte) << at;
  }
#endif
  return picked;
}

// The larger one of two magnitudes, of which a NaN is the largest; the first is that of a number.
FUSEDOPT_HD std::uint32_t larger_magnitude(std::uint32_t magnitude, float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, %1;" : "+r"(magnitude) : "f"(std::fabs(value)));
  return magnitude;
#else
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits &= 0x7FFFFFFFu;
  return bits > magnitude ? bits : magnitude;
#endif
}

// Off by 2^-23 of the result at most (PTX ISA). A subnormal number counts as zero.
FUSEDOPT_HD float rough_root(float value) {
#if defined(__CUDA_ARCH__)
  asm("sqrt.approx.ftz.f32 %0, %0;" : "+f"(value));
  return value;
#else
  return std::sqrt(value);
#endif
}
FUSEDOPT_HD float rough_reciprocal(float value) {
#if defined(__CUDA_ARCH__)
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(value));
  return value;
#else
  return 1.0f / value;
#endif
}

}  // namespace fusedopt
