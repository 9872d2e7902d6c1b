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

// The same for the blocks first, first + 1, ..., as many as there are 64-bit lanes: words[w] has word w
// of each. Products look at the lower half of a lane only, so that what is left in the upper half
// does not matter before the end. (Left to the compiler's vectorizer this took four times as long.)
#if defined(__AVX512F__)
using Lanes = __m512i;
constexpr int kPhiloxBlocks = 8;
#define FUSEDOPT_LANES(op) _mm512_##op
FUSEDOPT_HD Lanes lanes_from(std::uint64_t first) {
  return _mm512_add_epi64(_mm512_set1_epi64(static_cast<long long>(first)),
                          _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
}
FUSEDOPT_HD Lanes exclusive_or(Lanes a, Lanes b) { return _mm512_xor_si512(a, b); }
FUSEDOPT_HD void store_words(Lanes lanes, std::uint32_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi64_epi32(lanes));
}
#else
using Lanes = __m256i;
constexpr int kPhiloxBlocks = 4;
#define FUSEDOPT_LANES(op) _mm256_##op
FUSEDOPT_HD Lanes lanes_from(std::uint64_t first) {
  return _mm256_add_epi64(_mm256_set1_epi64x(static_cast<long long>(first)),
                          _mm256_setr_epi64x(0, 1, 2, 3));
}
FUSEDOPT_HD Lanes exclusive_or(Lanes a, Lanes b) { return _mm256_xor_si256(a, b); }
FUSEDOPT_HD void store_words(Lanes lanes, std::uint32_t* to) {
  const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
  const __m256i packed = _mm256_permutevar8x32_epi32(lanes, even);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
#endif

template <Isa>
FUSEDOPT_HD void philox_lanes(std::uint64_t key, std::uint64_t step, std::uint64_t first,
                              std::uint32_t (*words)[kPhiloxBlocks]) {
  const auto all = [](std::uint64_t value) __attribute__((always_inline)) {
#if defined(__AVX512F__)
    return _mm512_set1_epi64(static_cast<long long>(value));
#else
    return _mm256_set1_epi64x(static_cast<long long>(value));
#endif
  };
  const Lanes multiplier0 = all(0xD2511F53u), multiplier1 = all(0xCD9E8D57u);
  auto key0 = static_cast<std::uint32_t>(key), key1 = static_cast<std::uint32_t>(key >> 32);
  Lanes c0 = lanes_from(first), c1 = FUSEDOPT_LANES(srli_epi64)(c0, 32);
  Lanes c2 = all(step), c3 = all(step >> 32);
  for (int round = 0; round < 10; ++round) {
    const Lanes product0 = FUSEDOPT_LANES(mul_epu32)(c0, multiplier0);
    const Lanes product1 = FUSEDOPT_LANES(mul_epu32)(c2, multiplier1);
    c0 = exclusive_or(exclusive_or(FUSEDOPT_LANES(srli_epi64)(product1, 32), c1), all(key0));
    c1 = product1;
    c2 = exclusive_or(exclusive_or(FUSEDOPT_LANES(srli_epi64)(product0, 32), c3), all(key1));
    c3 = product0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  store_words(c0, words[0]);
  store_words(c1, words[1]);
  store_words(c2, words[2]);
  store_words(c3, words[3]);
}
#undef FUSEDOPT_LANES

#else

constexpr int kPhiloxBlocks = 1;

template <Isa>
FUSEDOPT_HD void philox_lanes(std::uint64_t key, std::uint64_t step, std::uint64_t first,
                              std::uint32_t (*words)[kPhiloxBlocks]) {
  const Random8 random = philox(key, step, first);
  for (int w = 0; w < 4; ++w) words[w][0] = random.words[w];
}

#endif

}  // namespace fusedopt
