#include "overlaps.h"

#include <algorithm>
#include <utility>

#include "../storage/blockwise8.h"

namespace fusedopt {

namespace {

// How many elements the kernels touch of a tensor that is flat.
std::int64_t num_elements(const ParamRecord& param, Role role) {
  if (kScalars.has(role)) return 1;
  return role == Role::kRounding ? 2 : num_scales(param.numel);
}

MemoryRange memory_of(const Records& records, const ParamRecord& param, Role role) {
  const TensorRecord& tensor = param[role];
  const auto begin = reinterpret_cast<std::uintptr_t>(tensor.data);
  const auto element_bytes = static_cast<std::int64_t>(itemsize(tensor.dtype));
  if (is_elementwise(role)) {
    const TensorView view = records.view_of(param, role);
    return memory_range(begin, view.ndim, view.shape, view.strides, element_bytes);
  }
  const std::int64_t count = num_elements(param, role), stride = 1;
  return memory_range(begin, 1, &count, &stride, element_bytes);
}

}  // namespace

void Overlaps::list(Records* records) {
  std::vector<OwnedRange> ranges;
  ranges.reserve(records->params.size() * (2 + kMaxStates));
  for (std::size_t p = 0; p < records->params.size(); ++p) {
    const ParamRecord& param = records->params[p];
    if (param.portrait >= 0) {
      const auto portrait = static_cast<std::size_t>(param.portrait);
      for (const MemoryRange& memory : records->portraits[portrait].memory) {
        ranges.push_back({memory, p});
      }
      continue;
    }
    if (param[Role::kParam].data == nullptr) continue;  // of an empty one, the count remains
    param.roles.for_each([&](Role role) {
      if (role == Role::kStep || param[role].data == nullptr) return;
      ranges.push_back({memory_of(*records, param, role), p});
    });
  }
  list_steps(records, &ranges);
  written_memory_.assign(std::move(ranges));
  std::size_t num_memories = kMemories;
  while (num_memories < 4 * records->params.size()) num_memories *= 2;
  free_.assign(num_memories, {});
  ++generation_;
}

bool Overlaps::is_free(const MemoryRange& memory) {
  const std::uint64_t mixed = (memory.begin >> 4) * std::uint64_t{0x9E3779B97F4A7C15u};
  MemoryRange& known = free_[(mixed >> 32) & (free_.size() - 1)];
  if (known.begin == memory.begin && memory.end <= known.end) return true;
  bool is_free = true;
  for_each(memory, [&](std::size_t) { is_free = false; });
  if (is_free) known = memory;
  return is_free;
}

void Overlaps::list_steps(Records* records, std::vector<OwnedRange>* ranges) {
  std::vector<std::pair<const void*, std::size_t>> steps;
  for (std::size_t p = 0; p < records->params.size(); ++p) {
    const ParamRecord& param = records->params[p];
    const void* const step = param[Role::kStep].data;
    if (param.portrait < 0 && step != nullptr) steps.emplace_back(step, p);
  }
  std::sort(steps.begin(), steps.end());
  shared_steps_.clear();
  for (std::size_t begin = 0, end = 0; begin < steps.size(); begin = end) {
    bool is_shared = false, on_host = true;
    const ParamRecord& first = records->params[steps[begin].second];
    for (; end < steps.size() && steps[end].first == steps[begin].first; ++end) {
      const ParamRecord& param = records->params[steps[end].second];
      is_shared = end > begin;
      on_host &= !param.device_step && param[Role::kStep].dtype == first[Role::kStep].dtype;
    }
    is_shared &= on_host;
    if (is_shared) shared_steps_.emplace_back();
    for (std::size_t at = begin; at < end; ++at) {
      ParamRecord& param = records->params[steps[at].second];
      param.shares_step = is_shared ? static_cast<std::int64_t>(shared_steps_.size()) - 1 : -1;
      if (is_shared) shared_steps_.back().push_back(steps[at].second);
      if (is_shared && at > begin) continue;
      ranges->push_back({memory_of(*records, first, Role::kStep), steps[at].second});
    }
  }
}

std::vector<std::size_t> Overlaps::sharing(const Records& records) const {
  std::vector<std::size_t> found = written_memory_.sharing();
  for (const std::vector<std::size_t>& members : shared_steps_) {
    const bool is_in_order = std::any_of(members.begin(), members.end(), [&](std::size_t p) {
      const ParamRecord& param = records.params[p];
      const bool is_python = param.python && !param.for_memory;
      return is_python || std::binary_search(found.begin(), found.end(), p);
    });
    if (!is_in_order) continue;
    found.insert(found.end(), members.begin(), members.end());
    std::sort(found.begin(), found.end());
  }
  found.erase(std::unique(found.begin(), found.end()), found.end());
  return found;
}

bool Overlaps::are_known(const Records& records) const {
  const std::vector<std::size_t> now = sharing(records);
  for (const std::size_t p : now) {
    if (!records.params[p].python) return false;
  }
  for (std::size_t p = 0; p < records.params.size(); ++p) {
    if (records.params[p].for_memory && !std::binary_search(now.begin(), now.end(), p)) {
      return false;
    }
  }
  return true;
}

}  // namespace fusedopt
