#pragma once

#include <cstddef>
#include <cstdint>

#include "../storage/isa.h"

namespace fusedopt {

// Elements that one thread takes at a time.
constexpr std::int64_t kChunkElements = 32768;

// A tensor's pieces start at multiples of this many elements, so that two threads never write the
// same cache line and vectors stay aligned to the start of the tensor.
constexpr std::int64_t kPieceElements = 64;

// Below this many elements in all tensors together a step runs on the calling thread: 0.1 ms of
// Adam on one thread. Waking the pool costs 1 us on an idle machine, but on a busy one a region of
// 64,000 elements waited 4.8 ms for its second thread (2 cores, 2026-11).
constexpr std::int64_t kSerialElements = 262144;

// Where threads get no core, a step waits for them again after this many times as long as the last
// wait lost, at most. 8 processes on 2 cores with two threads each, AdamW over 100 x 10,000, steps
// per second of all together (2026-11): 650 if they always wait, else 2,500 to 5,200 from run to run;
// 128 gives little more. After a wait of 10 ms a step goes alone for 0.3 s at most.
constexpr int kMaxPatience = 32;

// Elements that the loop for one half dtype converts, updates and converts back at a time, as many as
// the registers hold. Adam, one thread of an EPYC 9004, in cache, ns per element (2026-11): AVX-512
// bfloat16 32: 0.44, 64: 0.42; float16 0.37, 0.35; AVX2 bfloat16 16: 0.64, 32: 0.67, 64: 0.69;
// float16 0.42, 0.40, 0.53.
template <Isa isa>
constexpr int kHalfElements = isa == Isa::avx2 ? 32 : 64;

// Elements that the loop for mixed dtypes converts to float at a time. One thread of an EPYC 9005,
// 2026-11, AVX-512, 100 x 10,000 bfloat16 Adam, ms per step:
// 32: 1.0, 64: 0.80, 128: 0.69, 256: 0.64, 512: 0.60.
constexpr int kConvertElements = 512;

// Elements that the loop for other storage takes at a time; a multiple of kScaleElements. One thread,
// exact masters in two bytes, float32 state, in cache, ns per element: 128: 0.49, 256: 0.41; of the
// memory floor at 110 GB/s for two threads: 64: 0.75, 256: 0.93, 512: 0.88.
constexpr int kStoredElements = 256;

// The constants below have not been measured on a GPU yet.

// What a kernel takes as arguments: 32,764 bytes since CUDA 12.1; the compiler is told where it is less.
#if defined(FUSEDOPT_ARGUMENT_BYTES)
constexpr std::size_t kMaxArgumentBytes = FUSEDOPT_ARGUMENT_BYTES;
#else
constexpr std::size_t kMaxArgumentBytes = 32764;
#endif
constexpr std::size_t table_bytes(std::size_t argument_bytes) {
  return argument_bytes / 16 * 16 - 96;
}
constexpr std::size_t kTableBytes = table_bytes(kMaxArgumentBytes);

// Threads of a block, and elements of one tensor that a block updates: each thread has eight
// elements in flight, eight times over.
constexpr int kBlockThreads = 256;
constexpr std::int64_t kBlockElements = 16384;

// Elements that a thread takes at a time where values are not stored as they are.
constexpr int kLaneElements = 8;

// Blocks that fit a multiprocessor at least, which is to say 128 registers per thread. Without it
// CUDA 13.0 saves registers in two double kernels of RMSprop for sm_90 and spills.
constexpr int kMinBlocks = 2;

// Elements of which one block sums the squares, and the columns it does it in: the order of the sum
// is that of the columns, on every device.
constexpr std::int64_t kNormElements = 65536;
constexpr int kNormColumns = 2048;

}  // namespace fusedopt
