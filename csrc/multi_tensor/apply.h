#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../storage/isa.h"
#include "../update_rules/rule.h"
#include "launch_table.h"
#include "tensor_view.h"

namespace fusedopt {

class LaunchPlan;
struct DeviceKernel;
struct PreparedUpdate;

// Updates elements [begin, begin + count) of one tensor.
using ChunkKernel = void (*)(const PreparedUpdate& update, void* const* slots, std::int64_t begin,
                             std::int64_t count);

// Updates arrays of one dtype that are in memory as they are computed: parameter, gradient, states.
using ArraysKernel = void (*)(const PreparedUpdate& update, void* const* arrays,
                              std::int64_t count);

constexpr std::size_t kMaxCoefficientBytes = 160;

// The update of one step, with its kernel chosen and its coefficients folded.
struct PreparedUpdate {
  StoredAs stored;
  ChunkKernel kernel = nullptr;                                          // on the CPU, which may
  ArraysKernel update_arrays = nullptr;                                  // leave this to do, and
  void (*scale_grads)(PreparedUpdate* update, double factor) = nullptr;  // folds a factor in
  const DeviceKernel* device_kernel = nullptr;                           // on a GPU
  bool on_device = false;  // the coefficients are the rule itself, which the kernel prepares
  std::uint16_t num_bytes = 0;
  alignas(16) std::byte coefficients[kMaxCoefficientBytes];
};

// One tensor of a step: where its slots are and which of the prepared updates it gets.
struct TensorTask {
  std::uint32_t update;
  bool first_step;
  std::int64_t numel;
  void* slots[kMaxSlots] = {};
  void* step;                // its count, if that lives on the device, and with it
  void* second = nullptr;    // the second of its scalars, if the rule has one
  std::int64_t extras = -1;  // where its pointers begin in Step::extras, if it has extras
};

// What one step does on one device.
class Step {
 public:
  std::vector<PreparedUpdate> updates;
  std::vector<TensorTask> tasks;
  std::vector<void*> extras;  // kMaxPointers for each tensor that has any: its slots, then extras
  StepScaling scaling;

  void* const* pointers(const TensorTask& task) const {
    return task.extras < 0 ? task.slots : extras.data() + task.extras;
  }

  void clear() {
    updates.clear();
    tasks.clear();
    extras.clear();
    scaling = {};
  }
};

// The widest level that this processor has, or what FUSEDOPT_CPU_ISA names.
Isa cpu_isa();
const char* name(Isa isa);

// Defined in apply_cpu.h; ops/ instantiates it for every rule and level.
template <Isa isa, typename Rule>
PreparedUpdate prepare_cpu(const Rule& rule, const Scalars& scalars, const StoredAs& stored);

// Defined in prepare_gpu.h; ops/ instantiates it for every rule.
template <typename Rule>
PreparedUpdate prepare_gpu(const Rule& rule, const Scalars& scalars, const StoredAs& stored,
                           bool on_device);

enum class Where { kCpu, kGpu, kGpuPrepares };

template <typename Rule>
PreparedUpdate prepare(const Rule& rule, const Scalars& scalars, const StoredAs& stored,
                       Where where) {
  if (where != Where::kCpu) {
    return prepare_gpu(rule, scalars, stored, where == Where::kGpuPrepares);
  }
  switch (cpu_isa()) {
#if FUSEDOPT_HAS_AVX512
    case Isa::avx512:
      return prepare_cpu<Isa::avx512>(rule, scalars, stored);
#endif
#if FUSEDOPT_HAS_AVX2
    case Isa::avx2:
      return prepare_cpu<Isa::avx2>(rule, scalars, stored);
#endif
    default:
      return prepare_cpu<Isa::baseline>(rule, scalars, stored);
  }
}

// How the threads share the tasks of a step. Apart from apply_cpu, which needs no memory.
LaunchPlan chunks_of(const Step& step);

// False if the scaling says that the step is skipped: then nothing was written.
bool apply_cpu(Step* step, const LaunchPlan& chunks, int num_threads);

}  // namespace fusedopt
