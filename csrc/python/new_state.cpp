#include "new_state.h"

#include <optional>

#include "torch.h"

namespace fusedopt {

namespace py = pybind11;

// Tensors hash with Python code, during which an interrupt may come or another thread run; a merge
// of dicts uses the hashes that they know.
py::dict with_created(const py::dict& state, const py::object& created) {
  if (created.is_none()) return state;
  auto all = py::reinterpret_steal<py::dict>(PyDict_Copy(state.ptr()));
  if (!all || PyDict_Update(all.ptr(), created.ptr()) != 0) throw py::error_already_set();
  return all;
}

namespace {

void replace(const py::dict& dict, const py::dict& entries) {
  PyDict_Clear(dict.ptr());
  if (PyDict_Update(dict.ptr(), entries.ptr()) != 0) throw py::error_already_set();
}

}  // namespace

NewState::NewState(const py::object& created, const py::object& owner) {
  if (created.is_none() || owner.is_none()) return;
  owner_ = owner;
  for (const auto& [param, entries] : py::cast<py::dict>(created)) {
    PyObject* const existing = item_of(owner.ptr(), param.ptr());
    if (existing == nullptr) {
      added_[param] = entries;
    } else {
      auto before = py::reinterpret_steal<py::dict>(PyDict_Copy(existing));
      if (!before) throw py::error_already_set();
      changed_.push_back({py::reinterpret_borrow<py::dict>(existing),
                          py::reinterpret_borrow<py::dict>(entries), std::move(before)});
    }
  }
}

void NewState::commit() const {
  if (!owner_) return;
  if (PyDict_Update(owner_.ptr(), added_.ptr()) != 0) throw py::error_already_set();
  for (const Changed& changed : changed_) replace(changed.existing, changed.entries);
}

void NewState::take_back() const {
  if (!owner_) return;
  for (const Changed& changed : changed_) replace(changed.existing, changed.before);
  // To find a parameter is Python code, in which an interrupt may arrive: it is raised afterwards.
  std::optional<py::error_already_set> arrived;
  for (const auto& [param, entries] : added_) {
    while (PyDict_DelItem(owner_.ptr(), param.ptr()) != 0) {
      py::error_already_set error;
      if (error.matches(PyExc_KeyError)) break;  // another thread has taken it away
      if (arrived) throw error;
      arrived.emplace(std::move(error));
    }
  }
  if (arrived) throw *arrived;
}

}  // namespace fusedopt
