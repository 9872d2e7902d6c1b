#pragma once

// grad_norm on the device, by blocks and threads, as apply_kernel.h has it for the updates.

#include "apply_kernel.h"
#include "norm_sum.h"

namespace fusedopt {

// Sums the squares of this thread's columns over the rows of the chunk into `sums`. A column belongs
// to the thread that loads it with vectors.
template <typename T, typename Vectors, typename Single>
FUSEDOPT_HD void sum_columns(const Vectors& vectors, const Single& single, const void* data,
                             std::uint32_t count, T factor, T* sums, int thread) {
  constexpr int kVector = Vectors::kVector;
  constexpr int kShare = kNormColumns / kBlockThreads / kVector;  // vectors of a row per thread
  T sum[kShare][kVector] = {};
  const auto add = [&](int k, int i, T grad) {
    grad = grad * factor;
    sum[k][i] = sum[k][i] + grad * grad;
  };
  std::uint32_t row = 0;
  for (; row + kNormColumns <= count; row += kNormColumns) {
    typename Vectors::Raw raw[kShare];
    FUSEDOPT_UNROLL
    for (int k = 0; k < kShare; ++k) {
      raw[k] = vectors.load(0, data, row + (k * kBlockThreads + thread) * kVector);
    }
    FUSEDOPT_UNROLL
    for (int k = 0; k < kShare; ++k) {
      T values[kVector];
      vectors.unpack(0, raw[k], values);
      FUSEDOPT_UNROLL
      for (int i = 0; i < kVector; ++i) add(k, i, values[i]);
    }
  }
  FUSEDOPT_UNROLL
  for (int k = 0; k < kShare; ++k) {
    FUSEDOPT_UNROLL
    for (int i = 0; i < kVector; ++i) {
      const std::uint32_t column = (k * kBlockThreads + thread) * kVector + i;
      if (row + column < count) {
        T value[1];
        single.unpack(0, single.load(0, data, row + column), value);
        add(k, i, value[0]);
      }
      sums[column] = sum[k][i];
    }
  }
}

// How gradients are read: the update reads them again, and finds in the cache what it held last.
template <typename Element, int kVector>
using Grads = OneDtype<Element, kVector, Reads::kAgain>;
using AnyGrad = AnyDtype<1, Reads::kAgain>;

// One element of any dtype that is computed in float, for sums that leave its range.
struct AsDouble {
  static constexpr int kVector = 1;
  using Raw = AnyGrad::Raw;
  AnyGrad any;

  FUSEDOPT_HD Raw load(int slot, const void* data, std::uint32_t at) const {
    return any.load(slot, data, at);
  }
  FUSEDOPT_HD void unpack(int slot, const Raw& raw, double (&values)[1]) const {
    float value[1];
    any.unpack(slot, raw, value);
    values[0] = value[0];
  }
};

template <typename T>
FUSEDOPT_HD void sum_block(const LaunchTable& table, std::uint32_t block, T* sums, int thread) {
  const std::uint32_t t = table.tensor_of(block);
  const TensorInfo info{table.info(t)};
  const std::int64_t begin =
      static_cast<std::int64_t>(block - table.first_chunk(t)) * kNormElements;
  const std::int64_t left = table.numel(t) - begin;
  const auto count = static_cast<std::uint32_t>(left < kNormElements ? left : kNormElements);
  const void* data = static_cast<const char*>(table.pointers(t)[0]) +
                     begin * static_cast<std::int64_t>(itemsize(info.dtype(0)));
  const T factor =
      static_cast<T>(unscale(static_cast<const GradNorm*>(table.update(0))->loss_scale));
  const bool aligned = info.access() == Access::kVectors;
  const auto sum = [&](const auto& vectors, const auto& single) {
    sum_columns<T>(vectors, single, data, count, factor, sums, thread);
  };
  if constexpr (std::is_same_v<T, double>) {
    const Grads<double, 1> single;
    if (info.dtype(0) != Dtype::kFloat64) return sum(AsDouble{{info}}, AsDouble{{info}});
    aligned ? sum(Grads<double, 2>(), single) : sum(single, single);
  } else {
    const AnyGrad single{info};
    if (!aligned) return sum(single, single);
    switch (info.dtype(0)) {
      case Dtype::kBFloat16:
        return sum(Grads<BFloat16, 8>(), single);
      case Dtype::kFloat16:
        return sum(Grads<Float16, 8>(), single);
      default:
        return sum(Grads<float, 4>(), single);
    }
  }
}

FUSEDOPT_HD bool is_double_block(const LaunchTable& table, std::uint32_t block) {
  return TensorInfo{table.info(table.tensor_of(block))}.dtype(0) == Dtype::kFloat64;
}

// Leaves the sum of the block for the last block to finish, and tells whether that is this one.
FUSEDOPT_HD bool hand_in(const GradNorm& norm, std::uint32_t block, double sum) {
  *static_cast<volatile double*>(norm.partials + norm.first_partial + block) = sum;
  return take_ticket(norm.ticket, norm.num_partials - 1) == norm.num_partials - 1;
}

}  // namespace fusedopt
