#pragma once

// The subjects of the module, each exported by the file that has it.

#include <pybind11/pybind11.h>

namespace fusedopt {

void export_torch(pybind11::module_& module);
void export_layout(pybind11::module_& module);
void export_grad_norm(pybind11::module_& module);
void export_plan(pybind11::module_& module);
void export_rules(pybind11::module_& module);
void export_device(pybind11::module_& module);

}  // namespace fusedopt
