#pragma once

// The memory that a step writes, and whom it belongs to. Two owners of one byte cannot share a
// launch: the order in which they are updated matters.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fusedopt {

struct MemoryRange {
  std::uintptr_t begin = 0, end = 0;

  bool operator==(const MemoryRange& other) const {
    return begin == other.begin && end == other.end;
  }
};

// The bytes between the lowest and the highest element of a tensor, whatever its strides.
MemoryRange memory_range(std::uintptr_t data, int ndim, const std::int64_t* shape,
                         const std::int64_t* strides, std::int64_t element_bytes);

struct OwnedRange {
  MemoryRange memory;
  std::size_t owner;
};

class WrittenMemory {
 public:
  void assign(std::vector<OwnedRange> ranges);

  // Owners whose memory another owner writes too, in ascending order.
  const std::vector<std::size_t>& sharing() const { return sharing_; }

  // Calls use(owner) for every range that overlaps this memory.
  template <typename Use>
  void for_each_overlap(const MemoryRange& memory, Use&& use) const {
    auto last = std::lower_bound(
        ranges_.begin(), ranges_.end(), memory.end,
        [](const OwnedRange& range, std::uintptr_t end) { return range.memory.begin < end; });
    for (auto at = static_cast<std::size_t>(last - ranges_.begin()); at-- > 0;) {
      if (furthest_[at] <= memory.begin) return;
      if (ranges_[at].memory.end > memory.begin) use(ranges_[at].owner);
    }
  }

 private:
  std::vector<OwnedRange> ranges_;        // by their beginnings
  std::vector<std::uintptr_t> furthest_;  // the end that reaches furthest, up to each range
  std::vector<std::size_t> sharing_;
};

}  // namespace fusedopt
