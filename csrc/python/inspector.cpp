#include "inspector.h"

#include <algorithm>

#include "../multi_tensor/tensor_lists.h"
#include "cache_warmer.h"
#include "portrait.h"

namespace fusedopt {

bool Inspector::inspect(const py::dict& state, const py::object& grads) {
  shared_.clear();
  find_slots();
  found_gradients_ = found_gradients();
  Seen block[kBlock];
  std::size_t size = 0;
  const auto see = [&](std::size_t e, PyObject* entry_state) {
    Seen& seen = block[size++];
    seen = Seen{e, entry_state};
    seen[Role::kParam] = recogniser_->param(e);
    if (size < kBlock) return true;
    size = 0;
    return inspect_block(block, kBlock, state, grads);
  };
  return recogniser_->for_each(state, see) && inspect_block(block, size, state, grads) &&
         inspect_shared();
}

// The parameters that share a step count take it one after the other, in the order of the groups,
// as a loop over them would.
bool Inspector::inspect_shared() {
  std::sort(shared_.begin(), shared_.end(),
            [](const Seen& a, const Seen& b) { return a.entry < b.entry; });
  written_.clear();
  for (const Seen& seen : shared_) {
    TensorView grad;
    if (!view(seen[Role::kGrad], &grad)) return false;
    const Verdict verdict = add_work(seen, grad);
    if (verdict == Verdict::kStale) return false;
    if (verdict == Verdict::kOdd) work_->leave(seen.entry);
  }
  if (!shared_.empty()) bump_versions(written_);
  return true;
}

// Each pass over the block waits for memory once, not once per tensor: after a backward nothing of
// this is in a near cache. For the same reason autograd is told here that the block is written,
// before the last tensor has been checked. If the step ends with an error then versions have moved
// for nothing.
bool Inspector::inspect_block(Seen* block, std::size_t size, const py::dict& state,
                              const py::object& grads) {
  for (std::size_t i = 0; i < size; ++i) {
    if (block[i].state != nullptr && !recogniser_->find_tensors(&block[i])) return false;
  }
  fetch(block, size, kStates | Role::kParam | Role::kStep);
  for (std::size_t i = 0; i < size; ++i) {
    held_.push_back(found_gradients_.grad_of(block[i][Role::kParam]));
    block[i][Role::kGrad] = held_.back().ptr();
  }
  fetch(block, size, Role::kGrad);
  if (!grads.is_none()) {
    for (std::size_t i = 0; i < size; ++i) {
      const py::int_ key(block[i].entry);
      if (PyObject* other = item_of(grads.ptr(), key.ptr())) {
        block[i].in_python = other == Py_Ellipsis;
        block[i][Role::kGrad] = block[i].in_python ? Py_None : other;
        block[i].is_copy = block[i][Role::kGrad] != Py_None;
      }
    }
  }
  written_.clear();
  for (std::size_t i = 0; i < size; ++i) {
    const Verdict verdict = check(block[i], state);
    if (verdict == Verdict::kStale) return false;
    if (verdict == Verdict::kOdd) work_->leave(block[i].entry);
  }
  bump_versions(written_);
  return true;
}

Inspector::Verdict Inspector::check(const Seen& seen, const py::dict& state) {
  ParamRecord& param = records_->params[seen.entry];
  PyObject* const grad = seen[Role::kGrad];
  if (grad == Py_None) {
    if (seen.in_python) work_->add_python(seen.entry);
    return Verdict::kFine;
  }
  if (param.python && !param.for_memory) {
    PyObject* const object = seen[Role::kParam];
    if (param.portrait >= 0 && !is_as_portrayed(param, object, state_of(object, state))) {
      return Verdict::kStale;
    }
    return leave_to_python(seen);
  }
  const bool is_grad_known =
      (param.free_since == overlaps_->generation() && is_same(grad, param[Role::kGrad])) ||
      has_moved(seen, &param);
  TensorView now{param[Role::kGrad].data, param[Role::kGrad].dtype};
  const bool is_dense = is_grad_known || view(grad, &now);
  const GroupRecord& group = records_->groups[param.group];
  const bool needs_state = rule_.has_step || group.state_mask != 0 || param.needs_state;
  if (needs_state && !param.has_state) {
    // A sparse update makes its state itself.
    const bool makes_state = !is_dense && rule_.first_step_fills;
    return makes_state ? leave_to_python(seen) : Verdict::kStale;
  }
  const bool is_recorded = param.roles.all_of(
      [&](Role role) { return is_as_recorded(seen[role], role, seen.entry, &param); });
  if (!is_recorded) return Verdict::kStale;
  if (!is_dense || param.for_memory) return leave_to_python(seen);
  if (!(is_grad_known || is_usable(seen, &param, now)) ||
      (!seen.is_copy && !recogniser_->is_placed_like(grad, seen.entry))) {
    const bool can_be_copied =
        Py_TYPE(local_of(grad)) == reinterpret_cast<PyTypeObject*>(torch.tensor_type) &&
        can_combine({{param[Role::kParam].dtype, now.dtype}, 2});
    if (!can_be_copied) return leave_to_python(seen);
    read_early(seen);
    return Verdict::kOdd;
  }
  if (group.options_device != kCpu && group.options_device != param.device) {
    return leave_to_python(seen);
  }
  if (param.shares_step >= 0) {
    shared_.push_back(seen);
    return Verdict::kFine;
  }
  return add_work(seen, now);
}

bool Inspector::is_same(PyObject* tensor, const TensorRecord& record) const {
  if (record.words < 0) return false;
  tensor = local_of(tensor);
  return is_plain_tensor(tensor) && records_->is_same(record.words, impl_of(tensor));
}

// Whether the gradient is another tensor of the kind that the last one was, which the step can take.
bool Inspector::has_moved(const Seen& seen, ParamRecord* param) {
  PyObject* const grad = local_of(seen[Role::kGrad]);
  return !seen.is_copy && is_plain_tensor(grad) &&
         verification_->follow(param, torch.layout, impl_of(grad));
}

bool Inspector::is_as_recorded(PyObject* tensor, Role role, std::size_t e, ParamRecord* param) {
  const auto is_placed = [&] {
    return !is_elementwise(role) || recogniser_->is_placed_like(tensor, e);
  };
  if (is_same(tensor, (*param)[role])) return is_placed();
  TensorView now;
  if (!view_stored(tensor, &now) || !is_placed() || has_negative_bit(tensor)) return false;
  if (!verification_->accepts(param, role, now)) return false;
  remember(tensor, now.ndim, &(*param)[role]);
  return true;
}

// False if the kernels may be able to take it now. Memory may have moved.
bool Inspector::is_as_portrayed(const ParamRecord& param, PyObject* object, PyObject* state) {
  Portrait now = portrait_of(object, state);
  Portrait& before = records_->portraits[static_cast<std::size_t>(param.portrait)];
  if (now.hash != before.hash) return false;
  if (!(now.memory == before.memory)) {
    before.memory = std::move(now.memory);
    verification_->add_move();
  }
  return true;
}

// Whether the kernels can take the gradient as it is: nothing else of the step writes it.
bool Inspector::is_usable(const Seen& seen, ParamRecord* param, const TensorView& grad) {
  if (!verification_->fits(*param, grad) || has_negative_bit(seen[Role::kGrad])) return false;
  // The copy may be where a tensor was that is in no step of late.
  if (seen.is_copy) return true;
  if (param->numel != 0) {
    const TensorRecord& of_param = (*param)[Role::kParam];
    if (grad.data == of_param.data) return grad.dtype == of_param.dtype;
    if (!verification_->is_free(*param, grad)) return false;
  }
  TensorRecord& record = (*param)[Role::kGrad];
  record.data = grad.data;
  record.dtype = grad.dtype;
  param->free_since = overlaps_->generation();
  remember(seen[Role::kGrad], grad.ndim, &record);
  return true;
}

void Inspector::remember(PyObject* tensor, int ndim, TensorRecord* record) {
  if (torch.layout.trusts_words) {
    records_->remember(torch.layout, impl_of(local_of(tensor)), ndim, record);
  }
}

Inspector::Verdict Inspector::leave_to_python(const Seen& seen) {
  read_early(seen);
  if (records_->params[seen.entry].shares_step >= 0) work_->put_in_order(seen.entry);
  return Verdict::kOdd;
}

void Inspector::read_early(const Seen& seen) {
  if (seen.is_copy) return;
  std::vector<MemoryRange> memory;
  add_memory_of(seen[Role::kGrad], &memory, nullptr);
  for (const MemoryRange& range : memory) work_->add_early_read(seen.entry, range);
}

// What is written is held while the interpreter lock is released.
Inspector::Verdict Inspector::add_work(const Seen& seen, const TensorView& grad) {
  if (!work_->add(seen.entry, grad)) {
    return records_->params[seen.entry].is_refused ? leave_to_python(seen) : Verdict::kStale;
  }
  const auto write = [&](PyObject* tensor) {
    written_.push_back(tensor);
    held_.push_back(py::reinterpret_borrow<py::object>(tensor));
  };
  records_->params[seen.entry].roles.for_each([&](Role role) {
    PyObject* const tensor = seen[role];
    write(tensor);
    if (PyObject* const local = local_of(tensor); local != tensor) write(local);
  });
  return Verdict::kFine;
}

int Inspector::traverse(visitproc visit, void* arg) const {
  for (const py::object& held : held_) Py_VISIT(held.ptr());
  return 0;
}

}  // namespace fusedopt
