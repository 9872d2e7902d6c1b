// Compiles every update rule for the GPU, so that a build without one proves that they fit:
//   nvcc -std=c++17 -arch=sm_90 -fmad=false -Xptxas -v -c tests/native/update_rules.cu
// prints the registers and spills of each.
#include <cstdint>

#include "../../csrc/update_rules/adagrad.h"
#include "../../csrc/update_rules/adam.h"
#include "../../csrc/update_rules/rmsprop.h"
#include "../../csrc/update_rules/sgd.h"

namespace fusedopt {

template <typename Update, typename T, typename... State>
__global__ void apply(Update update, int64_t numel, T* param, const T* grad, State*... state) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < numel;
       i += int64_t{gridDim.x} * blockDim.x) {
    update(param[i], grad[i], state[i]...);
  }
}

template <typename T>
struct Launch {
  int64_t numel;
  T *param, *grad, *state[3];

  template <typename Update>
  void operator()(const Update& update) const {
    if constexpr (Update::kNumStates == 0) {
      apply<<<1, 256>>>(update, numel, param, grad);
    } else if constexpr (Update::kNumStates == 1) {
      apply<<<1, 256>>>(update, numel, param, grad, state[0]);
    } else if constexpr (Update::kNumStates == 2) {
      apply<<<1, 256>>>(update, numel, param, grad, state[0], state[1]);
    } else {
      apply<<<1, 256>>>(update, numel, param, grad, state[0], state[1], state[2]);
    }
  }
};

// Instantiates every variant that `prepare` can choose.
template <typename... Rule>
void launch_all(const Launch<float>& on_float, const Launch<double>& on_double) {
  (Rule{}.template prepare<float>(1, on_float), ...);
  (Rule{}.template prepare<double>(1, on_double), ...);
}

template void launch_all<Adagrad, Adam, RMSprop, SGD>(const Launch<float>&, const Launch<double>&);

}  // namespace fusedopt
