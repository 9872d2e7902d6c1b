#pragma once

// The codes of a lane's elements (storage/blockwise8.h). They are found by the rough roots of the GPU, which
// cost a tenth of exact ones; and as the CPU finds them where a code could be another one for that.

#include <cmath>
#include <cstdint>

#include "../storage/blockwise8.h"
#include "../storage/instructions.h"
#include "../storage/philox.h"
#include "stored_lanes.h"

namespace fusedopt {

using LaneCodes = LaneBytes<std::uint8_t>;

FUSEDOPT_HD void decode_lane(const LaneCodes& codes, Dtype dtype, float scale, LaneValues& to) {
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) {
    const std::uint32_t word = codes.words[i / 4], byte = i % 4;
    if (dtype == Dtype::kInt8) {
      const std::uint32_t code = picked_bytes(word, 0, 0x8880u + 0x1111u * byte);
      to[i] = decode_signed(static_cast<float>(static_cast<std::int32_t>(code)), scale);
    } else {
      const std::uint32_t code = picked_bytes(word, 0, 0x4440u + byte);
      to[i] = decode_unsigned(static_cast<float>(code), scale);
    }
  }
}

// Whether what is divided by this scale is a number, and so is the reciprocal of the scale.
FUSEDOPT_HD bool is_moderate(float scale) { return scale >= 0x1p-60f && scale < 0x1p60f; }

// One byte of each of eight words, its number given.
FUSEDOPT_HD LaneCodes bytes_of(const std::uint32_t (&words)[kLaneElements], std::uint32_t byte) {
  LaneCodes bytes;
  FUSEDOPT_UNROLL
  for (int w = 0; w < LaneCodes::kWords; ++w) {
    const std::uint32_t* const four = words + 4 * w;
    const std::uint32_t both = byte | (byte + 4) << 4;
    bytes.words[w] = picked_bytes(picked_bytes(four[0], four[1], both),
                                  picked_bytes(four[2], four[3], both), 0x5410);
  }
  return bytes;
}

// 127 times a root, rough or exact: they differ by less than this, even if rough ones are twice as far
// off. Rounded by an addition that leaves no room for a fraction, it is the code, in the last byte.
constexpr float kUnsureSigned = 0x1.6p-14f;

FUSEDOPT_HD LaneCodes encode_lane(const LaneValues& from, float scale) {
  const float factor = rough_reciprocal(scale) * (127.0f * 127.0f);
  float farthest = is_moderate(scale) ? 0.0f : 1.0f;  // from a code
  std::uint32_t words[kLaneElements];
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) {
    const float root = std::copysign(rough_root(std::fabs(from[i]) * factor), from[i]);
    const float rounded = root + 0x1.8p23f;
    words[i] = bits_from_float(rounded);
    farthest = std::fmax(farthest, std::fabs(root - (rounded - 0x1.8p23f)));
  }
  if (__builtin_expect(!(farthest < 0.5f - kUnsureSigned), false)) {
    const Scale exact(scale);
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; ++i) {
      words[i] = static_cast<std::uint32_t>(encode_signed(from[i], exact));
    }
  }
  return bytes_of(words, 0);
}

// 255 times a fourth root, rough or exact: they differ by less than six units of 2^-15, the last bit of
// floats between 256 and 512. encode_unsigned leaves what is within eight units of a code there, whatever
// is random: raised by kRaised units it is not below that code. Whether a code is reached is not sure
// where the sum is less than kUnsure units above it.
constexpr std::uint32_t kRaised = 15, kUnsure = 30;

FUSEDOPT_HD LaneCodes encode_lane(const LaneValues& from, float scale, const Random8& random) {
  const float factor = rough_reciprocal(scale) * (255.0f * 255.0f * 255.0f * 255.0f);
  const std::uint32_t unsure = is_moderate(scale) ? 2 * kUnsure : 0x10000u;
  std::uint32_t sums[kLaneElements];  // the code above 16 bits
  std::uint32_t nearest = 0xFFFFu;
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) {
    const float least = from[i] > 0.0f ? 1.0f : 0.0f;
    const float square = std::fmax(std::fabs(from[i]) * factor, least);
    const float raised = rough_root(rough_root(square)) + (256.0f + kRaised * 0x1p-15f);
    sums[i] = 2 * bits_from_float(raised) + random[i];
    const std::uint32_t fraction = sums[i] & 0xFFFFu;
    nearest = fraction < nearest ? fraction : nearest;
  }
  if (__builtin_expect(nearest < unsure, false)) {
    const Scale exact(scale);
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; ++i) {
      if ((sums[i] & 0xFFFFu) >= unsure) continue;
      sums[i] = static_cast<std::uint32_t>(encode_unsigned(from[i], exact, random[i])) << 16;
    }
  }
  return bytes_of(sums, 2);
}

}  // namespace fusedopt
