#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "../plan/record.h"

namespace fusedopt {

// The bytes of a tensor of any kind, as far as they can be told; and to the portrait, which may be
// null, what decides whether the kernels can take it.
void add_memory_of(PyObject* tensor, std::vector<MemoryRange>* memory, Portrait* portrait);

// `state` may be null.
Portrait portrait_of(PyObject* param, PyObject* state);

}  // namespace fusedopt
