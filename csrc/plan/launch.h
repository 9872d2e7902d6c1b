#pragma once

// What a step writes.

#include <cstdint>
#include <string>
#include <vector>

#include "work.h"

namespace fusedopt {

// Where a GPU takes its work, and the zeros that its kernels count in; see apply_gpu.
struct Queue {
  void* stream = nullptr;
  std::uint32_t* tickets = nullptr;
};

class Launch {
 public:
  explicit Launch(Work* work) : work_(work) {}

  // Calls queue_of(device) for each GPU that has work. What can fail on the CPU comes here. Throws
  // std::runtime_error, which begins with `owner`, if a stream is captured, and a group that counts
  // steps is not capturable.
  template <typename QueueOf>
  void prepare(const std::string& owner, QueueOf&& queue_of) {
    for (std::size_t s = 1; s < work_->steps_.size(); ++s) {
      const int device = static_cast<int>(s) - 1;
      queues_.push_back(work_->steps_[s].tasks.empty() ? Queue() : queue_of(device));
    }
    check_capture(owner);
    if (!work_->repeats_ && !work_->steps_.empty()) work_->chunks_ = chunks_of(work_->steps_[0]);
  }

  // The step, and after it what counts it on the host. Without Python: the interpreter lock may be
  // released.
  // Throws DeviceProblem if a launch fails, which only a device in a bad way does: all kernels were
  // loaded before.
  void run(int num_threads);
  // Of a run that failed.
  bool has_written() const { return num_launches_ > 0 || reaches_cpu_; }

 private:
  void check_capture(const std::string& owner) const;
  void write_scalars(bool skipped) const;

  Work* work_;
  std::vector<Queue> queues_;  // of the GPUs
  int num_launches_ = 0;
  bool reaches_cpu_ = false;
};

}  // namespace fusedopt
