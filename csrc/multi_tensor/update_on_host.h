#pragma once

// The kernels of the rules on the CPU, for tests: all blocks, and their threads, one after the other.

#include "apply_kernel.h"
#include "launch_table.h"
#include "stored_kernel.h"

namespace fusedopt {

template <typename T, typename Rule, typename Update>
void update_on_host(const LaunchTable& table) {
  for (std::uint32_t block = 0; block < table.num_chunks; ++block) {
    BlockTask<Update> task = {};
    const Scalars scalars = begin_block<T, Rule>(table, block, &task);
    count_block<Rule>(table, block, task, scalars);
    for (std::uint32_t thread = 0; thread < kBlockThreads; ++thread) {
      run_block<T>(task, thread, kBlockThreads);
    }
  }
}

template <typename Rule, typename Update>
void stored_update_on_host(const LaunchTable& table) {
  for (std::uint32_t block = 0; block < table.num_chunks; ++block) {
    StoredTask<Update> task = {};
    const Scalars scalars = begin_block<float, Rule>(table, block, &task);
    count_block<Rule>(table, block, task, scalars);
    run_stored_block(task);
  }
}

}  // namespace fusedopt
