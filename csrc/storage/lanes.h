// The vectors of the instruction set, for the few loops that the compiler's vectorizer does not see
// through. AVX2 and AVX-512 have most operations under the same name: FUSEDOPT_LANES(add_epi32).
#pragma once

#include <cstdint>

#include "../update_rules/host_device.h"

#if defined(__AVX2__)
#define FUSEDOPT_HAS_LANES 1

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own AVX-512 header
#endif
#include <immintrin.h>

namespace fusedopt {

#if defined(__AVX512BW__)
#define FUSEDOPT_LANES(op) _mm512_##op
using Lanes = __m512i;
using FloatLanes = __m512;

alignas(64) constexpr std::uint16_t kTwice[] = {
    0,  0,  1,  1,  2,  2,  3,  3,  4,  4,  5,  5,  6,  6,  7,  7,  8,  8,  9,  9,  10, 10,
    11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 16, 16, 17, 17, 18, 18, 19, 19, 20, 20, 21, 21,
    22, 22, 23, 23, 24, 24, 25, 25, 26, 26, 27, 27, 28, 28, 29, 29, 30, 30, 31, 31};
alignas(64) constexpr std::uint16_t kEven[] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                               22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42,
                                               44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
alignas(64) constexpr std::uint16_t kOdd[] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                              23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                              45, 47, 49, 51, 53, 55, 57, 59, 61, 63};

FUSEDOPT_HD Lanes all_lanes(std::uint64_t value) {
  return _mm512_set1_epi64(static_cast<long long>(value));
}
FUSEDOPT_HD Lanes load_lanes(const void* from) { return _mm512_loadu_si512(from); }
FUSEDOPT_HD void store_lanes(Lanes lanes, void* to) { _mm512_storeu_si512(to, lanes); }
FUSEDOPT_HD FloatLanes as_floats(Lanes bits) { return _mm512_castsi512_ps(bits); }
FUSEDOPT_HD Lanes as_bits(FloatLanes floats) { return _mm512_castps_si512(floats); }
FUSEDOPT_HD bool any_nan(FloatLanes a, FloatLanes b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) != 0;
}
// Of each 32 bits those of `then` where the float is a NaN.
FUSEDOPT_HD Lanes where_nan(FloatLanes floats, Lanes then, Lanes otherwise) {
  return _mm512_mask_mov_epi32(otherwise, _mm512_cmp_ps_mask(floats, floats, _CMP_UNORD_Q), then);
}
// The first and the second half of 16-bit values, as the upper halves of 32 bits.
FUSEDOPT_HD Lanes first_widened(Lanes values) {
  return _mm512_maskz_permutexvar_epi16(0xAAAAAAAA, load_lanes(kTwice), values);
}
FUSEDOPT_HD Lanes second_widened(Lanes values) {
  return _mm512_maskz_permutexvar_epi16(0xAAAAAAAA, load_lanes(kTwice + 32), values);
}
// The same with lower halves.
FUSEDOPT_HD Lanes first_pairs(Lanes lower, Lanes upper) {
  return _mm512_mask_permutexvar_epi16(first_widened(upper), 0x55555555, load_lanes(kTwice), lower);
}
FUSEDOPT_HD Lanes second_pairs(Lanes lower, Lanes upper) {
  return _mm512_mask_permutexvar_epi16(second_widened(upper), 0x55555555, load_lanes(kTwice + 32),
                                       lower);
}
// And back.
FUSEDOPT_HD Lanes lower_halves(Lanes first, Lanes second) {
  return _mm512_permutex2var_epi16(first, load_lanes(kEven), second);
}
FUSEDOPT_HD Lanes upper_halves(Lanes first, Lanes second) {
  return _mm512_permutex2var_epi16(first, load_lanes(kOdd), second);
}
// What has the nearest upper half as its upper half, of two the even one.
FUSEDOPT_HD Lanes rounded_to_upper(Lanes bits) {
  const Lanes below_half = _mm512_set1_epi32(0x7FFF), half = _mm512_set1_epi32(0x8000);
  const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  return _mm512_mask_add_epi32(_mm512_add_epi32(bits, below_half), is_odd, bits, half);
}
// Of each 64-bit lane, so that unpacklo and unpackhi give the first and the second half in order.
FUSEDOPT_HD Lanes lane_numbers() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
FUSEDOPT_HD Lanes exclusive_or(Lanes a, Lanes b, Lanes c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}
FUSEDOPT_HD Lanes pairs(Lanes lower, Lanes upper) {
  return _mm512_mask_shuffle_epi32(lower, 0xAAAA, upper, _MM_PERM_CCAA);
}
FUSEDOPT_HD FloatLanes without_sign(FloatLanes floats) { return _mm512_abs_ps(floats); }
FUSEDOPT_HD FloatLanes with_sign_of(FloatLanes floats, FloatLanes other) {
  const Lanes sign = _mm512_and_si512(as_bits(other), _mm512_set1_epi32(INT32_MIN));
  return as_floats(_mm512_or_si512(as_bits(floats), sign));
}
FUSEDOPT_HD FloatLanes nearest_whole(FloatLanes floats) {
  return _mm512_roundscale_ps(floats, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FUSEDOPT_HD FloatLanes where_less(FloatLanes a, FloatLanes b, FloatLanes then,
                                  FloatLanes otherwise) {
  return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), then);
}
// At least 1 where a float is above zero.
FUSEDOPT_HD Lanes one_where_positive(FloatLanes floats, Lanes values) {
  const __mmask16 positive = _mm512_cmp_ps_mask(floats, _mm512_setzero_ps(), _CMP_GT_OQ);
  return _mm512_mask_max_epi32(values, positive, values, _mm512_set1_epi32(1));
}
// Neighbours of fewer bits as 32-bit integers.
FUSEDOPT_HD Lanes load_widened(const std::int8_t* from) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
FUSEDOPT_HD Lanes load_widened(const std::uint8_t* from) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
FUSEDOPT_HD Lanes load_widened(const std::uint16_t* from) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
FUSEDOPT_HD Lanes quarters_in_order(Lanes bytes) {
  return _mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
}
#else
#define FUSEDOPT_LANES(op) _mm256_##op
using Lanes = __m256i;
using FloatLanes = __m256;

