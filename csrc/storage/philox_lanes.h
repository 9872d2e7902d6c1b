// Philox4x32-10 for many elements at once, on the CPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "../update_rules/host_device.h"
#include "isa.h"
#include "lanes.h"
#include "philox.h"

namespace fusedopt {

// Elements whose bits are drawn together; `at` is a multiple of it.
constexpr int kRandomElements = 64;

// The keys of the rounds, in memory, from where vectors are filled with them at no cost. (A compiler that
// sees how they come about fills each from a register, which costs as much as a product.)
struct PhiloxKeys {
  std::uint64_t words[2 * 10];
};

template <Isa>
__attribute__((noinline)) PhiloxKeys philox_keys(std::uint64_t key) {
  PhiloxKeys keys;
  auto key0 = static_cast<std::uint32_t>(key), key1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    keys.words[2 * round] = key0;
    keys.words[2 * round + 1] = key1;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return keys;
}

#if defined(FUSEDOPT_HAS_LANES)

// In rounds, each of which waits longer than it works: there may be other work between them. Products
// look at the lower half of a lane only, so that what is left in the upper half does not matter before
// the end. (Left to the compiler's vectorizer this took four times as long.)
template <Isa>
struct RandomElements {
  static constexpr int kVectors = kRandomElements / sizeof(Lanes);
  static constexpr int kBlocks = sizeof(Lanes) / 8;  // of a vector, as philox() counts them
  Lanes c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];

  FUSEDOPT_HD RandomElements(std::uint64_t step, std::int64_t at) {
    const auto first = static_cast<std::uint64_t>(at / 8);
    for (int v = 0; v < kVectors; ++v) {
      c0[v] = FUSEDOPT_LANES(add_epi64)(all_lanes(first + v * kBlocks), lane_numbers());
      c1[v] = FUSEDOPT_LANES(srli_epi64)(c0[v], 32);
      c2[v] = all_lanes(step);
      c3[v] = all_lanes(step >> 32);
    }
  }

  FUSEDOPT_HD void rounds(const PhiloxKeys& keys, int begin, int end) {
    const Lanes multiplier0 = all_lanes(0xD2511F53u), multiplier1 = all_lanes(0xCD9E8D57u);
    for (int round = begin; round < end; ++round) {
      const Lanes key0 = all_lanes(keys.words[2 * round]);
      const Lanes key1 = all_lanes(keys.words[2 * round + 1]);
      for (int v = 0; v < kVectors; ++v) {
        const Lanes product0 = FUSEDOPT_LANES(mul_epu32)(c0[v], multiplier0);
        const Lanes product1 = FUSEDOPT_LANES(mul_epu32)(c2[v], multiplier1);
        c0[v] = exclusive_or(FUSEDOPT_LANES(srli_epi64)(product1, 32), c1[v], key0);
        c1[v] = product1;
        c2[v] = exclusive_or(FUSEDOPT_LANES(srli_epi64)(product0, 32), c3[v], key1);
        c3[v] = product0;
      }
    }
  }

  // 16 bits per element, in order.
  FUSEDOPT_HD void store(std::uint16_t* to) const {
    for (int v = 0; v < kVectors; ++v, to += 8 * kBlocks) {
      const Lanes words01 = pairs(c0[v], c1[v]), words23 = pairs(c2[v], c3[v]);
      store_lanes(FUSEDOPT_LANES(unpacklo_epi64)(words01, words23), to);
      store_lanes(FUSEDOPT_LANES(unpackhi_epi64)(words01, words23), to + 4 * kBlocks);
    }
  }
};

template <Isa isa>
FUSEDOPT_HD void random_bits(const PhiloxKeys& keys, std::uint64_t step, std::int64_t at,
                             std::uint16_t* to) {
  RandomElements<isa> random(step, at);
  random.rounds(keys, 0, 10);
  random.store(to);
}

#else

template <Isa>
FUSEDOPT_HD void random_bits(const PhiloxKeys& keys, std::uint64_t step, std::int64_t at,
                             std::uint16_t* to) {
  const std::uint64_t key = keys.words[0] | keys.words[1] << 32;
  for (int i = 0; i < kRandomElements; i += 8) {
    const Random8 random = philox(key, step, static_cast<std::uint64_t>((at + i) / 8));
    std::memcpy(to + i, random.words, sizeof(random.words));
  }
}

#endif

}  // namespace fusedopt
