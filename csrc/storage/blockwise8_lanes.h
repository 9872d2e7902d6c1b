// The same codes as in blockwise8.h for the elements of one scale, in vectors. The compiler's vectorizer,
// which has no bytes but by way of two conversions, needs half as many instructions more.
#pragma once

#include <cstdint>

#include "../update_rules/host_device.h"
#include "blockwise8.h"
#include "isa.h"
#include "lanes.h"
#include "philox_lanes.h"

namespace fusedopt {

#if defined(FUSEDOPT_HAS_LANES)

constexpr int kScaleVectors = kScaleElements / kFloatLanes;

FUSEDOPT_HD FloatLanes all_floats(float value) { return FUSEDOPT_LANES(set1_ps)(value); }
FUSEDOPT_HD FloatLanes load_floats(const float* from) { return as_floats(load_lanes(from)); }
FUSEDOPT_HD FloatLanes multiply(FloatLanes a, FloatLanes b) { return FUSEDOPT_LANES(mul_ps)(a, b); }
FUSEDOPT_HD FloatLanes add(FloatLanes a, FloatLanes b) { return FUSEDOPT_LANES(add_ps)(a, b); }
FUSEDOPT_HD FloatLanes root(FloatLanes floats) { return FUSEDOPT_LANES(sqrt_ps)(floats); }

FUSEDOPT_HD FloatLanes decode(const std::int8_t* codes, FloatLanes scale) {
  const FloatLanes code = FUSEDOPT_LANES(cvtepi32_ps)(load_widened(codes));
  const FloatLanes root = multiply(code, all_floats(1.0f / 127));
  return multiply(multiply(root, without_sign(root)), scale);
}

FUSEDOPT_HD FloatLanes decode(const std::uint8_t* codes, FloatLanes scale) {
  const FloatLanes code = FUSEDOPT_LANES(cvtepi32_ps)(load_widened(codes));
  const FloatLanes root = multiply(code, all_floats(1.0f / 255)), square = multiply(root, root);
  return multiply(multiply(square, square), scale);
}

template <typename Code>
FUSEDOPT_HD void decode_lanes(const Code* codes, float scale, float* to) {
#pragma GCC unroll 8
  for (int i = 0; i < kScaleElements; i += kFloatLanes) {
    store_lanes(as_bits(decode(codes + i, all_floats(scale))), to + i);
  }
}

// Four vectors of 32-bit integers that fit a byte.
FUSEDOPT_HD void store_codes(const Lanes* codes, std::int8_t* to) {
  const Lanes first = FUSEDOPT_LANES(packs_epi32)(codes[0], codes[1]);
  const Lanes second = FUSEDOPT_LANES(packs_epi32)(codes[2], codes[3]);
  store_lanes(quarters_in_order(FUSEDOPT_LANES(packs_epi16)(first, second)), to);
}

FUSEDOPT_HD void store_codes(const Lanes* codes, std::uint8_t* to) {
  const Lanes first = FUSEDOPT_LANES(packs_epi32)(codes[0], codes[1]);
  const Lanes second = FUSEDOPT_LANES(packs_epi32)(codes[2], codes[3]);
  store_lanes(quarters_in_order(FUSEDOPT_LANES(packus_epi16)(first, second)), to);
}

// As Scale::ratio if the scale is not raised. (A minimum of a NaN and a number is the second of them.)
FUSEDOPT_HD FloatLanes ratio(FloatLanes values, const Scale& scale) {
  const FloatLanes ratio = multiply(without_sign(values), all_floats(scale.reciprocal));
  return FUSEDOPT_LANES(min_ps)(ratio, all_floats(scale.most));
}

// Both encode with a scale that is not raised.

FUSEDOPT_HD void encode_lanes_signed(const float* from, const Scale& scale, std::int8_t* to) {
  Lanes codes[kScaleVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kScaleVectors; ++v) {
    const FloatLanes values = load_floats(from + v * kFloatLanes);
    const FloatLanes exact = multiply(all_floats(127.0f), root(ratio(values, scale)));
    const FloatLanes sum = with_sign_of(add(exact, all_floats(0.5f)), values);
    codes[v] = FUSEDOPT_LANES(cvttps_epi32)(sum);
    if (v % 4 == 3) store_codes(codes + v - 3, to + (v - 3) * kFloatLanes);
  }
}

template <Isa isa>
FUSEDOPT_HD void encode_lanes_unsigned(const float* from, const Scale& scale,
                                       const PhiloxKeys& keys, std::uint64_t step, std::int64_t at,
                                       std::uint8_t* to) {
  static_assert(kScaleElements == kRandomElements);
  RandomElements<isa> random(step, at);
  FloatLanes exact[kScaleVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kScaleVectors; ++v) {
    const FloatLanes values = load_floats(from + v * kFloatLanes);
    exact[v] = multiply(all_floats(255.0f), root(root(ratio(values, scale))));
    // Integers, while the roots are being drawn.
    random.rounds(keys, 10 * v / kScaleVectors, 10 * (v + 1) / kScaleVectors);
  }
  alignas(64) std::uint16_t bits[kRandomElements];
  random.store(bits);
  Lanes codes[kScaleVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kScaleVectors; ++v) {
    const int i = v * kFloatLanes;
    const FloatLanes noise = FUSEDOPT_LANES(cvtepi32_ps)(load_widened(bits + i));
    // Half way between two codes this may be the other of them: it is near to neither.
    const FloatLanes off = FUSEDOPT_LANES(sub_ps)(exact[v], nearest_whole(exact[v]));
    const FloatLanes up =
        where_less(without_sign(off), all_floats(0x1p-12f), all_floats(0x1p15f), noise);
    const FloatLanes sum = add(exact[v], multiply(up, all_floats(0x1p-16f)));
    codes[v] = one_where_positive(load_floats(from + i), FUSEDOPT_LANES(cvttps_epi32)(sum));
    if (v % 4 == 3) store_codes(codes + v - 3, to + (v - 3) * kFloatLanes);
  }
}

#endif

}  // namespace fusedopt
