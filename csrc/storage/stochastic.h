// Stochastic rounding to bfloat16: up or down with the probabilities that make the mean exact.
#pragma once

#include <cstdint>

#include "../update_rules/host_device.h"
#include "half.h"

namespace fusedopt {

// `random`: 16 bits. What is infinite stays so, and a NaN is 0x7FC0.
FUSEDOPT_HD BFloat16 round_stochastically(float value, std::uint32_t random) {
  const std::uint32_t bits = bits_from_float(value), magnitude = bits & 0x7FFFFFFFu;
  const std::uint32_t rounded = magnitude >= 0x7F800000u ? bits : bits + random;
  return {static_cast<std::uint16_t>(magnitude > 0x7F800000u ? 0x7FC0u : rounded >> 16)};
}

}  // namespace fusedopt
