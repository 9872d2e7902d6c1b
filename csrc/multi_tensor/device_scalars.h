#pragma once

// The numbers that a tensor keeps on the device: all blocks of the tensor read them, one moves them on.

#include <cstdint>

#include "../update_rules/host_device.h"
#include "../update_rules/rule.h"

namespace fusedopt {

// Adds one to a count that goes back to zero after `last`, and returns what it was. Who gets `last`
// sees what all others did before, and does what follows after they have done it.
FUSEDOPT_HD std::uint32_t take_ticket(std::uint32_t* tickets, std::uint32_t last) {
#if defined(__CUDA_ARCH__)
  __threadfence();
  const std::uint32_t ticket = atomicInc(tickets, last);
  if (ticket == last) __threadfence();
  return ticket;
#else
  const std::uint32_t ticket = *tickets;
  *tickets = ticket == last ? 0 : ticket + 1;
  return ticket;
#endif
}

// A tensor's scalars on the device, whose pointers these are, as they are in this step.
template <typename Rule>
FUSEDOPT_HD Scalars read_scalars(const Rule& rule, void* const* pointers) {
  const auto at = [&](int s) { return *static_cast<volatile float*>(pointers[s]); };
  Scalars before = static_cast<double>(at(0));
  if constexpr (kNumScalars<Rule> > 1) before.second = at(1);
  Scalars scalars = advanced(rule, before);
  scalars.second = static_cast<float>(scalars.second);
  return scalars;
}

template <typename Rule>
FUSEDOPT_HD void write_scalars(const Scalars& scalars, void* const* pointers) {
  *static_cast<float*>(pointers[0]) = static_cast<float>(scalars.step);
  if constexpr (kNumScalars<Rule> > 1) {
    *static_cast<float*>(pointers[1]) = static_cast<float>(scalars.second);
  }
}

}  // namespace fusedopt
