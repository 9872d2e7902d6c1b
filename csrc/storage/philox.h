// Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"): random bits as a
// function of a key and a counter, the same on every device and in every order.
#pragma once

#include <cstdint>
#include <cstring>

#include "../update_rules/host_device.h"
#include "instructions.h"
#include "isa.h"
#include "lanes.h"

namespace fusedopt {

// 16 random bits for each of eight elements.
struct Random8 {
  std::uint32_t words[4];

  FUSEDOPT_HD std::uint32_t operator[](int i) const {
    return words[i / 2] >> 16 * (i % 2) & 0xFFFFu;
  }
};

// Key of the bits that codes are rounded with: they need not differ from run to run.
constexpr std::uint64_t kCodeKey = 0x66757365646F7074u;

// The bits for elements [8 * block, 8 * block + 8) of a tensor at one step.
FUSEDOPT_HD Random8 philox(std::uint64_t key, std::uint64_t step, std::uint64_t block) {
  auto key0 = static_cast<std::uint32_t>(key), key1 = static_cast<std::uint32_t>(key >> 32);
  auto c0 = static_cast<std::uint32_t>(block), c1 = static_cast<std::uint32_t>(block >> 32);
  auto c2 = static_cast<std::uint32_t>(step), c3 = static_cast<std::uint32_t>(step >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = wide_product(0xD2511F53u, c0);
    const std::uint64_t product1 = wide_product(0xCD9E8D57u, c2);
    c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<std::uint32_t>(product1);
    c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<std::uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

#if defined(FUSEDOPT_HAS_LANES)

// The same for the blocks first, first + 1, ..., as many as there are 64-bit lanes, in order. Products
// look at the lower half of a lane only, so that what is left in the upper half does not matter
// before the end. (Left to the compiler's vectorizer this took four times as long.)
constexpr int kPhiloxBlocks = sizeof(Lanes) / 8;

template <Isa>
FUSEDOPT_HD void philox_blocks(std::uint64_t key, std::uint64_t step, std::uint64_t first,
                               std::uint16_t* to) {
  const Lanes multiplier0 = all_lanes(0xD2511F53u), multiplier1 = all_lanes(0xCD9E8D57u);
  auto key0 = static_cast<std::uint32_t>(key), key1 = static_cast<std::uint32_t>(key >> 32);
  Lanes c0 = FUSEDOPT_LANES(add_epi64)(all_lanes(first), lane_numbers());
  Lanes c1 = FUSEDOPT_LANES(srli_epi64)(c0, 32), c2 = all_lanes(step), c3 = all_lanes(step >> 32);
  for (int round = 0; round < 10; ++round) {
    const Lanes product0 = FUSEDOPT_LANES(mul_epu32)(c0, multiplier0);
    const Lanes product1 = FUSEDOPT_LANES(mul_epu32)(c2, multiplier1);
    c0 = exclusive_or(FUSEDOPT_LANES(srli_epi64)(product1, 32), c1, all_lanes(key0));
    c1 = product1;
    c2 = exclusive_or(FUSEDOPT_LANES(srli_epi64)(product0, 32), c3, all_lanes(key1));
    c3 = product0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const Lanes words01 = pairs(c0, c1), words23 = pairs(c2, c3);
  store_lanes(FUSEDOPT_LANES(unpacklo_epi64)(words01, words23), to);
  store_lanes(FUSEDOPT_LANES(unpackhi_epi64)(words01, words23), to + 4 * kPhiloxBlocks);
}

#else

constexpr int kPhiloxBlocks = 1;

template <Isa>
FUSEDOPT_HD void philox_blocks(std::uint64_t key, std::uint64_t step, std::uint64_t first,
                               std::uint16_t* to) {
  const Random8 random = philox(key, step, first);
  std::memcpy(to, random.words, sizeof(random.words));
}

#endif

}  // namespace fusedopt
