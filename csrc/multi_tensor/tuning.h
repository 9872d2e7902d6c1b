#pragma once

#include <cstdint>

namespace fusedopt {

// Elements that one thread takes at a time.
constexpr std::int64_t kChunkElements = 32768;

// A tensor's pieces start at multiples of this many elements, so that two threads never write the
// same cache line and vectors stay aligned to the start of the tensor.
constexpr std::int64_t kPieceElements = 64;

// Below this many elements in all tensors together a step runs on the calling thread.
constexpr std::int64_t kSerialElements = 32768;

// Elements that the mixed-dtype loop converts to float at a time; its buffers stay in the L1 cache.
constexpr int kConvertElements = 256;

}  // namespace fusedopt
