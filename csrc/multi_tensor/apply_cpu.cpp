#include <cstdlib>
#include <stdexcept>
#include <string>

#include "apply.h"
#include "launch_plan.h"
#include "parallel.h"

#if FUSEDOPT_HAS_AVX2
#include <cpuid.h>
#endif

namespace fusedopt {

namespace {

#if FUSEDOPT_HAS_AVX2
bool has_f16c() {  // not every compiler's __builtin_cpu_supports knows it
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

Isa widest_isa() {
#if FUSEDOPT_HAS_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
#endif
#if FUSEDOPT_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && has_f16c()) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose_isa() {
  const Isa widest = widest_isa();
  const char* wanted = std::getenv("FUSEDOPT_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return widest;
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (isa <= widest && std::string(wanted) == name(isa)) return isa;
  }
  throw std::invalid_argument(
      "FUSEDOPT_CPU_ISA=" + std::string(wanted) + ": this build on this processor has baseline" +
      (widest >= Isa::avx2 ? ", avx2" : "") + (widest >= Isa::avx512 ? ", avx512" : ""));
}

void run_chunk(const Step& step, const LaunchPlan& plan, std::int64_t chunk) {
  plan.for_each_piece(chunk, [&](const Piece& piece) {
    const TensorTask& task = step.tasks[piece.tensor];
    const PreparedUpdate& update = step.updates[task.update];
    update.kernel(update, step.pointers(task), piece.begin, piece.count);
  });
}

}  // namespace

const char* name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

Isa cpu_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

LaunchPlan chunks_of(const Step& step) {
  LaunchPlan plan;
  for (const TensorTask& task : step.tasks) plan.add(task.numel);
  return plan;
}

bool apply_cpu(Step* scaled_step, const LaunchPlan& chunks, int num_threads) {
  if (scaled_step->scaling.skip()) return false;
  const double factor = scaled_step->scaling.grad_factor();
  if (factor != 1) {
    for (PreparedUpdate& update : scaled_step->updates) update.scale_grads(&update, factor);
  }
  const Step& step = *scaled_step;
  parallel_for(chunks.num_chunks(), chunks.num_elements(), num_threads,
               [&](std::int64_t chunk) { run_chunk(step, chunks, chunk); });
  return true;
}

}  // namespace fusedopt
