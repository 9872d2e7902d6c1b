#include "launch.h"

#include <stdexcept>

#include "../device/apply_gpu.h"
#include "../device/gpu.h"

namespace fusedopt {

// What counts no steps has nothing on the host that a replay would miss.
void Launch::check_capture(const std::string& owner) const {
  if (!work_->has_step_) return;
  const std::vector<GroupRecord>& groups = work_->records_->groups;
  for (const Queue& queue : queues_) {
    if (queue.tickets == nullptr || !is_capturing(queue.stream)) continue;
    for (std::size_t g = 0; g < groups.size(); ++g) {
      if (groups[g].capturable) continue;
      throw std::runtime_error(owner +
                               ": step() is being captured into a CUDA graph, but param group " +
                               std::to_string(g) +
                               " has capturable=False; construct the optimizer with "
                               "capturable=True");
    }
  }
}

void Launch::run(int num_threads) {
  std::vector<Step>& steps = work_->steps_;
  try {
    for (std::size_t s = 1; s < steps.size(); ++s) {
      if (steps[s].tasks.empty()) continue;
      const Queue& queue = queues_[s - 1];
      apply_gpu(steps[s], static_cast<int>(s) - 1, queue.stream, queue.tickets, &num_launches_);
    }
  } catch (const DeviceProblem& problem) {
    if (num_launches_ == 0) throw;
    throw DeviceProblem(std::string(problem.what()) + "; " + std::to_string(num_launches_) +
                        " of this step's launches came before it, so that parameters and state " +
                        "are of two steps: load a checkpoint");
  }
  reaches_cpu_ = true;
  if (!work_->repeats_) {
    for (const std::size_t p : work_->stepping_) work_->records_->params[p].first_step = false;
  }
  const bool skipped = !steps.empty() && !apply_cpu(&steps[0], work_->chunks_, num_threads);
  write_scalars(skipped);
}

// `skipped`: on the CPU. A GPU that skips counts on the device.
void Launch::write_scalars(bool skipped) const {
  if (!skipped) {
    for (std::uint64_t* rounding : work_->roundings_) ++*rounding;
  }
  for (const ScalarToWrite& scalar : work_->scalars_) {
    if (skipped && scalar.device == kCpu) continue;
    if (scalar.dtype == Dtype::kFloat64) {
      *static_cast<double*>(scalar.data) = scalar.value;
    } else {
      *static_cast<float*>(scalar.data) = static_cast<float>(scalar.value);
    }
  }
}

}  // namespace fusedopt
