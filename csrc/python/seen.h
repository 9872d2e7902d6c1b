#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>

#include "../plan/role.h"

namespace fusedopt {

// The objects of one parameter in one step; borrowed from the group's list and the optimizer's state.
struct Seen {
  std::size_t entry = 0;  // which parameter
  PyObject* state = nullptr;
  std::array<PyObject*, kNumRoles> tensors = {};
  bool is_copy = false;    // the gradient, made for this step
  bool in_python = false;  // its step is

  PyObject*& operator[](Role role) { return tensors[static_cast<std::size_t>(position(role))]; }
  PyObject* operator[](Role role) const {
    return tensors[static_cast<std::size_t>(position(role))];
  }
};

}  // namespace fusedopt
