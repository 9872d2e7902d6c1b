#pragma once

#include <cstdint>
#include <vector>

#include "../multi_tensor/apply.h"
#include "../multi_tensor/grad_norm.h"

namespace fusedopt {

// Launches the step on the stream of the device. With step counts on the device it needs
// kMaxTableTensors zeros there, which are zeros again afterwards. Adds the launches that were made to
// `num_launches`, before it throws DeviceProblem, too.
void apply_gpu(const Step& step, int device, void* stream, std::uint32_t* tickets,
               int* num_launches);

// As grad_norm_cpu. Throws std::runtime_error.
void grad_norm_gpu(const std::vector<GradToMeasure>& grads, GradNorm norm, int device,
                   void* stream);

}  // namespace fusedopt
