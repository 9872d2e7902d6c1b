#include "grad_norm.h"

#include <utility>

#include "apply.h"
#include "grad_norm_cpu.h"
#include "parallel.h"

namespace fusedopt {

namespace {

using SumChunk = double (*)(const GradToMeasure& grad, std::int64_t begin, double factor);

SumChunk sum_chunk_for(Isa isa) {
  switch (isa) {
#if FUSEDOPT_HAS_AVX512
    case Isa::avx512:
      return sum_chunk<Isa::avx512>;
#endif
#if FUSEDOPT_HAS_AVX2
    case Isa::avx2:
      return sum_chunk<Isa::avx2>;
#endif
    default:
      return sum_chunk<Isa::baseline>;
  }
}

}  // namespace

void grad_norm_cpu(const std::vector<GradToMeasure>& grads, const GradNorm& norm, int num_threads) {
  std::vector<std::pair<const GradToMeasure*, std::int64_t>> chunks;  // with where they begin
  chunks.reserve(norm.num_partials);
  std::int64_t elements = 0;
  for (const GradToMeasure& grad : grads) {
    for (std::int64_t begin = 0; begin < grad.numel; begin += kNormElements) {
      chunks.emplace_back(&grad, begin);
    }
    elements += grad.numel;
  }
  const SumChunk sum = sum_chunk_for(cpu_isa());
  const double factor = unscale(norm.loss_scale);
  const auto num_chunks = static_cast<std::int64_t>(chunks.size());
  parallel_for(num_chunks, elements, num_threads, [&](std::int64_t chunk) {
    const auto& [grad, begin] = chunks[static_cast<std::size_t>(chunk)];
    norm.partials[chunk] = sum(*grad, begin, factor);
  });
  double sums[kPartialColumns];
  for (int c = 0; c < kPartialColumns; ++c) {
    sums[c] = sum_partial_column(norm.partials, norm.num_partials, c);
  }
  for (int half = kPartialColumns / 2; half > 0; half /= 2) fold_columns(sums, half, 0, 1);
  norm.finish(sums[0]);
}

}  // namespace fusedopt
