#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "tensor_view.h"

namespace fusedopt {

struct PreparedUpdate;

// Updates elements [begin, begin + count) of one tensor.
using ChunkKernel = void (*)(const PreparedUpdate& update, void* const* slots, std::int64_t begin,
                             std::int64_t count);

constexpr std::size_t kMaxCoefficientBytes = 128;

// The update of one step, with its coefficients folded and its kernel chosen.
struct PreparedUpdate {
  ChunkKernel kernel = nullptr;
  SlotDtypes dtypes;
  alignas(16) std::byte coefficients[kMaxCoefficientBytes];
};

// One tensor of a step: where its slots are and which of the prepared updates it gets.
struct TensorTask {
  std::uint32_t update;
  std::int64_t numel;
  void* slots[kMaxSlots];
};

// Runs one step over all tensors.
class Step {
 public:
  std::vector<PreparedUpdate> updates;
  std::vector<TensorTask> tasks;

  void clear() {
    updates.clear();
    tasks.clear();
  }
};

enum class Isa { baseline, avx2, avx512 };

// The widest level that this processor has, or what FUSEDOPT_CPU_ISA names.
Isa cpu_isa();
const char* name(Isa isa);

// Defined in apply_cpu.h; ops/ instantiates it for every rule and level.
template <Isa isa, typename Rule>
PreparedUpdate prepare_cpu(const Rule& rule, double step, const SlotDtypes& dtypes);

template <typename Rule>
PreparedUpdate prepare(const Rule& rule, double step, const SlotDtypes& dtypes) {
  switch (cpu_isa()) {
#if FUSEDOPT_HAS_AVX512
    case Isa::avx512:
      return prepare_cpu<Isa::avx512>(rule, step, dtypes);
#endif
#if FUSEDOPT_HAS_AVX2
    case Isa::avx2:
      return prepare_cpu<Isa::avx2>(rule, step, dtypes);
#endif
    default:
      return prepare_cpu<Isa::baseline>(rule, step, dtypes);
  }
}

void apply_cpu(const Step& step, int num_threads);

}  // namespace fusedopt
