#pragma once

#include <cstddef>
#include <cstdint>

#include "../update_rules/host_device.h"
#include "../update_rules/rule.h"
#include "slot_dtypes.h"
#include "tuning.h"

namespace fusedopt {

// How the elements of a tensor are read and written.
enum class Access : std::uint32_t {
  kVectors,    // all slots of one dtype and aligned: 16 bytes at a time
  kMixed,      // several dtypes, aligned: four elements at a time
  kUnaligned,  // one element at a time
};

// What gradients are multiplied with to undo a loss scale, if there is one.
FUSEDOPT_HD double unscale(const float* loss_scale) {
  return loss_scale != nullptr ? 1.0 / static_cast<double>(*loss_scale) : 1.0;
}

// What the whole step multiplies gradients with, or why it does nothing. Each pointer may be null.
struct StepScaling {
  const float* found_inf = nullptr;   // not 0: the step is skipped
  const float* loss_scale = nullptr;  // gradients are divided by it
  const double* clip = nullptr;       // see Clip

  // Where a norm pass leaves what it found.
  enum Clip { kNorm, kFactor, kSkip, kNumClip };

  FUSEDOPT_HD bool skip() const {
    return (found_inf != nullptr && *found_inf != 0.0f) || (clip != nullptr && clip[kSkip] != 0.0);
  }

  FUSEDOPT_HD double grad_factor() const {
    return clip != nullptr ? unscale(loss_scale) * clip[kFactor] : unscale(loss_scale);
  }
};

// The arguments of one launch: every pointer, size and coefficient, by value, so that nothing is
// allocated or copied to the device, and a captured launch needs nothing but its tensors. The
// sections of `data` follow each other; which kernel reads it decides what a pointer or an update is.
struct alignas(16) LaunchTable {
  std::uint32_t num_tensors;
  std::uint32_t num_chunks;
  std::uint32_t num_pointers;  // of each tensor: its slots, and with `on_device` its scalars
  std::uint32_t update_bytes;
  StepScaling scaling;
  // Set if the updates are rules, which the kernel prepares. With it come the step counts: one zero
  // per tensor of the launch, and zero again afterwards; null for rules without a step count.
  bool on_device;
  std::uint32_t* tickets;
  std::uint32_t pointers_at, numel_at, first_chunk_at, info_at;
  alignas(16) std::byte data[kTableBytes];

  // Sections, largest alignment first: updates, pointers, numel, first_chunk (one more than there
  // are tensors), info.
  FUSEDOPT_HD const void* update(std::uint32_t u) const { return data + u * update_bytes; }
  FUSEDOPT_HD void* const* pointers(std::uint32_t t) const {
    return reinterpret_cast<void* const*>(data + pointers_at) + t * num_pointers;
  }
  FUSEDOPT_HD std::int64_t numel(std::uint32_t t) const {
    return reinterpret_cast<const std::int64_t*>(data + numel_at)[t];
  }
  FUSEDOPT_HD std::uint32_t first_chunk(std::uint32_t t) const {
    return reinterpret_cast<const std::uint32_t*>(data + first_chunk_at)[t];
  }
  FUSEDOPT_HD std::uint32_t info(std::uint32_t t) const {
    return reinterpret_cast<const std::uint32_t*>(data + info_at)[t];
  }

  // The tensor that a chunk belongs to.
  FUSEDOPT_HD std::uint32_t tensor_of(std::uint32_t chunk) const {
    std::uint32_t low = 0, high = num_tensors;
    while (high - low > 1) {
      const std::uint32_t middle = (low + high) / 2;
      if (first_chunk(middle) <= chunk) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};
static_assert(sizeof(LaunchTable) <= kMaxArgumentBytes);

// No table has more tensors: each takes two pointers at least, a size and two numbers.
constexpr std::uint32_t kMaxTableTensors = kTableBytes / 32;

// What a table says of a tensor beside pointers and size, packed into 32 bits.
struct TensorInfo {
  std::uint32_t bits;

  static TensorInfo pack(std::uint32_t update, Access access, const SlotDtypes& dtypes,
                         bool first_step) {
    std::uint32_t bits = update | static_cast<std::uint32_t>(access) << 16 | first_step << 18;
    for (int s = 0; s < dtypes.num_slots && is_float(dtypes.slots[s]); ++s) {
      bits |= static_cast<std::uint32_t>(dtypes.slots[s]) << (20 + 2 * s);
    }
    return {bits};
  }

  FUSEDOPT_HD std::uint32_t update() const { return bits & 0xFFFFu; }
  FUSEDOPT_HD Access access() const { return static_cast<Access>(bits >> 16 & 3u); }
  FUSEDOPT_HD bool first_step() const { return (bits >> 18 & 1u) != 0; }
  FUSEDOPT_HD Dtype dtype(int slot) const {
    return static_cast<Dtype>(bits >> (20 + 2 * slot) & 3u);
  }
};

}  // namespace fusedopt
