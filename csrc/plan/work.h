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
#include "../multi_tensor/launch_plan.h"
#include "overlaps.h"
#include "record.h"

namespace fusedopt {

// A scalar of a parameter's, to be written once everything has been checked.
struct ScalarToWrite {
  void* data;
  Dtype dtype;
  bool is_second;
  std::uint32_t update;  // whose scalars it is among, on
  int device;            // that of the parameter
  double value;
};

// What an update was prepared from.
struct UpdateSource {
  std::uint32_t group;
  Scalars scalars;
  bool is_counted = false;  // on the host, in
  Dtype step_dtype = Dtype::kFloat32, second_dtype = Dtype::kFloat32;
  SlotDtypes dtypes = {};
  Where where = Where::kCpu;
  int options_device = kCpu;
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

  // The last step once more, if its parameters and all their tensors are the same: with the options
  // of now, and counts that are one further. False if that is not all there is to it; then the work is
  // to be listed anew.
  bool repeat();
  // Whether the work is a list that repeat() can go on with.
  bool is_repeatable() const;
  // `task`: its number among those of the device.
  void* grad_of(int device, std::size_t task) const;
  void set_grad(int device, std::size_t task, void* grad);

  // What steps, in the order in which it was added.
  const std::vector<std::size_t>& stepping() const { return stepping_; }
  // Those that need the Python side.
  const std::vector<std::size_t>& odd() const { return odd_; }

  // The kernels that have to be loaded first. Where one is refused, parameters are left.
  const NeededKernels& unknown_kernels() const { return unknown_kernels_; }

  // Whether it is so little, all of it on the CPU, that other threads can wait for it as well as for
  // a few lines of Python.
  bool is_short() const;

  void forget_scaling();
  void set_scaling(int device, const StepScaling& scaling) { step_on(device).scaling = scaling; }
  // Whether a scalar on the host depends on what only a GPU knows: whether it takes this step.
  bool awaits_device() const;

 private:
  friend class Launch;

  // Updates of one group, by the scalars of the step, place and dtypes.
  using UpdateKey = std::tuple<double, double, std::uint64_t>;
  struct PreparedUpdates {
    std::map<UpdateKey, std::uint32_t> index_of;
    UpdateKey last_key;
    std::uint32_t last_index = 0;
  };
  static constexpr std::uint32_t kUndefined = ~0u, kRefused = ~1u;

  bool advance(const ParamRecord& param, UpdateSource* source);
  void write_later(const ParamRecord& param, const UpdateSource& source, std::uint32_t update);
  void add_pointers(const ParamRecord& param, TensorTask* task);
  std::uint32_t prepared_update(const UpdateSource& source, int device);
  bool is_defined(const UpdateSource& source) const;
  PreparedUpdate prepare(const UpdateSource& source) const;
  Step& step_on(int device);
  bool is_refused(const DeviceKernel& kernel, int device);

  const bool has_step_;
  Records* const records_;
  const Overlaps* const overlaps_;
  const StateOf state_of_;

  std::vector<Step> steps_;                         // the CPU first, then the GPUs
  std::vector<std::vector<UpdateSource>> sources_;  // of their updates
  LaunchPlan chunks_;                               // of the CPU's work
  bool repeats_ = false;                            // it is what the last step did
  std::vector<ScalarToWrite> scalars_;
  std::vector<std::uint64_t*> roundings_;          // counts of random bits used, on the CPU
  std::vector<std::size_t> stepping_;              // what is here, and not among the odd ones
  std::vector<PreparedUpdates> prepared_;          // by the group that it is like
  std::vector<std::uint32_t> likes_;               // by group
  std::unordered_map<const void*, double> ahead_;  // steps in this work by shared step count
  std::vector<std::size_t> odd_, in_order_;
  NeededKernels unknown_kernels_;
  std::vector<std::pair<std::size_t, std::size_t>> readers_;  // with who writes their gradient
};

}  // namespace fusedopt
