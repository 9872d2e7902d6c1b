// An exact float32 master of a bfloat16 parameter in two more bytes: the parameter is the master
// rounded to nearest, ties away from zero, and the remainder its lower 16 bits. Then
//   master = (param << 16) + remainder, the remainder as a signed number.
// Ties to even would need a 17th bit: 0x8000 could mean a step up or down. NaNs lose their payload,
// as there are more of them in float32 than pairs that show a NaN: param is 0x7FC0, remainder 0.
#pragma once

#include <cstdint>

#include "../update_rules/host_device.h"
#include "half.h"

namespace fusedopt {

FUSEDOPT_HD float join_master(std::uint16_t param, std::uint16_t remainder) {
  const auto low = static_cast<std::uint32_t>(static_cast<std::int16_t>(remainder));
  const std::uint32_t high = static_cast<std::uint32_t>(param) << 16, bits = high + low;
  // No master splits like this: a zero or an infinity that somebody else wrote.
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return float_from_bits(nan ? high : bits);
}

FUSEDOPT_HD void split_master(float master, std::uint16_t* param, std::uint16_t* remainder) {
  const std::uint32_t bits = bits_from_float(master);
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  *param = static_cast<std::uint16_t>(nan ? 0x7FC0u : (bits + 0x8000u) >> 16);
  *remainder = static_cast<std::uint16_t>(nan ? 0u : bits);
}

}  // namespace fusedopt
