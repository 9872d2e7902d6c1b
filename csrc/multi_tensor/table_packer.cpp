#include "table_packer.h"

#include <cstring>

namespace fusedopt {

namespace {

constexpr std::uint64_t kMaxChunks = 0x7FFFFFFF;  // blocks of a launch

}  // namespace

TablePacker::TablePacker(std::uint32_t num_pointers, std::size_t update_bytes,
                         std::size_t table_bytes)
    : num_pointers_(num_pointers),
      update_stride_(static_cast<std::uint32_t>((update_bytes + 15) / 16 * 16)),
      update_bytes_(update_bytes),
      table_bytes_(table_bytes) {}

std::size_t TablePacker::bytes(std::size_t num_tensors, std::size_t num_updates) const {
  const std::size_t per_tensor =
      num_pointers_ * sizeof(void*) + sizeof(std::int64_t) + 2 * sizeof(std::uint32_t);
  return num_updates * update_stride_ + num_tensors * per_tensor + sizeof(std::uint32_t);
}

bool TablePacker::fits(std::uint32_t num_chunks, bool new_update) const {
  const std::size_t num_updates = updates_.size() / update_stride_ + new_update;
  return bytes(tensors_.size() + 1, num_updates) <= table_bytes_ && num_updates <= 0x10000 &&
         num_chunks_ + num_chunks <= kMaxChunks;
}

std::uint32_t TablePacker::add_update(const void* update) {
  const std::size_t at = updates_.size();
  updates_.resize(at + update_stride_);
  std::memcpy(updates_.data() + at, update, update_bytes_);
  return static_cast<std::uint32_t>(at / update_stride_);
}

void TablePacker::add(const TableTensor& tensor) {
  tensors_.push_back(tensor);
  num_chunks_ += tensor.num_chunks;
}

void TablePacker::pack(LaunchTable* table) {
  const auto num_tensors = static_cast<std::uint32_t>(tensors_.size());
  table->num_tensors = num_tensors;
  table->num_chunks = static_cast<std::uint32_t>(num_chunks_);
  table->num_pointers = num_pointers_;
  table->update_bytes = update_stride_;
  table->scaling = {};
  table->on_device = false;
  table->tickets = nullptr;
  table->pointers_at = static_cast<std::uint32_t>(updates_.size());
  table->numel_at = table->pointers_at + num_tensors * num_pointers_ * sizeof(void*);
  table->first_chunk_at = table->numel_at + num_tensors * sizeof(std::int64_t);
  table->info_at = table->first_chunk_at + (num_tensors + 1) * sizeof(std::uint32_t);

  std::memcpy(table->data, updates_.data(), updates_.size());
  const auto write = [&](std::size_t section, std::size_t index, const void* from,
                         std::size_t size) {
    std::memcpy(table->data + section + index * size, from, size);
  };
  std::uint32_t chunk = 0;
  for (std::uint32_t t = 0; t < num_tensors; ++t) {
    const TableTensor& tensor = tensors_[t];
    write(table->pointers_at, t, tensor.pointers, num_pointers_ * sizeof(void*));
    write(table->numel_at, t, &tensor.numel, sizeof(tensor.numel));
    write(table->first_chunk_at, t, &chunk, sizeof(chunk));
    write(table->info_at, t, &tensor.info.bits, sizeof(tensor.info.bits));
    chunk += tensor.num_chunks;
  }
  write(table->first_chunk_at, num_tensors, &chunk, sizeof(chunk));

  tensors_.clear();
  updates_.clear();
  num_chunks_ = 0;
}

}  // namespace fusedopt
