#include "recogniser.h"

namespace fusedopt {

namespace {

// Two strings may be equal: what was unpickled has keys of its own.
bool is_same_name(PyObject* one, PyObject* other) {
  return PyUnicode_CheckExact(one) && PyUnicode_CheckExact(other) &&
         PyUnicode_Compare(one, other) == 0;
}

// The number of its role, or -1.
int role_of(const py::object& name, const StateNames& names) {
  int role = -1;
  for (std::size_t s = 0; s < names.states.size(); ++s) {
    if (name.equal(names.states[s])) role = position(state(static_cast<int>(s)));
  }
  for (std::size_t e = 0; e < names.extras.size(); ++e) {
    const bool is_extra = !name.is_none() && name.equal(names.extras[e]);
    if (is_extra) role = position(extra(static_cast<int>(e)));
  }
  for (std::size_t s = 0; s < names.scalars.size(); ++s) {
    if (name.equal(py::str(names.scalars[s]))) role = position(scalar(static_cast<int>(s)));
  }
  return role;
}

}  // namespace

void Recogniser::add(PyObject* param, py::object spec) {
  params_.push_back(param);
  specs_.push_back(std::move(spec));
  layout_of_.push_back(-1);
  walked_.emplace_back();
  same_specs_.emplace_back();
}

void Recogniser::learn(std::size_t e, PyObject* state, const StateNames& names) {
  Layout layout;
  std::string index;  // keys that are equal have one layout, also if each dict has its own
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(state, &position, &key, &value)) {
    const auto name = py::reinterpret_borrow<py::object>(key);
    const int role = role_of(name, names);
    layout.keys.emplace_back(name, role);
    const auto address = std::to_string(reinterpret_cast<std::uintptr_t>(key));
    index += PyUnicode_CheckExact(key) ? py::cast<std::string>(py::repr(name)) : address;
    index += '=' + std::to_string(role) + ' ';
  }
  const auto next = static_cast<std::int32_t>(layouts_.size());
  const auto [found, is_new] = layout_index_.emplace(index, next);
  if (is_new) layouts_.push_back(std::move(layout));
  layout_of_[e] = found->second;
}

void Recogniser::learn_order(const py::dict& state, const Records& records) {
  std::unordered_map<PyObject*, std::size_t> entry_of;
  for (std::size_t e = 0; e < params_.size(); ++e) entry_of.emplace(params_[e], e);
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(state.ptr(), &position, &key, &value)) {
    const auto found = entry_of.find(key);
    const bool known = found != entry_of.end() && records.params[found->second].has_state;
    state_order_.push_back(known ? static_cast<std::int64_t>(found->second) : -1);
  }
  for (std::size_t e = 0; e < params_.size(); ++e) {
    if (!records.params[e].has_state) stateless_.push_back(e);
  }
}

bool Recogniser::find_tensors(Seen* seen) {
  if (!is_plain_dict(seen->state)) return false;
  Walked& walked = walked_[seen->entry];
  const std::uint64_t version = version_of(seen->state);
  PyObject* const param = (*seen)[Role::kParam];
  if (walked.state == seen->state && walked.version == version && version != 0) {
    seen->tensors = walked.tensors;
    (*seen)[Role::kParam] = param;
    return true;
  }
  const auto& keys = layouts_[static_cast<std::size_t>(layout_of_[seen->entry])].keys;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (const auto& [name, role] : keys) {
    if (!PyDict_Next(seen->state, &position, &key, &value)) return false;
    if (key != name.ptr() && !is_same_name(key, name.ptr())) return false;
    if (role >= 0) seen->tensors[static_cast<std::size_t>(role)] = value;
  }
  if (PyDict_Next(seen->state, &position, &key, &value)) return false;
  walked = {seen->state, version, seen->tensors};
  walked_version_ = 0;  // that of the whole may have been of other ones
  return true;
}

bool Recogniser::is_as_walked(const py::dict& state) {
  const std::uint64_t version = version_of(state.ptr());
  if (version != 0 && version == walked_version_) return true;
  walked_version_ = 0;
  const auto is_same = [&](std::size_t e, PyObject* now) { return walked_[e].state == now; };
  if (!for_each(state, is_same)) return false;
  walked_version_ = version;
  return true;
}

bool Recogniser::is_as_walked(std::size_t e) const {
  const Walked& walked = walked_[e];
  if (walked.version != 0) return walked.version == version_of(walked.state);
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (const auto& [name, role] : layouts_[static_cast<std::size_t>(layout_of_[e])].keys) {
    if (!PyDict_Next(walked.state, &position, &key, &value) || key != name.ptr()) return false;
    if (role >= 0 && walked.tensors[static_cast<std::size_t>(role)] != value) return false;
  }
  return !PyDict_Next(walked.state, &position, &key, &value);
}

bool Recogniser::has_known_spec(PyObject* spec, std::size_t e) const {
  if (spec == nullptr) return false;
  if (spec == specs_[e].ptr()) return true;
  for (const py::object& same : same_specs_[e]) {
    if (spec == same.ptr()) return true;
  }
  return false;
}

bool Recogniser::is_sharded_like(PyObject* tensor, std::size_t e) {
  if (is_plain_tensor(tensor)) return false;
  py::object spec = torch.spec.of(tensor);
  if (spec.is(specs_[e])) return true;
  std::vector<py::object>& known = same_specs_[e];
  for (const py::object& same : known) {
    if (spec.is(same)) return true;
  }
  if (!is_same_sharding(spec, specs_[e])) return false;
  if (known.size() == kSpecs) known.erase(known.begin());
  known.push_back(std::move(spec));
  return true;
}

int Recogniser::traverse(visitproc visit, void* arg) const {
  for (const Layout& layout : layouts_) {
    for (const auto& [name, role] : layout.keys) Py_VISIT(name.ptr());
  }
  for (const py::object& spec : specs_) Py_VISIT(spec.ptr());
  for (const auto& specs : same_specs_) {
    for (const py::object& spec : specs) Py_VISIT(spec.ptr());
  }
  return 0;
}

PyObject* state_of(PyObject* param, const py::dict& state) { return item_of(state.ptr(), param); }

}  // namespace fusedopt
