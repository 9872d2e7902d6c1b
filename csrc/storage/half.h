#pragma once

// bfloat16 and float16 to float and back, a block at a time. Every level gives the same bits:
// round to nearest even, bfloat16 NaN as 0x7FC0 (as torch), float16 NaN quiet with its payload
// (as F16C). None depends on the thread's flush-denormal flag: a float16 is no subnormal float, and
// no step here makes one of it.

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../update_rules/host_device.h"
#include "dtype.h"
#include "isa.h"
#include "lanes.h"

namespace fusedopt {

FUSEDOPT_HD float float_from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

FUSEDOPT_HD std::uint32_t bits_from_float(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

FUSEDOPT_HD float to_float(BFloat16 value) {
  return float_from_bits(static_cast<std::uint32_t>(value.bits) << 16);
}

FUSEDOPT_HD BFloat16 to_bfloat16(float value) {
  const std::uint32_t bits = bits_from_float(value);
  const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return {static_cast<std::uint16_t>(nan ? 0x7FC0u : rounded)};
}

FUSEDOPT_HD float to_float(Float16 value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t rest = static_cast<std::uint32_t>(value.bits & 0x7FFFu) << 13;
  // A subnormal is the fraction of a float in [2^-14, 2^-13): what is left without the 2^-14.
  const float subnormal = float_from_bits(rest + 0x38800000u) - 0x1p-14f;
  const std::uint32_t normal = rest + 0x38000000u;
  const std::uint32_t finite = rest < 0x00800000u ? bits_from_float(subnormal) : normal;
  const std::uint32_t special = rest | 0x7F800000u | ((rest & 0x007FFFFFu) ? 0x00400000u : 0u);
  return float_from_bits(sign | (rest >= 0x0F800000u ? special : finite));
}

FUSEDOPT_HD Float16 to_float16(float value) {
  const std::uint32_t bits = bits_from_float(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Normal results round in the integer, subnormal ones in an addition of 0.5 (whose last bit is
  // the smallest float16; whether a subnormal float counts as zero there makes no difference).
  const std::uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3F000000u;
  const std::uint32_t nan = 0x7E00u | ((magnitude >> 13) & 0x03FFu);
  std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;
  half = magnitude > 0x7F800000u ? nan : half;
  return {static_cast<std::uint16_t>(sign | half)};
}

#if defined(FUSEDOPT_HAS_LANES)
// The bits of floats, of a NaN those of 0x7FC0.
struct TwoLanes {
  Lanes first, second;

  FUSEDOPT_HD TwoLanes(const float* from)
      : first(load_lanes(from)), second(load_lanes(from + kFloatLanes)) {
    const FloatLanes a = as_floats(first), b = as_floats(second);
    if (__builtin_expect(any_nan(a, b), false)) {
      const Lanes nan = FUSEDOPT_LANES(set1_epi32)(0x7FC00000);
      first = where_nan(a, nan, first);
      second = where_nan(b, nan, second);
    }
  }
};

FUSEDOPT_HD Lanes to_bfloat16(const TwoLanes& bits) {
  return upper_halves(rounded_to_upper(bits.first), rounded_to_upper(bits.second));
}
#endif

// n elements; the vector loops take what they can and the last loop the rest.
FUSEDOPT_HD void load_half(const BFloat16* from, int n, float* to) {
  int i = 0;
#if defined(FUSEDOPT_HAS_LANES)
  for (; i + 2 * kFloatLanes <= n; i += 2 * kFloatLanes) {
    const Lanes halves = load_lanes(from + i);
    store_lanes(first_widened(halves), to + i);
    store_lanes(second_widened(halves), to + i + kFloatLanes);
  }
#endif
#pragma omp simd
  for (int j = i; j < n; ++j) to[j] = to_float(from[j]);
}

FUSEDOPT_HD void load_half(const Float16* from, int n, float* to) {
  int i = 0;
#if defined(__AVX512BW__)
  for (; i + 16 <= n; i += 16) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(half));
  }
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
  }
#endif
#pragma omp simd
  for (int j = i; j < n; ++j) to[j] = to_float(from[j]);
}

FUSEDOPT_HD void store_half(const float* from, int n, BFloat16* to) {
  int i = 0;
#if defined(FUSEDOPT_HAS_LANES)
  for (; i + 2 * kFloatLanes <= n; i += 2 * kFloatLanes) {
    store_lanes(to_bfloat16(TwoLanes(from + i)), to + i);
  }
#endif
#pragma omp simd
  for (int j = i; j < n; ++j) to[j] = to_bfloat16(from[j]);
}

FUSEDOPT_HD void store_half(const float* from, int n, Float16* to) {
  int i = 0;
#if defined(__AVX512BW__)
  for (; i + 16 <= n; i += 16) {
    const __m256i half = _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), half);
  }
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
#endif
#pragma omp simd
  for (int j = i; j < n; ++j) to[j] = to_float16(from[j]);
}

// Where the values are as floats: in `buffer`, or where they are stored if that is as floats. Those
// are updated in place, and storing them is nothing (it copied: 20% of AdamW's time with float32
// state for bfloat16 parameters).
template <Isa isa>
float* load_as_float(Dtype dtype, void* from, std::int64_t at, int n, float* buffer) {
  switch (dtype) {
    case Dtype::kBFloat16:
      load_half(static_cast<const BFloat16*>(from) + at, n, buffer);
      return buffer;
    case Dtype::kFloat16:
      load_half(static_cast<const Float16*>(from) + at, n, buffer);
      return buffer;
    default:
      return static_cast<float*>(from) + at;
  }
}

// `from` is what load_as_float gave.
template <Isa isa>
void store_from_float(Dtype dtype, void* to, std::int64_t at, int n, const float* from) {
  if (dtype == Dtype::kBFloat16) return store_half(from, n, static_cast<BFloat16*>(to) + at);
  if (dtype == Dtype::kFloat16) return store_half(from, n, static_cast<Float16*>(to) + at);
}

}  // namespace fusedopt
