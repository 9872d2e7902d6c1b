#include "written_memory.h"

namespace fusedopt {

MemoryRange memory_range(std::uintptr_t data, int ndim, const std::int64_t* shape,
                         const std::int64_t* strides, std::int64_t element_bytes) {
  std::int64_t lowest = 0, highest = 0;
  for (int d = 0; d < ndim; ++d) {
    if (shape[d] == 0) return {data, data};
    const std::int64_t reach = (shape[d] - 1) * strides[d];
    (reach < 0 ? lowest : highest) += reach;
  }
  return {data + lowest * element_bytes, data + (highest + 1) * element_bytes};
}

void WrittenMemory::assign(std::vector<OwnedRange> ranges) {
  ranges.erase(std::remove_if(
                   ranges.begin(), ranges.end(),
                   [](const OwnedRange& range) { return range.memory.begin == range.memory.end; }),
               ranges.end());
  std::sort(ranges.begin(), ranges.end(), [](const OwnedRange& a, const OwnedRange& b) {
    return a.memory.begin < b.memory.begin;
  });
  furthest_.clear();
  sharing_.clear();
  std::size_t reaching = 0;  // the range so far that ends last
  for (std::size_t r = 0; r < ranges.size(); ++r) {
    if (r > 0 && ranges[r].memory.begin < ranges[reaching].memory.end) {
      sharing_.push_back(ranges[reaching].owner);
      sharing_.push_back(ranges[r].owner);
    }
    if (ranges[r].memory.end > ranges[reaching].memory.end) reaching = r;
    furthest_.push_back(ranges[reaching].memory.end);
  }
  std::sort(sharing_.begin(), sharing_.end());
  sharing_.erase(std::unique(sharing_.begin(), sharing_.end()), sharing_.end());
  ranges_ = std::move(ranges);
}

}  // namespace fusedopt
