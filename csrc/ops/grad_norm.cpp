#include "../multi_tensor/grad_norm_cpu.h"
#include "../storage/half.h"

namespace fusedopt {

namespace {

// The last levels of the tree over the columns, of a known width.
template <int half, typename T>
FUSEDOPT_HD void fold(T* sums) {
  if constexpr (half > 0) {
#pragma omp simd
    for (int c = 0; c < half; ++c) sums[c] = sums[c] + sums[c + half];
    fold<half / 2>(sums);
  }
}

// `load(row, n, buffer)` returns n elements of the row, in the buffer if they are not in memory as T.
template <Isa isa, typename T, typename Load>
double sum_columns(std::int64_t count, T factor, Load&& load) {
  // Columns without an element are zero, and change no sum: a small tensor has none of them.
  constexpr int kFewest = 64;
  int columns = kNormColumns;
  while (columns / 2 >= count && columns > kFewest) columns /= 2;
  alignas(64) T sums[kNormColumns];
  alignas(64) T buffer[kNormColumns];
  const int first = count < kNormColumns ? static_cast<int>(count) : kNormColumns;
  const T* grads = load(0, first, buffer);
#pragma omp simd
  for (int c = 0; c < first; ++c) {
    const T grad = grads[c] * factor;
    sums[c] = grad * grad;
  }
  for (int c = first; c < columns; ++c) sums[c] = 0;
  for (std::int64_t row = kNormColumns; row < count; row += kNormColumns) {
    const std::int64_t left = count - row;
    const int n = left < kNormColumns ? static_cast<int>(left) : kNormColumns;
    grads = load(row, n, buffer);
#pragma omp simd
    for (int c = 0; c < n; ++c) {
      const T grad = grads[c] * factor;
      sums[c] = sums[c] + grad * grad;
    }
  }
  for (int half = columns / 2; half > kFewest / 2; half /= 2) {
#pragma omp simd
    for (int c = 0; c < half; ++c) sums[c] = sums[c] + sums[c + half];
  }
  fold<kFewest / 2>(sums);
  return sums[0];
}

// Whether all bytes are: what an embedding has of gradients is zero for most of its rows.
template <Isa isa>
bool is_zero(const char* bytes, std::int64_t size) {
  std::uint16_t any = 0;  // the smallest element there is
#pragma omp simd reduction(| : any)
  for (std::int64_t i = 0; i < size / 2; ++i) {
    std::uint16_t word;
    std::memcpy(&word, bytes + 2 * i, sizeof(word));
    any |= word;
  }
  return any == 0;
}

}  // namespace

template <Isa isa>
double sum_chunk(const GradToMeasure& grad, std::int64_t begin, double factor) {
  const std::int64_t left = grad.numel - begin;
  const std::int64_t count = left < kNormElements ? left : kNormElements;
  if (grad.dtype == Dtype::kFloat64) {
    const auto* data = static_cast<const double*>(grad.data) + begin;
    return sum_columns<isa, double>(count, factor,
                                    [&](std::int64_t row, int, double*) { return data + row; });
  }
  const auto load = [&](std::int64_t row, int n, float* buffer) {
    return load_as_float<isa>(grad.dtype, grad.data, begin + row, n, buffer);
  };
  const double sum = sum_columns<isa, float>(count, static_cast<float>(factor), load);
  if (is_accurate(static_cast<float>(sum))) return sum;
  const auto size = static_cast<std::int64_t>(itemsize(grad.dtype));
  if (is_zero<isa>(static_cast<const char*>(grad.data) + begin * size, count * size)) return 0;
  return sum_columns<isa, double>(count, factor, [&](std::int64_t row, int n, double* buffer) {
    alignas(64) float floats[kNormColumns];
    const float* const grads = load(row, n, floats);
#pragma omp simd
    for (int c = 0; c < n; ++c) buffer[c] = grads[c];
    return buffer;
  });
}

template double sum_chunk<Isa::FUSEDOPT_ISA>(const GradToMeasure&, std::int64_t, double);

}  // namespace fusedopt
