#pragma once

// Which parameters of a plan write the same memory: their order matters, and they cannot share a
// launch.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "record.h"
#include "written_memory.h"

namespace fusedopt {

class Overlaps {
 public:
  // Lists what the parameters write, by what is recorded of them now.
  void list(Records* records);

  // Parameters whose order matters, because another one writes the same memory: in ascending order.
  // Of those that share a step count all or none.
  std::vector<std::size_t> sharing(const Records& records) const;

  // Whether those that share memory are those that take the Python rule for it.
  bool are_known(const Records& records) const;

  // Calls use(parameter) for every tensor that overlaps this memory.
  template <typename Use>
  void for_each(const MemoryRange& memory, Use&& use) const {
    written_memory_.for_each_overlap(memory, use);
  }

  // Whether no tensor overlaps this memory. Of late ones the answer is kept: gradients come back to
  // where others were.
  bool is_free(const MemoryRange& memory);

  // Parameters with one step count: it is in the way of none of them, see Work::add.
  const std::vector<std::vector<std::size_t>>& shared_steps() const { return shared_steps_; }

  // Grows with every list().
  std::size_t generation() const { return generation_; }

 private:
  void list_steps(Records* records, std::vector<OwnedRange>* ranges);

  WrittenMemory written_memory_;
  std::vector<std::vector<std::size_t>> shared_steps_;
  static constexpr std::size_t kMemories = 64;
  // Each at a place that follows from its beginning.
  std::vector<MemoryRange> free_ = std::vector<MemoryRange>(kMemories);
  std::size_t generation_ = 0;
};

}  // namespace fusedopt
