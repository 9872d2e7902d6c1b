#pragma once

#include <cstdint>
#include <vector>

#include "../multi_tensor/grad_norm.h"
#include "../multi_tensor/tensor_view.h"

namespace fusedopt {

// What the norm of gradients is measured into: the header of a clip tensor (StepScaling), a zero for
// the kernel to count in, and room for one sum per chunk.
constexpr std::int64_t kClipHeader = StepScaling::kNumClip + 1;

// Without a loss scale: the caller sets what else there is.
GradNorm norm_into(const TensorView& clip, std::int64_t num_chunks, double max_norm);

}  // namespace fusedopt
