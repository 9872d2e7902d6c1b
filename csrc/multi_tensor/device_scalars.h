#pragma once

// The numbers that a tensor keeps on the device: all blocks of the tensor read them, one moves them on.

#include <cstdint>

#include "../update_rules/host_device.h"
#include "../update_rules/rule.h"
#include "launch_table.h"

namespace fusedopt {

// What this thread has read and written before it, others see as done, and what they did, this one.
FUSEDOPT_HD void fence() {
#if defined(__CUDA_ARCH__)
  asm volatile("fence.acq_rel.gpu;" ::: "memory");  // __threadfence() also orders all fences
#endif
}

// Adds one to a count that goes back to zero after `last`, and returns what it was. Who gets `last`
// sees what all others did before, and does what follows after they have done it.
FUSEDOPT_HD std::uint32_t take_ticket(std::uint32_t* tickets, std::uint32_t last) {
#if defined(__CUDA_ARCH__)
  fence();
  const std::uint32_t ticket = atomicInc(tickets, last);
  if (ticket == last) fence();
  return ticket;
#else
  const std::uint32_t ticket = *tickets;
  *tickets = ticket == last ? 0 : ticket + 1;
  return ticket;
#endif
}

// Takes a ticket of a tensor of the table: whether all of its other blocks have one.
FUSEDOPT_HD bool is_last_block(const LaunchTable& table, std::uint32_t t) {
  const std::uint32_t last = table.first_chunk(t + 1) - table.first_chunk(t) - 1;
  return take_ticket(&table.tickets[t], last) == last;
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
