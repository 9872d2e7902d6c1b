// Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"): random bits as a
// function of a key and a counter, the same on every device and in every order.
#pragma once

#include <cstdint>

#include "../update_rules/host_device.h"
#include "half.h"

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
    const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * c0;
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<std::uint32_t>(product1);
    c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<std::uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

#if defined(__AVX512F__) || defined(__AVX2__)

// The same for the blocks first, first + 1, ..., as many as there are 64-bit lanes, in order. Products
// look at the lower half of a lane only, so that what is left in the upper half does not matter
// before the end. (Left to the compiler's vectorizer this took four times as long.)
#if defined(__AVX512F__)
using Lanes = __m512i;
#define FUSEDOPT_LANES(op) _mm512_##op
FUSEDOPT_HD Lanes all_lanes(std::uint64_t value) {
  return _mm512_set1_epi64(static_cast<long long>(value));
}
// Which block a lane has: those of store_lanes, which puts one after the other from two halves.
FUSEDOPT_HD Lanes lane_numbers() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
FUSEDOPT_HD Lanes exclusive_or(Lanes a, Lanes b, Lanes c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}
FUSEDOPT_HD Lanes pairs(Lanes lower, Lanes upper) {
  return _mm512_mask_shuffle_epi32(lower, 0xAAAA, upper, _MM_PERM_CCAA);
}
FUSEDOPT_HD void store_lanes(Lanes lanes, void* to) { _mm512_storeu_si512(to, lanes); }
#else
using Lanes = __m256i;
#define FUSEDOPT_LANES(op) _mm256_##op
FUSEDOPT_HD Lanes all_lanes(std::uint64_t value) {
  return _mm256_set1_epi64x(static_cast<long long>(value));
}
FUSEDOPT_HD Lanes lane_numbers() { return _mm256_setr_epi64x(0, 2, 1, 3); }
FUSEDOPT_HD Lanes exclusive_or(Lanes a, Lanes b, Lanes c) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
FUSEDOPT_HD Lanes pairs(Lanes lower, Lanes upper) {
  return _mm256_blend_epi32(lower, _mm256_shuffle_epi32(upper, 0xA0), 0xAA);
}
FUSEDOPT_HD void store_lanes(Lanes lanes, void* to) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), lanes);
}
#endif
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
#undef FUSEDOPT_LANES

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
