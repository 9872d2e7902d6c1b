// What tests/storage/ calls: a claim about every float32, and values to compare with.
#include <cmath>
#include <cstdint>

#include "../../csrc/storage/philox.h"
#include "../../csrc/storage/split_master.h"

using namespace fusedopt;

namespace {

constexpr std::uint32_t kInfinity = 0x7F800000u;

std::uint32_t is_nan(std::uint32_t bits) { return (bits & 0x7FFFFFFFu) > kInfinity; }

// 1 if a master comes back from its parameter and remainder, and no bfloat16 is nearer to it than the
// parameter; of two as near, that is the one further from zero.
std::uint32_t is_right(std::uint32_t bits, std::uint32_t seen, std::uint32_t back) {
  const float master = float_from_bits(bits);
  // Between the two neighbours floats are evenly spaced, so that both differences are exact.
  const std::uint32_t toward_zero = bits & 0xFFFF0000u, away = toward_zero + 0x10000u;
  const float below = std::fabs(master - float_from_bits(toward_zero));
  const float above = std::fabs(float_from_bits(away) - master);
  // What is nearer to 2^128 than to the largest bfloat16 is infinite.
  const std::uint32_t overflows =
      ((away & 0x7FFFFFFFu) == kInfinity) & ((bits & 0xFFFFu) >= 0x8000u);
  const std::uint32_t finite = (bits & kInfinity) != kInfinity;
  const std::uint32_t up = finite & (overflows | (above <= below));
  const std::uint32_t exact = (back == bits) & (seen == toward_zero + (up << 16));
  const std::uint32_t nan = is_nan(bits);
  return (exact & ~nan) | (nan & is_nan(back) & is_nan(seen));
}

}  // namespace

extern "C" {

void split_masters(const float* masters, std::int64_t count, std::uint16_t* params,
                   std::uint16_t* remainders) {
  store_masters(masters, static_cast<int>(count), params, remainders);
}

void join_masters(const std::uint16_t* params, const std::uint16_t* remainders, std::int64_t count,
                  float* masters) {
  load_masters(params, remainders, static_cast<int>(count), masters);
}

// How many of the masters with the bits [begin, end) are not right.
std::uint64_t wrong_masters(std::uint64_t begin, std::uint64_t end) {
  constexpr std::uint32_t kAtOnce = 4096;
  std::uint64_t wrong = 0;
  for (; begin < end; begin += kAtOnce) {
    const auto first = static_cast<std::uint32_t>(begin);
    float masters[kAtOnce], back[kAtOnce];
    std::uint16_t params[kAtOnce], remainders[kAtOnce];
    for (std::uint32_t i = 0; i < kAtOnce; ++i) masters[i] = float_from_bits(first + i);
    split_masters(masters, kAtOnce, params, remainders);
    join_masters(params, remainders, kAtOnce, back);
    std::uint32_t right = 0;
    for (std::uint32_t i = 0; i < kAtOnce; ++i) {
      const std::uint32_t seen = static_cast<std::uint32_t>(params[i]) << 16;
      right += is_right(first + i, seen, bits_from_float(back[i]));
    }
    wrong += kAtOnce - right;
  }
  return wrong;
}

void philox_words(std::uint64_t key, std::uint64_t step, std::uint64_t block,
                  std::uint32_t* words) {
  const Random8 random = philox(key, step, block);
  for (int w = 0; w < 4; ++w) words[w] = random.words[w];
}

}  // extern "C"
