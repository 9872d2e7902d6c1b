#include "../multi_tensor/apply_cuda.h"
#include "../multi_tensor/grad_norm.h"
#include "../multi_tensor/grad_norm_kernel.h"

namespace fusedopt {

namespace {

#if defined(__CUDACC__)

// The sum over the columns of all threads, valid in thread 0.
template <typename T, typename Sum>
__device__ T sum_in_block(T* sums, int num_columns, Sum&& sum_own_columns) {
  sum_own_columns();
  for (int half = num_columns / 2; half > 0; half /= 2) {
    __syncthreads();
    fold_columns(sums, half, threadIdx.x, blockDim.x);
  }
  __syncthreads();
  return sums[0];
}

__global__ void __launch_bounds__(kBlockThreads)
    grad_norm_kernel(const __grid_constant__ LaunchTable table) {
  __shared__ double shared[kNormColumns];
  __shared__ bool is_last;
  const GradNorm& norm = *static_cast<const GradNorm*>(table.update(0));
  const int thread = threadIdx.x;
  double sum;
  bool in_double = is_double_block(table, blockIdx.x);
  if (!in_double) {
    float* const sums = reinterpret_cast<float*>(shared);
    sum = sum_in_block(sums, kNormColumns, [&] { sum_block(table, blockIdx.x, sums, thread); });
    in_double = !is_accurate(static_cast<float>(sum));
    __syncthreads();  // all have read the sum: its place is free
  }
  if (in_double) {
    sum = sum_in_block(shared, kNormColumns, [&] { sum_block(table, blockIdx.x, shared, thread); });
  }
  if (thread == 0) is_last = hand_in(norm, blockIdx.x, sum);
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  sum = sum_in_block(shared, kPartialColumns, [&] {
    shared[thread] = sum_partial_column(norm.partials, norm.num_partials, thread);
  });
  if (thread == 0) norm.finish(sum);
}

void launch(const LaunchTable& table, void* stream) {
  grad_norm_kernel<<<table.num_chunks, kBlockThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      table);
}

#else  // FUSEDOPT_CUDA_ON_HOST

template <typename T, typename Sum>
double sum_in_block(int num_columns, Sum&& sum_own_columns) {
  T sums[kNormColumns];
  for (int thread = 0; thread < kBlockThreads; ++thread) sum_own_columns(sums, thread);
  for (int half = num_columns / 2; half > 0; half /= 2) {
    for (int thread = 0; thread < kBlockThreads; ++thread) {
      fold_columns(sums, half, thread, kBlockThreads);
    }
  }
  return sums[0];
}

void launch(const LaunchTable& table, void*) {
  const GradNorm& norm = *static_cast<const GradNorm*>(table.update(0));
  for (std::uint32_t block = 0; block < table.num_chunks; ++block) {
    const auto sum_chunk = [&](auto* sums, int thread) { sum_block(table, block, sums, thread); };
    double sum = 0;
    bool in_double = is_double_block(table, block);
    if (!in_double) {
      sum = sum_in_block<float>(kNormColumns, sum_chunk);
      in_double = !is_accurate(static_cast<float>(sum));
    }
    if (in_double) sum = sum_in_block<double>(kNormColumns, sum_chunk);
    if (!hand_in(norm, block, sum)) continue;
    norm.finish(sum_in_block<double>(kPartialColumns, [&](double* sums, int thread) {
      sums[thread] = sum_partial_column(norm.partials, norm.num_partials, thread);
    }));
  }
}

#endif

}  // namespace

void grad_norm_cuda(const std::vector<GradToMeasure>& grads, GradNorm norm, int device,
                    void* stream) {
  const DeviceGuard guard(device);
  TablePacker packer(1, sizeof(GradNorm));
  LaunchTable table;
  norm.first_partial = 0;
  const auto flush = [&] {
    if (packer.empty()) return;
    packer.add_update(&norm);
    packer.pack(&table);
    launch(table, stream);
    guard.launched();
    norm.first_partial += table.num_chunks;
  };
  for (const GradToMeasure& grad : grads) {
    if (grad.numel == 0) continue;
    TableTensor tensor;
    tensor.pointers[0] = grad.data;
    tensor.numel = grad.numel;
    tensor.num_chunks = static_cast<std::uint32_t>(grad.num_chunks());
    const bool aligned = reinterpret_cast<std::uintptr_t>(grad.data) % 16 == 0;
    SlotDtypes dtypes;
    dtypes.slots[dtypes.num_slots++] = grad.dtype;
    tensor.info =
        TensorInfo::pack(0, aligned ? Access::kVectors : Access::kUnaligned, dtypes, false);
    if (!packer.fits(tensor.num_chunks, true)) flush();
    packer.add(tensor);
  }
  flush();
}

}  // namespace fusedopt
