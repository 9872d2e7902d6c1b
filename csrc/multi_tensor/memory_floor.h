#pragma once

#include <cstdint>

namespace fusedopt {

// Reads all arrays once and writes the first num_writes of them once, with next to no arithmetic:
// the time that a step cannot beat. The arrays are of equal size and come writes first.
void memory_floor(void* const* arrays, int num_writes, int num_reads, std::int64_t bytes,
                  int num_threads);

}  // namespace fusedopt
