#include <string>

#include "../device/kernel_source.h"
#include "../rules/sample_options.h"
#include "module.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

const DeviceKernel& kernel_named(const std::string& name) {
  for (const DeviceKernel* const kernel : all_kernels()) {
    if (kernel->name == name) return *kernel;
  }
  throw py::key_error("no kernel '" + name + "'");
}

}  // namespace

void export_device(py::module_& module) {
  module.def("kernels", [] {
    py::list names;
    for (const DeviceKernel* const kernel : all_kernels()) names.append(kernel->name);
    return names;
  });
  module.def("kernel_source",
             [](const std::string& name) { return kernel_source(kernel_named(name)); });
  module.def("kernel_options", [](const std::string& architecture, std::size_t argument_bytes) {
    py::list options;
    for (const std::string& option : kernel_options(architecture, argument_bytes)) {
      options.append(option);
    }
    return options;
  });
}

}  // namespace fusedopt
