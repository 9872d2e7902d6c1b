#pragma once

// What one step is going to do, and in which order: lists only, nothing is written here.

#include <cstddef>
#include <cstdint>
#include <map>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../device/kernel_state.h"
#include "../multi_tensor/apply.h"
#include "overlaps.h"
#include "record.h"

namespace fusedopt {

// A scalar of a parameter's, to be written once everything has been checked.
struct ScalarToWrite {
  void* data;
  Dtype dtype;
  double value;
  int device;  // of the parameter
};

class Work {
 public:
  // `state_of`: what is known of a kernel of a GPU; without it, all are ready.
  using StateOf = KernelState (*)(const DeviceKernel& kernel, int device);
  Work(bool has_step, Records* records, const Overlaps* overlaps, StateOf state_of = nullptr)
      : has_step_(has_step), records_(records), overlaps_(overlaps), state_of_(state_of) {}

  // Forgets the last step.
  void clear();

  // A parameter for the kernels, with a gradient that they can take. Parameters with one step count
  // come in the order of the groups: each continues where the one before it ends. False if the step
  // count cannot go on, or the options have no numbers for it.
  bool add(std::size_t p, const TensorView& grad);

  // A parameter that needs the Python side,
  void leave(std::size_t p) { odd_.push_back(p); }
  // or that steps there: what its gradient is here does not matter.
  void add_python(std::size_t p) { stepping_.push_back(p); }

  // Memory of a gradient that is read before the kernels start: by a copy, or by the Python rule.
  void add_early_read(std::size_t reader, const MemoryRange& memory);
  // The step of this parameter, and of those that go with it, comes in the order of the groups.
  void put_in_order(std::size_t p);
  // Puts parameters in order of which one reads what the other writes, if both step. (Where a
  // parameter was that rests there may be a gradient now.) Once everything has been added.
  void finish();

  // Those that need the Python side.
  const std::vector<std::size_t>& odd() const { return odd_; }

  // The kernels that have to be loaded first. Where one is refused, parameters are left.
  const NeededKernels& unknown_kernels() const { return unknown_kernels_; }

  void set_scaling(int device, const StepScaling& scaling) { step_on(device).scaling = scaling; }
  // Whether a scalar on the host depends on what only a GPU knows: whether it takes this step.
  bool awaits_device() const;

 private:
  friend class Launch;

  // Updates of one group, by the scalars of the step, place and dtypes.
  using UpdateKey = std::tuple<double, double, std::uint32_t>;
  struct PreparedUpdates {
    std::map<UpdateKey, std::uint32_t> index_of;
    UpdateKey last_key;
    std::uint32_t last_index = 0;
  };
  static constexpr std::uint32_t kUndefined = ~0u, kRefused = ~1u;

  bool advance(const ParamRecord& param, Scalars* scalars);
  void add_pointers(const ParamRecord& param, TensorTask* task);
  std::uint32_t prepared_update(std::uint32_t group, const Scalars& scalars,
                                const SlotDtypes& dtypes, int device, Where where);
  Step& step_on(int device);
  bool is_refused(const DeviceKernel& kernel, int device);

  const bool has_step_;
  Records* const records_;
  const Overlaps* const overlaps_;
  const StateOf state_of_;

  std::vector<Step> steps_;  // the CPU first, then the GPUs
  std::vector<ScalarToWrite> scalars_;
  std::vector<std::uint64_t*> roundings_;          // counts of random bits used, on the CPU
  std::vector<std::size_t> stepping_;              // what is here, and not among the odd ones
  std::vector<PreparedUpdates> prepared_;          // by group
  std::unordered_map<const void*, double> ahead_;  // steps in this work by shared step count
  std::vector<std::size_t> odd_, in_order_;
  NeededKernels unknown_kernels_;
  std::vector<std::pair<std::size_t, std::size_t>> readers_;  // with who writes their gradient
};

}  // namespace fusedopt
