// State in 8 bits: a code per element and a float32 scale per kScaleElements of them, the largest
// absolute value. With r = |x| / scale in [0, 1]:
//   signed    c = round(127 sqrt(r)) with the sign of x      x = sign(c) (c / 127)^2 scale
//   unsigned  c = 255 r^(1/4), rounded up or down at random    x = (c / 255)^4 scale
// Second moments are divided by: one that is not zero never becomes zero (c >= 1, or the step would
// be enormous), and small changes reach them on average (a rounding to nearest would keep
// v + (1 - beta2) (g^2 - v) at v). A value that is not finite makes its block not finite.
#pragma once

#include <cmath>
#include <cstdint>

#include "../update_rules/host_device.h"
#include "half.h"

namespace fusedopt {

// A divisor of kPieceElements and kBlockElements, so that one thread or group has a whole scale.
constexpr int kScaleElements = 64;

FUSEDOPT_HD constexpr std::int64_t num_scales(std::int64_t numel) {
  return (numel + kScaleElements - 1) / kScaleElements;
}

// As an integer, so that the largest of several is the same in every order, NaNs included.
FUSEDOPT_HD std::uint32_t magnitude_bits(float value) {
  return bits_from_float(value) & 0x7FFFFFFFu;
}

// |x| / scale as two products, which are much quicker than a division: a scale is for many elements.
// A small one is raised first, for its reciprocal would be infinite.
struct Scale {
  float raise, reciprocal, most;  // the last two are 0 if the scale is 0 or not finite

  Scale() = default;
  FUSEDOPT_HD explicit Scale(float scale) {
    raise = scale < 0x1p-60f ? 0x1p64f : 1.0f;
    const bool usable = scale > 0.0f && magnitude_bits(scale) < 0x7F800000u;
    reciprocal = usable ? 1.0f / (scale * raise) : 0.0f;
    most = usable ? 1.0f : 0.0f;
  }
  FUSEDOPT_HD float ratio(float value) const {
    const float ratio = std::fabs(value) * raise * reciprocal;
    return ratio < most ? ratio : most;
  }
};

FUSEDOPT_HD float decode_signed(float code, float scale) {
  const float root = code * (1.0f / 127);
  return root * std::fabs(root) * scale;
}

FUSEDOPT_HD std::int8_t encode_signed(float value, const Scale& scale) {
  const int code = static_cast<int>(127.0f * std::sqrt(scale.ratio(value)) + 0.5f);
  return static_cast<std::int8_t>(value < 0.0f ? -code : code);
}

FUSEDOPT_HD float decode_unsigned(float code, float scale) {
  const float root = code * (1.0f / 255), square = root * root;
  return square * square * scale;
}

FUSEDOPT_HD float decode(std::int8_t code, float scale) { return decode_signed(code, scale); }
FUSEDOPT_HD float decode(std::uint8_t code, float scale) { return decode_unsigned(code, scale); }

// The code before it is rounded.
FUSEDOPT_HD float exact_unsigned(float value, const Scale& scale) {
  return 255.0f * std::sqrt(std::sqrt(scale.ratio(value)));
}

// `random`: 16 bits. What is so close to a code that only its roundings can have moved it stays there:
// values that do not change must not drift.
FUSEDOPT_HD std::uint8_t round_unsigned(float exact, float value, std::uint32_t random) {
  const auto near = static_cast<float>(static_cast<int>(exact + 0.5f));
  const float noise = static_cast<float>(static_cast<int>(random)) * 0x1p-16f;
  const float up = std::fabs(exact - near) < 0x1p-12f ? 0.5f : noise;
  const int code = static_cast<int>(exact + up);
  const int least = value > 0.0f ? 1 : 0;
  return static_cast<std::uint8_t>(code > least ? code : least);
}

FUSEDOPT_HD std::uint8_t encode_unsigned(float value, const Scale& scale, std::uint32_t random) {
  return round_unsigned(exact_unsigned(value, scale), value, random);
}

}  // namespace fusedopt