FUSEDOPT_HD Lanes all_lanes(std::uint64_t value) {
  return _mm256_set1_epi64x(static_cast<long long>(value));
}
FUSEDOPT_HD Lanes load_lanes(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
FUSEDOPT_HD void store_lanes(Lanes lanes, void* to) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), lanes);
}
FUSEDOPT_HD FloatLanes as_floats(Lanes bits) { return _mm256_castsi256_ps(bits); }
FUSEDOPT_HD Lanes as_bits(FloatLanes floats) { return _mm256_castps_si256(floats); }
FUSEDOPT_HD bool any_nan(FloatLanes a, FloatLanes b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)) != 0;
}
FUSEDOPT_HD Lanes where_nan(FloatLanes floats, Lanes then, Lanes otherwise) {
  const __m256i nan = as_bits(_mm256_cmp_ps(floats, floats, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(otherwise, then, nan);
}
FUSEDOPT_HD Lanes in_order(Lanes lanes) { return _mm256_permute4x64_epi64(lanes, 0xD8); }
FUSEDOPT_HD Lanes first_pairs(Lanes lower, Lanes upper) {
  return _mm256_unpacklo_epi16(in_order(lower), in_order(upper));
}
FUSEDOPT_HD Lanes second_pairs(Lanes lower, Lanes upper) {
  return _mm256_unpackhi_epi16(in_order(lower), in_order(upper));
}
FUSEDOPT_HD Lanes first_widened(Lanes values) {
  return _mm256_unpacklo_epi16(_mm256_setzero_si256(), in_order(values));
}
FUSEDOPT_HD Lanes second_widened(Lanes values) {
  return _mm256_unpackhi_epi16(_mm256_setzero_si256(), in_order(values));
}
FUSEDOPT_HD Lanes lower_halves(Lanes first, Lanes second) {
  const Lanes lower = _mm256_set1_epi32(0xFFFF);
  return in_order(
      _mm256_packus_epi32(_mm256_and_si256(first, lower), _mm256_and_si256(second, lower)));
}
FUSEDOPT_HD Lanes upper_halves(Lanes first, Lanes second) {
  return in_order(_mm256_packus_epi32(_mm256_srli_epi32(first, 16), _mm256_srli_epi32(second, 16)));
}
FUSEDOPT_HD Lanes rounded_to_upper(Lanes bits) {
  const Lanes below_half = _mm256_set1_epi32(0x7FFF), one = _mm256_set1_epi32(1);
  const Lanes last_bit = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  return _mm256_add_epi32(_mm256_add_epi32(bits, below_half), last_bit);
}
FUSEDOPT_HD Lanes lane_numbers() { return _mm256_setr_epi64x(0, 2, 1, 3); }
FUSEDOPT_HD Lanes exclusive_or(Lanes a, Lanes b, Lanes c) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
FUSEDOPT_HD Lanes pairs(Lanes lower, Lanes upper) {
  return _mm256_blend_epi32(lower, _mm256_shuffle_epi32(upper, 0xA0), 0xAA);
}
FUSEDOPT_HD FloatLanes without_sign(FloatLanes floats) {
  return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), floats);
}
FUSEDOPT_HD FloatLanes with_sign_of(FloatLanes floats, FloatLanes other) {
  return _mm256_or_ps(floats, _mm256_and_ps(other, _mm256_set1_ps(-0.0f)));
}
FUSEDOPT_HD FloatLanes nearest_whole(FloatLanes floats) {
  return _mm256_round_ps(floats, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FUSEDOPT_HD FloatLanes where_less(FloatLanes a, FloatLanes b, FloatLanes then,
                                  FloatLanes otherwise) {
  return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
FUSEDOPT_HD Lanes one_where_positive(FloatLanes floats, Lanes values) {
  const Lanes positive = as_bits(_mm256_cmp_ps(floats, _mm256_setzero_ps(), _CMP_GT_OQ));
  return _mm256_max_epi32(values, _mm256_srli_epi32(positive, 31));
}
FUSEDOPT_HD Lanes load_widened(const std::int8_t* from) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
FUSEDOPT_HD Lanes load_widened(const std::uint8_t* from) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
FUSEDOPT_HD Lanes load_widened(const std::uint16_t* from) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
FUSEDOPT_HD Lanes quarters_in_order(Lanes bytes) {
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
#endif

constexpr int kFloatLanes = sizeof(Lanes) / sizeof(float);

}  // namespace fusedopt

#endif
