#include "grad_norm.h"

#include <algorithm>

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
  std::vector<std::int64_t> first_chunk(1, 0);
  std::int64_t elements = 0;
  for (const GradToMeasure& grad : grads) {
    first_chunk.push_back(first_chunk.back() + grad.num_chunks());
    elements += grad.numel;
  }
  const SumChunk sum = sum_chunk_for(cpu_isa());
  const double factor = unscale(norm.loss_scale);
  parallel_for(first_chunk.back(), elements, num_threads, [&](std::int64_t chunk) {
    const auto after = std::upper_bound(first_chunk.begin(), first_chunk.end(), chunk);
    const auto g = static_cast<std::size_t>(after - first_chunk.begin()) - 1;
    norm.partials[chunk] = sum(grads[g], (chunk - first_chunk[g]) * kNormElements, factor);
  });
  double sums[kPartialColumns];
  for (int c = 0; c < kPartialColumns; ++c) {
    sums[c] = sum_partial_column(norm.partials, norm.num_partials, c);
  }
  for (int half = kPartialColumns / 2; half > 0; half /= 2) fold_columns(sums, half, 0, 1);
  norm.finish(sums[0]);
}

}  // namespace fusedopt
