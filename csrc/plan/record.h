#pragma once

// What a plan remembers of an optimizer: its tensors as they were when they were last looked at. A
// step compares them with what they are now.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "../multi_tensor/tensor_view.h"
#include "../rules/group_rule.h"
#include "../torch_layout.h"
#include "role.h"
#include "written_memory.h"

namespace fusedopt {

struct TensorRecord {
  void* data = nullptr;     // also null without elements
  std::int32_t words = -1;  // where they are among the words of all, if they are known
  Dtype dtype = Dtype::kFloat32;
};

struct ParamRecord {
  std::uint32_t group = 0, index = 0;
  int device = kCpu;
  int ndim = -1;         // below 0: the kernels cannot touch it
  std::size_t dims = 0;  // where its shape and then its strides begin
  std::int64_t numel = 0;
  bool is_shard = false;     // of a DTensor
  bool has_state = false;    // that the kernels can take
  bool needs_state = false;  // whatever its rule needs

  bool python = false;            // takes the Python rule, and
  bool for_memory = false;        // only because it shares memory with another parameter
  bool is_refused = false;        // in this step, by its GPU: see KernelState
  bool in_order = false;          // in this step, because its gradient is what another one writes
  bool first_step = false;        // its state is new: see Scalars::step
  bool device_step = false;       // its step count is on its device
  std::int64_t shares_step = -1;  // its step count is that of all of Overlaps::shared_steps()[this]
  std::int64_t portrait = -1;     // where it is among the portraits, if it has one

  Roles roles;                 // whose tensors it has; but for the gradient
  SlotDtypes stored;           // with a gradient of the parameter's dtype
  std::size_t free_since = 0;  // Overlaps::generation() when nothing overlapped its last gradient
  TensorRecord tensors[kNumRoles];

  TensorRecord& operator[](Role role) { return tensors[position(role)]; }
  const TensorRecord& operator[](Role role) const { return tensors[position(role)]; }
  void add(Role role, const TensorView& tensor);
};

struct GroupRecord {
  std::uint32_t num_params = 0;
  bool python = false;
  bool capturable = false;
  bool amp_fused = false;

  // As they were last read.
  std::unique_ptr<GroupRule> rule;
  int state_mask = -1;        // -1 until the first step
  int options_device = kCpu;  // of the numbers that the kernel reads for itself, if there are any
  float ema_weight = 0;
  std::uint32_t like = 0;  // the first group whose rule and weight are the same
};

// What is looked at of a parameter that takes the Python rule, so that it leaves it when it can.
struct Portrait {
  std::uint64_t hash = 0;           // of what decides whether the kernels can take it
  std::vector<MemoryRange> memory;  // of the parameter and its state

  void add(std::uint64_t word) {
    hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
};

class Records {
 public:
  std::vector<GroupRecord> groups;
  std::vector<ParamRecord> params;  // in the order of the groups
  std::vector<Portrait> portraits;

  // Records the parameter itself.
  void add_param(const TensorView& tensor, ParamRecord* param);

  // A tensor that looks like its parameter.
  TensorView view_of(const ParamRecord& param, Role role) const {
    const std::int64_t* shape = dims_.data() + param.dims;
    const TensorRecord& tensor = param[role];
    return {tensor.data, tensor.dtype, param.ndim, shape, shape + param.ndim, param.device};
  }

  // Whether a TensorImpl is as it was when it was remembered; asks nobody.
  bool is_same(std::int32_t words, const char* impl) const {
    return words_[static_cast<std::size_t>(words)].are_those_of(impl);
  }
  void remember(const TorchLayout& layout, const char* impl, int ndim, TensorRecord* tensor);
  // Whether a TensorImpl is another one of the same kind, in other memory: then it is recorded.
  bool move_to(const TorchLayout& layout, const char* impl, TensorRecord* tensor);

 private:
  std::vector<std::int64_t> dims_;
  static constexpr std::size_t kMostKinds = 1 << 14;  // whose words are 4 MB
  std::vector<TensorWords> words_;                    // those of a parameter follow each other
  TensorKinds kinds_;
};

// How the tensors of a parameter are stored.
SlotDtypes stored_as(const ParamRecord& param);

}  // namespace fusedopt
