#include "repetition.h"

#include <algorithm>
#include <cstddef>

#include "cache_warmer.h"

namespace fusedopt {

void Repetition::forget() {
  entries_.clear();
  tensors_.clear();
  shards_.clear();
  has_dtensors_ = false;
}

void Repetition::give_up() {
  constexpr int kMostPatience = 31;
  forget();
  resting_ = patience_;
  patience_ = std::min(2 * patience_ + 1, kMostPatience);
}

// Objects are noted without being held: they are looked at only while the state and the groups are
// known to hold them.
void Repetition::learn() {
  forget();
  if (resting_ > 0) {
    --resting_;
    return;
  }
  if (!torch.layout.trusts_words || !torch.layout.knows_version() || !work_->is_repeatable())
    return;
  std::vector<bool> steps(records_->params.size());
  std::vector<std::uint32_t> num_tasks;
  // In the order of the work, in which the memory of the next step is read.
  const auto learn_next = [&](std::size_t e) {
    const auto device = static_cast<std::size_t>(records_->params[e].device + 1);
    if (device >= num_tasks.size()) num_tasks.resize(device + 1);
    steps[e] = true;
    return learn_stepping(e, num_tasks[device]++);
  };
  const std::vector<std::size_t>& stepping = work_->stepping();
  bool is_known = std::all_of(stepping.begin(), stepping.end(), learn_next);
  for (std::size_t e = 0; is_known && e < steps.size(); ++e) {
    if (!steps[e]) is_known = learn_resting(e);
  }
  if (!is_known) return forget();
  in_order_.resize(entries_.size());
  for (std::uint32_t i = 0; i < entries_.size(); ++i) in_order_[entries_[i].e] = i;
  has_dtensors_ = std::any_of(entries_.begin(), entries_.end(),
                              [](const Entry& entry) { return entry.is_dtensor; });
}

// Its tensors, be it none, come behind those of the one before it.
Repetition::Entry Repetition::next_entry(std::size_t e) const {
  const auto tensors = static_cast<std::uint32_t>(tensors_.size());
  const auto shards = static_cast<std::uint32_t>(shards_.size());
  PyObject* const param = recogniser_->walked(e, Role::kParam);
  return {e, param, is_dtensor(param), tensors, shards};
}

bool Repetition::learn_resting(std::size_t e) {
  entries_.push_back(next_entry(e));
  return entries_.back().is_dtensor || is_plain_tensor(entries_.back().param);
}

bool Repetition::learn_stepping(std::size_t e, std::uint32_t task) {
  const ParamRecord& param = records_->params[e];
  const TensorRecord& grad = param[Role::kGrad];
  const bool is_recorded = grad.words >= 0 && param.free_since == overlaps_->generation() &&
                           grad.data == work_->grad_of(param.device, task);
  if (!is_recorded) return false;
  Entry entry = next_entry(e);
  entry.grad_words = grad.words;
  entry.task = task;
  entry.has_state = param.has_state;
  const auto learn = [&](Role role) {
    return learn_tensor(recogniser_->walked(e, role), role, &entry);
  };
  if (!param.roles.all_of(learn)) return false;
  entries_.push_back(entry);
  return true;
}

bool Repetition::learn_tensor(PyObject* tensor, Role role, Entry* entry) {
  const TensorRecord& record = records_->params[entry->e][role];
  if (record.words < 0) return false;
  if (is_dtensor(tensor)) {
    const Shard shard{tensor, torch.local_tensor.peek(tensor), is_elementwise(role)};
    if (shard.local == nullptr) return false;
    shards_.push_back(shard);
    ++entry->num_shards;
    tensor = shard.local;
  }
  tensors_.push_back({tensor, record.words});
  ++entry->num_tensors;
  return true;
}

bool Repetition::is_ready() {
  if (entries_.empty() || !torch.layout.knows_version()) return false;
  find_slots();
  found_gradients_ = found_gradients();
  return found_gradients_.of_plain && (!has_dtensors_ || found_gradients_.of_dtensors);
}

void Repetition::ask_for_gradients() {
  for (const Entry& entry : entries_) {
    held_.push_back(py::reinterpret_borrow<py::object>(entry.param));
  }
  for (const Entry& entry : entries_) {
    if (entry.grad_words >= 0) held_.push_back(found_gradients_.grad_of(entry.param));
  }
}

bool Repetition::hold_all() {
  for (const Entry& entry : entries_) {
    if (entry.grad_words < 0) continue;
    PyObject* const grad = object_of(gradient_impl(entry.param));
    if (grad == nullptr) return false;  // another one since they were asked for
    held_.push_back(py::reinterpret_borrow<py::object>(grad));
    if (entry.is_dtensor) {
      held_.push_back(py::reinterpret_borrow<py::object>(torch.local_tensor.peek(grad)));
    }
  }
  for (const Known& known : tensors_) {
    held_.push_back(py::reinterpret_borrow<py::object>(known.tensor));
  }
  for (const Shard& shard : shards_) {
    held_.push_back(py::reinterpret_borrow<py::object>(shard.tensor));
  }
  return true;
}

// As the Inspector does, each pass over a block waits for memory once.
bool Repetition::look(const py::dict& state) {
  if (!recogniser_->is_as_walked(state)) return false;
  const Entry* const end = entries_.data() + entries_.size();
  for (const Entry *begin = entries_.data(), *next; begin != end; begin = next) {
    next = begin + std::min<std::ptrdiff_t>(kBlock, end - begin);
    if (!look_at_tensors(begin, next) || !look_at_gradients(begin, next)) return false;
  }
  return true;
}

bool Repetition::look_at_tensors(const Entry* begin, const Entry* end) const {
  for (const Entry* entry = begin; entry != end; ++entry) {
    if (entry->has_state && !recogniser_->is_as_walked(entry->e)) return false;
  }
  const char* impls[kBlock * kNumRoles] = {};
  std::size_t num_shards = 0;
  for (const Entry* entry = begin; entry != end; ++entry) {
    for (std::uint32_t s = 0; s < entry->num_shards; ++s) {
      const Shard& shard = shards_[entry->shards + s];
      if (!is_same(shard, entry->e)) return false;
      impls[num_shards++] = impl_of(shard.tensor);
    }
  }
  fetch_versions(impls, num_shards);
  const Known* const first = tensors_.data() + begin->tensors;
  const std::size_t count = end[-1].tensors + end[-1].num_tensors - begin->tensors;
  for (std::size_t t = 0; t < count; ++t) {
    if (!is_plain_tensor(first[t].tensor)) return false;
    impls[t] = impl_of(first[t].tensor);
  }
  fetch_impls(impls, count);
  for (std::size_t t = 0; t < count; ++t) {
    if (!records_->is_same(first[t].words, impls[t])) return false;
  }
  return true;
}

bool Repetition::look_at_gradients(const Entry* begin, const Entry* end) {
  const char *impls[kBlock], *locals[kBlock];
  const auto count = static_cast<std::size_t>(end - begin);
  for (std::size_t i = 0; i < count; ++i) {
    PyObject* const param = begin[i].param;
    if (!(begin[i].is_dtensor ? is_dtensor(param) : is_plain_tensor(param))) return false;
    impls[i] = gradient_impl(param);
    if ((impls[i] != nullptr) != (begin[i].grad_words >= 0)) return false;
  }
  for (std::size_t i = 0; i < count; ++i) {
    locals[i] = impls[i];
    if (impls[i] == nullptr) continue;
    PyObject* grad = object_of(impls[i]);  // null: nobody in Python has seen it
    if (begin[i].is_dtensor) {
      if (grad == nullptr || !is_dtensor(grad)) return false;
      if (!recogniser_->has_known_spec(torch.spec.peek(grad), begin[i].e)) return false;
      grad = torch.local_tensor.peek(grad);
      if (grad == nullptr || !is_plain_tensor(grad)) return false;
      locals[i] = impl_of(grad);
    } else if (grad != nullptr && !is_plain_tensor(grad)) {
      return false;
    }
  }
  fetch_impls(locals, count);
  for (std::size_t i = 0; i < count; ++i) {
    if (locals[i] != nullptr && !has_same_gradient(begin[i], locals[i])) return false;
  }
  return true;
}

bool Repetition::is_same(const Shard& shard, std::size_t e) const {
  return is_dtensor(shard.tensor) && torch.local_tensor.peek(shard.tensor) == shard.local &&
         (!shard.is_placed || recogniser_->has_known_spec(torch.spec.peek(shard.tensor), e));
}

bool Repetition::has_same_gradient(const Entry& entry, const char* impl) {
  if (records_->is_same(entry.grad_words, impl)) return true;
  ParamRecord& param = records_->params[entry.e];
  if (!verification_->follow(&param, torch.layout, impl)) return false;
  work_->set_grad(param.device, entry.task, param[Role::kGrad].data);
  return true;
}

std::vector<GradToMeasure> Repetition::gradients() const {
  std::vector<GradToMeasure> found;
  found.reserve(entries_.size());
  for (const std::uint32_t i : in_order_) {
    const Entry& entry = entries_[i];
    if (entry.grad_words < 0) continue;
    const ParamRecord& param = records_->params[entry.e];
    found.push_back({param[Role::kGrad].data, param[Role::kGrad].dtype, param.numel});
  }
  return found;
}

void Repetition::bump_versions() const {
  for (const Known& known : tensors_) bump_version(impl_of(known.tensor));
  for (const Shard& shard : shards_) bump_version(impl_of(shard.tensor));
}

int Repetition::traverse(visitproc visit, void* arg) const {
  for (const py::object& held : held_) Py_VISIT(held.ptr());
  return 0;
}

}  // namespace fusedopt
