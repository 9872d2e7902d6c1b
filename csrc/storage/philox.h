// Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"): random bits as a
// function of a key and a counter, the same on every device and in every order.
#pragma once

#include <cstdint>

#include "../update_rules/host_device.h"
#include "instructions.h"

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

}  // namespace fusedopt
