// Kernels that csrc's driver runs, one right and two wrong: sanitize.sh sees them reported.
#include <cstdint>

#include "multi_tensor/apply.h"
#include "multi_tensor/launch_plan.h"

using namespace fusedopt;

namespace {

void add_one(const PreparedUpdate&, void* const* slots, std::int64_t begin, std::int64_t count) {
  float* const param = static_cast<float*>(slots[0]) + begin;
  for (std::int64_t i = 0; i < count; ++i) param[i] += 1;
}

// The first element beyond the piece is another thread's, or nobody's.
void add_one_too_far(const PreparedUpdate& update, void* const* slots, std::int64_t begin,
                     std::int64_t count) {
  add_one(update, slots, begin, count + 1);
}

void add_in_32_bits(const PreparedUpdate&, void* const* slots, std::int64_t begin, std::int64_t) {
  static_cast<float*>(slots[0])[begin] +=
      static_cast<float>(static_cast<std::int32_t>(begin) * 4096);
}

void run(ChunkKernel kernel, float* param, std::int64_t numel, int threads) {
  Step step;
  step.updates.emplace_back().kernel = kernel;
  step.tasks.push_back({0, false, numel, {param}, nullptr});
  apply_cpu(&step, chunks_of(step), threads);
}

}  // namespace

#define FUSEDOPT_EXPORT extern "C" __attribute__((visibility("default")))

FUSEDOPT_EXPORT void right(float* param, std::int64_t numel, int threads) {
  run(add_one, param, numel, threads);
}

FUSEDOPT_EXPORT void too_far(float* param, std::int64_t numel, int threads) {
  run(add_one_too_far, param, numel, threads);
}

FUSEDOPT_EXPORT void in_32_bits(float* param, std::int64_t numel, int threads) {
  run(add_in_32_bits, param, numel, threads);
}
