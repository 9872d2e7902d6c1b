// What tests/test_written_memory.py calls: ranges in, and which owners overlap.
#include "../../csrc/plan/written_memory.cpp"

#include <cstdint>
#include <vector>

using namespace fusedopt;

extern "C" {

// Writes the beginning and the end of a tensor that begins at 0.
void range_of(std::uintptr_t data, int ndim, const std::int64_t* shape, const std::int64_t* strides,
              std::int64_t element_bytes, std::uint64_t* out) {
  const MemoryRange range = memory_range(data, ndim, shape, strides, element_bytes);
  out[0] = range.begin;
  out[1] = range.end;
}

// `ranges`: begin, end and owner of each. Writes the owners that share memory to `sharing` and
// returns how many; then to `overlapping` those of the queries, with -1 behind each.
std::int64_t overlaps(const std::uint64_t* ranges, std::int64_t count, const std::uint64_t* queries,
                      std::int64_t num_queries, std::int64_t* sharing, std::int64_t* overlapping) {
  std::vector<OwnedRange> owned;
  for (std::int64_t i = 0; i < count; ++i) {
    owned.push_back({{ranges[3 * i], ranges[3 * i + 1]}, ranges[3 * i + 2]});
  }
  WrittenMemory memory;
  memory.assign({{{1, 5}, 9}, {{2, 3}, 8}});  // forgotten by the next
  memory.assign(std::move(owned));
  std::int64_t found = 0;
  for (const std::size_t owner : memory.sharing()) {
    sharing[found++] = static_cast<std::int64_t>(owner);
  }
  for (std::int64_t q = 0; q < num_queries; ++q) {
    memory.for_each_overlap({queries[2 * q], queries[2 * q + 1]}, [&](std::size_t owner) {
      *overlapping++ = static_cast<std::int64_t>(owner);
    });
    *overlapping++ = -1;
  }
  return found;
}
}
