#include "memory_floor.h"

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <utility>

namespace fusedopt {

namespace {

// word ^= sum of the words read: cheap, vectorises everywhere, and cannot be optimised away.
template <std::size_t... W>
void span(std::uint32_t* const* arrays, int num_reads, std::int64_t begin, std::int64_t end,
          std::index_sequence<W...>) {
  std::uint32_t* const writes[] = {arrays[W]...};
  const std::uint32_t* const read = num_reads > 0 ? arrays[sizeof...(W)] : arrays[0];
#pragma omp simd
  for (std::int64_t i = begin; i < end; ++i) {
    const std::uint32_t word = read[i];
    ((writes[W][i] ^= word), ...);
  }
}

}  // namespace

void memory_floor(void* const* arrays, int num_writes, int num_reads, std::int64_t bytes,
                  int num_threads) {
  if (num_reads > 1 || num_writes < 1 || num_writes > 4) {
    throw std::invalid_argument("memory_floor takes 1 to 4 writes and at most 1 read");
  }
  std::uint32_t* words[5] = {};
  for (int a = 0; a < num_writes + num_reads; ++a)
    words[a] = static_cast<std::uint32_t*>(arrays[a]);
  const std::int64_t count = bytes / 4;
  const std::int64_t part = (count / std::max(num_threads, 1) + 15) / 16 * 16;
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) num_threads(num_threads)
#endif
  for (int thread = 0; thread < num_threads; ++thread) {
    const std::int64_t begin = std::min(count, thread * part);
    const std::int64_t end = thread == num_threads - 1 ? count : std::min(count, begin + part);
    switch (num_writes) {
      case 1:
        span(words, num_reads, begin, end, std::make_index_sequence<1>());
        break;
      case 2:
        span(words, num_reads, begin, end, std::make_index_sequence<2>());
        break;
      case 3:
        span(words, num_reads, begin, end, std::make_index_sequence<3>());
        break;
      default:
        span(words, num_reads, begin, end, std::make_index_sequence<4>());
    }
  }
}

}  // namespace fusedopt
