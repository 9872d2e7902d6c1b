// What tests/test_new_rules.py calls: steps of a rule with a second number, mu_product, on the CPU and
// through the body of the GPU's kernel, which then reads and writes both numbers.
#include "multi_tensor/apply_cpu.h"
#include "multi_tensor/apply_cuda.cuh"
#include "multi_tensor/apply_cuda.h"
#include "update_rules/nadam.h"

using namespace fusedopt;

namespace {

struct Tensors {
  float *param, *grad, *exp_avg, *exp_avg_sq, *step, *mu_product;
};

StoredAs in_float() {
  StoredAs stored;
  stored.dtypes.num_slots = 4;
  return stored;
}

}  // namespace

#define FUSEDOPT_EXPORT extern "C" __attribute__((visibility("default")))

// `options`: lr, beta1, beta2, eps, weight_decay, l1, momentum_decay.
FUSEDOPT_EXPORT void nadam(const double* options, bool maximize, bool decoupled, float** tensors,
                           std::int64_t numel, bool on_device) {
  const NAdam rule{{options[0]}, {options[1]}, {options[2]}, options[3], options[4],
                   options[5],   options[6],   maximize,     decoupled};
  const Tensors t{tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], tensors[5]};
  void* slots[kMaxSlots] = {t.param, t.grad, t.exp_avg, t.exp_avg_sq};
  if (!on_device) {
    Scalars scalars = advanced(rule, {*t.step, *t.mu_product});
    scalars.second = *t.mu_product = static_cast<float>(scalars.second);
    *t.step = static_cast<float>(scalars.step);
    const PreparedUpdate update = prepare_cpu<Isa::baseline>(rule, scalars, in_float());
    return update.kernel(update, slots, 0, numel);
  }
  static std::uint32_t tickets[kMaxTableTensors];
  Step step;
  step.updates.push_back(prepare_cuda(rule, 1, in_float(), true));
  TensorTask task{0, false, numel, {}, t.step, t.mu_product};
  for (int s = 0; s < kMaxSlots; ++s) task.slots[s] = slots[s];
  step.tasks.push_back(task);
  apply_cuda(step, 0, nullptr, tickets);
}
