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

// n elements, as load_half and store_half.
FUSEDOPT_HD void load_masters(const std::uint16_t* params, const std::uint16_t* remainders, int n,
                              float* to) {
  int i = 0;
#if defined(FUSEDOPT_HAS_LANES)
  for (; i + 2 * kFloatLanes <= n; i += 2 * kFloatLanes) {
    const Lanes param = load_lanes(params + i), low = load_lanes(remainders + i);
    const Lanes high = FUSEDOPT_LANES(add_epi16)(param, FUSEDOPT_LANES(srai_epi16)(low, 15));
    Lanes first = first_pairs(low, high), second = second_pairs(low, high);
    const FloatLanes a = as_floats(first), b = as_floats(second);
    if (__builtin_expect(any_nan(a, b), false)) {
      first = where_nan(a, first_widened(param), first);
      second = where_nan(b, second_widened(param), second);
    }
    store_lanes(first, to + i);
    store_lanes(second, to + i + kFloatLanes);
  }
#endif
#pragma omp simd
  for (int j = i; j < n; ++j) to[j] = join_master(params[j], remainders[j]);
}

FUSEDOPT_HD void store_masters(const float* from, int n, std::uint16_t* params,
                               std::uint16_t* remainders) {
  int i = 0;
#if defined(FUSEDOPT_HAS_LANES)
  for (; i + 2 * kFloatLanes <= n; i += 2 * kFloatLanes) {
    const TwoLanes bits(from + i);
    const Lanes high = upper_halves(bits.first, bits.second);
    const Lanes low = lower_halves(bits.first, bits.second);
    const Lanes up = FUSEDOPT_LANES(srai_epi16)(low, 15);
    store_lanes(FUSEDOPT_LANES(sub_epi16)(high, up), params + i);
    store_lanes(low, remainders + i);
  }
#endif
#pragma omp simd
  for (int j = i; j < n; ++j) split_master(from[j], &params[j], &remainders[j]);
}

}  // namespace fusedopt
