#pragma once

// Eight neighbouring elements, which one lane has: as they are in memory and as numbers. The GPU's
// forms of what storage/ has; its instructions take four bytes or two halves at a time.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../storage/instructions.h"
#include "../storage/philox.h"
#include "../storage/split_master.h"
#include "../storage/stochastic.h"
#include "apply_kernel.h"

namespace fusedopt {

// Memory -------------------------------------------------------------------------------------

template <typename Element>
using LaneBytes = Bytes<kLaneElements* static_cast<int>(sizeof(Element))>;

template <typename Element>
constexpr int kPieceBytes = sizeof(LaneBytes<Element>) < 16 ? sizeof(LaneBytes<Element>) : 16;

// Up to eight elements from the first element of the block on; what is not there is zero.
template <typename Element>
FUSEDOPT_HD LaneBytes<Element> load_lane(const void* from, std::uint32_t first, int n,
                                         bool vector) {
  LaneBytes<Element> lane;
  const auto* const elements = static_cast<const Element*>(from) + first;
  if (vector) {
    constexpr int kBytes = kPieceBytes<Element>;
    FUSEDOPT_UNROLL
    for (int at = 0; at < static_cast<int>(sizeof(lane)); at += kBytes) {
      const auto piece = load_bytes<kBytes>(reinterpret_cast<const char*>(elements) + at);
      std::memcpy(reinterpret_cast<char*>(&lane) + at, &piece, kBytes);
    }
    return lane;
  }
  Element all[kLaneElements];
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) all[i] = i < n ? elements[i] : Element();
  std::memcpy(&lane, all, sizeof(lane));
  return lane;
}

template <typename Element>
FUSEDOPT_HD void store_lane(void* to, std::uint32_t first, int n, bool vector,
                            const LaneBytes<Element>& lane) {
  auto* const elements = static_cast<Element*>(to) + first;
  if (vector) {
    constexpr int kBytes = kPieceBytes<Element>;
    FUSEDOPT_UNROLL
    for (int at = 0; at < static_cast<int>(sizeof(lane)); at += kBytes) {
      Bytes<kBytes> piece;
      std::memcpy(&piece, reinterpret_cast<const char*>(&lane) + at, kBytes);
      store_bytes(reinterpret_cast<char*>(elements) + at, piece);
    }
    return;
  }
  Element all[kLaneElements];
  std::memcpy(all, &lane, sizeof(lane));
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) {
    if (i < n) elements[i] = all[i];
  }
}

// Floats -------------------------------------------------------------------------------------

using LaneValues = float[kLaneElements];

FUSEDOPT_HD void load_floats(Dtype dtype, const void* from, std::uint32_t first, int n, bool vector,
                             LaneValues& to) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return unpack<BFloat16>(load_lane<std::uint16_t>(from, first, n, vector), to);
    case Dtype::kFloat16:
      return unpack<Float16>(load_lane<std::uint16_t>(from, first, n, vector), to);
    default:
      return unpack<float>(load_lane<float>(from, first, n, vector), to);
  }
}

// Rounded to bfloat16 or float16.
FUSEDOPT_HD LaneBytes<std::uint16_t> halves_of(Dtype dtype, const LaneValues& values) {
  LaneBytes<std::uint16_t> lane;
  if (dtype == Dtype::kBFloat16) {
    pack<BFloat16>(values, &lane);
  } else {
    pack<Float16>(values, &lane);
  }
  return lane;
}

FUSEDOPT_HD void store_floats(Dtype dtype, void* to, std::uint32_t first, int n, bool vector,
                              const LaneValues& from) {
  if (dtype == Dtype::kFloat32) {
    LaneBytes<float> lane;
    pack<float>(from, &lane);
    return store_lane<float>(to, first, n, vector, lane);
  }
  store_lane<std::uint16_t>(to, first, n, vector, halves_of(dtype, from));
}

FUSEDOPT_HD bool any_nan(const LaneValues& values) {
  bool any = false;
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; i += 2) {
    any = any | ((values[i] != values[i]) | (values[i + 1] != values[i + 1]));
  }
  return any;
}

// The largest one among the first n (magnitude_bits).
FUSEDOPT_HD std::uint32_t largest_magnitude(const LaneValues& values, int n) {
  std::uint32_t largest = 0;
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) {
    largest = larger_magnitude(largest, i < n ? values[i] : 0.0f);
  }
  return largest;
}

// In two bytes ------------------------------------------------------------------------------------

// As join_master and split_master, without a NaN, which is asked for once.
FUSEDOPT_HD void join_masters(const LaneBytes<std::uint16_t>& high,
                              const LaneBytes<std::uint16_t>& low, LaneValues& to) {
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; i += 2) {
    const std::uint32_t highs = high.words[i / 2], lows = low.words[i / 2];
    const auto first = static_cast<std::int16_t>(lows);
    const auto second = static_cast<std::int32_t>(lows) >> 16;
    to[i] = float_from_bits((highs << 16) + static_cast<std::uint32_t>(first));
    to[i + 1] = float_from_bits((highs & 0xFFFF0000u) + static_cast<std::uint32_t>(second));
  }
  if (__builtin_expect(!any_nan(to), true)) return;
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) {
    const int shift = 16 * (i % 2);
    to[i] = join_master(static_cast<std::uint16_t>(high.words[i / 2] >> shift),
                        static_cast<std::uint16_t>(low.words[i / 2] >> shift));
  }
}

FUSEDOPT_HD void split_masters(const LaneValues& from, LaneBytes<std::uint16_t>* high,
                               LaneBytes<std::uint16_t>* low) {
  const bool nan = any_nan(from);
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; i += 2) {
    const std::uint32_t first = bits_from_float(from[i]), second = bits_from_float(from[i + 1]);
    high->words[i / 2] = picked_bytes(first + 0x8000u, second + 0x8000u, 0x7632);
    low->words[i / 2] = picked_bytes(first, second, 0x5410);
  }
  if (__builtin_expect(!nan, true)) return;
  std::uint16_t highs[kLaneElements], lows[kLaneElements];
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) split_master(from[i], &highs[i], &lows[i]);
  std::memcpy(high, highs, sizeof(highs));
  std::memcpy(low, lows, sizeof(lows));
}

FUSEDOPT_HD LaneBytes<std::uint16_t> rounded_stochastically(const LaneValues& values,
                                                            const Random8& random) {
  LaneBytes<std::uint16_t> lane;
  bool finite = true;
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; i += 2) {
    const float first = values[i], second = values[i + 1];
    lane.words[i / 2] = picked_bytes(bits_from_float(first) + random[i],
                                     bits_from_float(second) + random[i + 1], 0x7632);
    finite = finite & (std::fabs(first) <= std::numeric_limits<float>::max()) &
             (std::fabs(second) <= std::numeric_limits<float>::max());
  }
  if (__builtin_expect(finite, true)) return lane;
  std::uint16_t bits[kLaneElements];
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) bits[i] = round_stochastically(values[i], random[i]).bits;
  std::memcpy(&lane, bits, sizeof(lane));
  return lane;
}

}  // namespace fusedopt
