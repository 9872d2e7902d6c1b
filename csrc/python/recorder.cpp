#include "recorder.h"

#include "../multi_tensor/tensor_lists.h"
#include "portrait.h"

namespace fusedopt {

namespace {

// What the state must have, whatever its rule does with it.
Roles declared_extras(const StateNames& names) {
  Roles declared;
  for (const Role role : {Role::kMaster, Role::kRounding, Role::kEma}) {
    const auto e = static_cast<std::size_t>(position(role) - position(Role::kMaster));
    if (!names.extras[e].is_none()) declared.add(role);
  }
  return declared;
}

Roles needed_roles(const StateNames& names) {
  const auto num_states = static_cast<int>(names.states.size());
  const auto num_scalars = static_cast<int>(names.scalars.size());
  return declared_extras(names) | Roles::range(Role::kState, num_states) |
         Roles::range(Role::kStep, num_scalars);
}

}  // namespace

void Recorder::add(py::handle param, const py::object& state, const StateNames& names,
                   bool first_step) {
  GroupRecord& group = records_->groups.back();
  ParamRecord record;
  record.group = static_cast<std::uint32_t>(records_->groups.size() - 1);
  record.index = group.num_params++;
  record.first_step = first_step;
  record.needs_state = !declared_extras(names).empty();
  record.python = !add_param(param.ptr(), &record) || group.python;
  if (!state.is_none() && !add_state(state.ptr(), names, &record)) record.python = true;
  records_->params.push_back(record);
}

// False if the kernels cannot take the parameter.
bool Recorder::add_param(PyObject* param, ParamRecord* record) {
  TensorView now;
  const bool is_known = view(param, &now);
  record->is_shard = is_known && !is_plain_tensor(param);
  recogniser_->add(param, record->is_shard ? py::handle(param).attr("_spec") : py::object());
  if (!is_known) return false;
  records_->add_param(now, record);
  return devices_.count(now.device) != 0 && is_flat(now) && !has_negative_bit(param);
}

// False if the kernels cannot take the state.
bool Recorder::add_state(PyObject* state, const StateNames& names, ParamRecord* record) {
  if (!is_plain_dict(state) || record->ndim < 0) return false;

  Seen seen;
  seen.entry = records_->params.size();
  seen.state = state;
  recogniser_->learn(seen.entry, state, names);
  if (!recogniser_->find_tensors(&seen)) return false;
  for (int r = 0; r < kNumRoles; ++r) {
    const auto role = static_cast<Role>(r);
    if (seen[role] != nullptr && !add_tensor(seen[role], role, record)) return false;
  }
  record->stored = stored_as(*record);
  return record->has_state = is_complete(*record, needed_roles(names));
}

// False if the kernels cannot take it in this role.
bool Recorder::add_tensor(PyObject* tensor, Role role, ParamRecord* record) {
  TensorView now;
  if (!view_stored(tensor, &now) || has_negative_bit(tensor)) return false;
  if (is_elementwise(role) && !recogniser_->is_placed_like(tensor, records_->params.size())) {
    return false;
  }
  if (!verification_->can_take(*record, role, now)) return false;
  if (kScalars.has(role)) {
    const bool on_device = verification_->counts_on_device(*record, now);
    if (role == Role::kStep) record->device_step = on_device;
    if (on_device != record->device_step) return false;  // numbers of one tensor are in one place
  }
  record->add(role, now);
  return true;
}

void Recorder::finish(const py::dict& state) {
  std::vector<ParamRecord>& params = records_->params;
  std::unordered_map<PyObject*, std::size_t> entry_of;
  for (std::size_t e = 0; e < params.size(); ++e) {
    const auto [first, is_new] = entry_of.emplace(recogniser_->param(e), e);
    if (is_new) continue;  // else listed twice: updated twice, one after the other
    params[e].python = params[first->second].python = true;
    params[e].has_state = params[first->second].has_state = false;
  }
  recogniser_->learn_order(state, *records_);
  for (std::size_t e = 0; e < params.size(); ++e) {
    if (!params[e].python || records_->groups[params[e].group].python) continue;
    PyObject* const param = recogniser_->param(e);
    params[e].portrait = static_cast<std::int64_t>(records_->portraits.size());
    records_->portraits.push_back(portrait_of(param, state_of(param, state)));
  }
  overlaps_->list(records_);
  for (const std::size_t e : overlaps_->sharing(*records_)) {
    if (!params[e].python) params[e].python = params[e].for_memory = true;
  }
}

}  // namespace fusedopt
