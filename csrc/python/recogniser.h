#pragma once

// Which object of an optimizer is what: its parameters, the entries of its state and their tensors,
// found by the order in which they were when the plan was made.

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../plan/record.h"
#include "seen.h"
#include "torch.h"

namespace fusedopt {

// How the state names the tensors of a parameter.
struct StateNames {
  py::tuple states;                         // of kStates, in order
  py::tuple extras;                         // of kExtras; None where there is none
  const std::vector<std::string>& scalars;  // of kScalars, in order
};

class Recogniser {
 public:
  // `spec`: where the shards of a DTensor are; null for other tensors.
  void add(PyObject* param, py::object spec);
  PyObject* param(std::size_t e) const { return params_[e]; }

  // Learns the order of the keys in a state dict, which is a plain one.
  void learn(std::size_t e, PyObject* state, const StateNames& names);
  // Learns the order of the parameters in the optimizer's state. Those without state come last.
  void learn_order(const py::dict& state, const Records& records);

  // Calls see(entry, its state or null) for every parameter, until one is false. False also if the
  // state has not the order that was learned.
  template <typename See>
  bool for_each(const py::dict& state, See&& see) const {
    Py_ssize_t position = 0;
    PyObject *key, *value;
    std::size_t seen_states = 0;
    while (PyDict_Next(state.ptr(), &position, &key, &value)) {
      if (seen_states == state_order_.size()) return false;
      const std::int64_t e = state_order_[seen_states++];
      if (e < 0) continue;
      if (params_[static_cast<std::size_t>(e)] != key || !see(e, value)) return false;
    }
    if (seen_states != state_order_.size()) return false;
    for (const std::size_t e : stateless_) {
      if (!see(e, nullptr)) return false;
    }
    return true;
  }

  // Finds the tensors of its state. False if that has not the keys that were learned.
  bool find_tensors(Seen* seen);

  // Whether the state, and then that of a parameter, hold what they did when they were last walked.
  // These run no code of Python's.
  bool is_as_walked(const py::dict& state);
  bool is_as_walked(std::size_t e) const;
  // What was found there.
  PyObject* walked(std::size_t e, Role role) const {
    return role == Role::kParam ? params_[e]
                                : walked_[e].tensors[static_cast<std::size_t>(position(role))];
  }

  // Whether a DTensor has a spec that is known to be of the same elements as the parameter.
  bool has_known_spec(PyObject* spec, std::size_t e) const;

  // Whether the process holds the same elements of both: then shards can be updated one by one.
  bool is_placed_like(PyObject* tensor, std::size_t e) {
    return specs_[e] ? is_sharded_like(tensor, e) : is_plain_tensor(tensor);
  }

  int traverse(visitproc visit, void* arg) const;

 private:
  // Order and meaning of the keys in a state dict; nearly all parameters share one. A key without a
  // role has -1.
  struct Layout {
    std::vector<std::pair<py::object, int>> keys;
  };

  // What a state dict held when it was last walked.
  struct Walked {
    PyObject* state = nullptr;
    std::uint64_t version = 0;
    std::array<PyObject*, kNumRoles> tensors = {};
  };

  bool is_sharded_like(PyObject* tensor, std::size_t e);

  std::vector<PyObject*> params_;  // compared, and used only while its group's list holds it
  std::vector<py::object> specs_;
  // Other specs that were found to be the same sharding as that of the parameter, of late.
  static constexpr std::size_t kSpecs = 8;
  std::vector<std::vector<py::object>> same_specs_;
  std::vector<std::int32_t> layout_of_;  // a parameter's, or -1
  std::vector<Layout> layouts_;
  std::vector<Walked> walked_;  // by parameter
  std::uint64_t walked_version_ = 0;
  std::unordered_map<std::string, std::int32_t> layout_index_;
  std::vector<std::int64_t> state_order_;  // parameters in the order of the state, or -1
  std::vector<std::size_t> stateless_;     // the other parameters
};

// The state of a parameter, or null. The hash of a tensor is Python code.
PyObject* state_of(PyObject* param, const py::dict& state);

}  // namespace fusedopt
