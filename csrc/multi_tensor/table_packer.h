#pragma once

// Makes the tables that kernels take as their argument.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "launch_table.h"

namespace fusedopt {

// What goes into a table for one tensor.
struct TableTensor {
  void* pointers[kMaxPointers + Scalars::kMost];
  std::int64_t numel;
  std::uint32_t num_chunks;
  TensorInfo info;  // its update counts in the updates of this table
};

// Collects tensors and updates as long as they fit, then lays the table out.
class TablePacker {
 public:
  // `table_bytes`: how many of LaunchTable::data the kernel has.
  TablePacker(std::uint32_t num_pointers, std::size_t update_bytes,
              std::size_t table_bytes = kTableBytes);

  bool empty() const { return tensors_.empty(); }
  // Whether one more tensor fits, with a new update or without.
  bool fits(std::uint32_t num_chunks, bool new_update) const;
  std::uint32_t add_update(const void* update);
  void add(const TableTensor& tensor);
  // The table, with the other fields zero, and an empty packer.
  void pack(LaunchTable* table);

 private:
  std::size_t bytes(std::size_t num_tensors, std::size_t num_updates) const;

  const std::uint32_t num_pointers_, update_stride_;
  const std::size_t update_bytes_, table_bytes_;
  std::vector<TableTensor> tensors_;
  std::vector<std::byte> updates_;
  std::uint64_t num_chunks_ = 0;
};

}  // namespace fusedopt
