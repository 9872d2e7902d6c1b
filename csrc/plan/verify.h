#pragma once

// Whether tensors are what the records say, and the kernels can take them.

#include <utility>

#include "../multi_tensor/tensor_view.h"
#include "overlaps.h"
#include "record.h"

namespace fusedopt {

class Verification {
 public:
  Verification(Records* records, Overlaps* overlaps) : records_(records), overlaps_(overlaps) {}

  // Whether the step count is read and written by the kernel, beside its parameter.
  bool counts_on_device(const ParamRecord& param, const TensorView& step) const;

  // Whether the kernels can take a tensor in this role. That it is no lazy negation, and that a
  // shard is of the parameter's elements, the caller knows.
  bool can_take(const ParamRecord& param, Role role, const TensorView& now) const;

  // Whether it is what is recorded, too. It may have moved: that is recorded.
  bool accepts(ParamRecord* param, Role role, const TensorView& now);

  // Whether a tensor has moved since this was last asked.
  bool has_moved() { return std::exchange(moved_, false); }
  void add_move() { moved_ = true; }

  // Whether the kernels can take a gradient as far as its layout and dtype go.
  bool fits(const ParamRecord& param, const TensorView& grad) const;

  // Whether a TensorImpl is a gradient of the kind that the last one was, in other memory, which nobody
  // writes in this step: then it is recorded.
  bool follow(ParamRecord* param, const TorchLayout& layout, const char* impl);

  // Whether a gradient that fits is written by nobody in this step.
  bool is_free(const ParamRecord& param, const TensorView& grad);

 private:
  Records* records_;
  Overlaps* overlaps_;
  bool moved_ = false;
};

// Whether the records have a tensor in each of these roles, and a scale for each state in codes;
// and then, whether kernels combine them.
bool is_complete(const ParamRecord& param, Roles needed);

}  // namespace fusedopt
