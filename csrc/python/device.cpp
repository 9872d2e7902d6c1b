#include "device.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../device/gpu.h"
#include "../device/kernel_source.h"
#include "../device/kernels.h"
#include "../device/loader.h"
#include "../rules/sample_options.h"
#include "module.h"
#include "torch.h"

namespace fusedopt {

namespace {

py::handle tell, free_memory;  // see backend.py; never released

std::string make_room() {
  const py::gil_scoped_acquire acquire;
  try {
    free_memory();
    return "";
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;
    const std::string why = error.what();
    return why.substr(0, why.find('\n'));
  }
}

const DeviceKernel* find_kernel(const std::string& name) {
  for (const auto& kernels : {all_kernels(), stored_kernels()}) {
    for (const DeviceKernel* const kernel : kernels) {
      if (kernel->name == name) return kernel;
    }
  }
  return nullptr;
}

const DeviceKernel& kernel_named(const std::string& name) {
  if (const DeviceKernel* const kernel = find_kernel(name)) return *kernel;
  throw py::key_error("no kernel '" + name + "'");
}

}  // namespace

void load_needed(const NeededKernels& needed, const std::string& owner) {
  Streams streams;
  NeededKernels now;
  for (const auto& [kernel, device] : needed) {
    streams[device] = current_stream(device);
    if (!is_capturing(streams[device])) {
      now.insert(now.end(), {kernel, device});
      continue;
    }
    if (was_put_off(*kernel, device)) {
      put_off(*kernel, device);
      continue;
    }
    throw std::runtime_error(owner +
                             " loads kernels, which cannot be captured into a CUDA graph: " +
                             "run a step before the capture");
  }
  LoadReport report;
  {
    const py::gil_scoped_release release;
    report = load_kernels(now, streams, &make_room);
  }
  if (!report.slow.empty()) tell(false, report.slow);
  for (const std::string& refused : report.refused) tell(true, refused);
}

namespace {

// The library that brings NVRTC and the driver, or why there is none; what is told of kernels: whether
// it is a warning, and the text; and what frees memory that nobody uses.
void use_gpu(const std::string& library, const std::string& problem, const py::object& told,
             const py::object& frees) {
  self_test_setting();  // a bad FUSEDOPT_SELF_TEST is an error now, not at the first step
  tell = told.inc_ref();
  free_memory = frees.inc_ref();
  use_library(library, problem);
  forget_devices();
}

py::list kernels() {
  py::list names;
  for (const DeviceKernel* const kernel : all_kernels()) names.append(kernel->name);
  return names;
}

py::list options(const std::string& architecture, std::size_t argument_bytes) {
  py::list all;
  for (const std::string& option : kernel_options(architecture, argument_bytes)) all.append(option);
  return all;
}

// How many seconds it took to compile and to try out; and what was wrong, or nothing.
std::tuple<double, double, std::string> try_out_kernel(const std::string& name, int device) {
  const DeviceKernel& kernel = kernel_named(name);
  const py::gil_scoped_release release;
  const TrialReport report = try_out(kernel, device, &make_room);
  return {report.compile_seconds, report.trial_seconds, report.problem};
}

#if defined(FUSEDOPT_KERNELS_ON_HOST)

// What a driver that stands in for CUDA's calls to launch a kernel. Whether there is such a kernel.
int run_on_host(const char* name, const void* table) {
  const DeviceKernel* const kernel = find_kernel(name);
  if (kernel == nullptr) return 0;
  kernel->on_host(*static_cast<const LaunchTable*>(table));
  return 1;
}

#endif

}  // namespace

void export_device(py::module_& module) {
  module.attr("KERNEL_DEVICE") = kKernelsOnHost ? "cpu" : "cuda";
  module.def("use_gpu", &use_gpu);
  module.def("device_problem", &device_problem);
  module.def("describe_device", &describe_device);
  module.def("describe_cache", &describe_cache);
  module.def("num_launches", &num_launches);
  module.def("num_put_off_no_longer", &num_put_off_no_longer);
  module.def("kernels", &kernels);
  module.def("kernel_source",
             [](const std::string& name) { return kernel_source(kernel_named(name)); });
  module.def("kernel_options", &options);
  module.def("try_out", &try_out_kernel, py::arg("kernel"), py::arg("device"));
#if defined(FUSEDOPT_KERNELS_ON_HOST)
  module.attr("RUN_ON_HOST") = reinterpret_cast<std::uintptr_t>(&run_on_host);
#endif
}

}  // namespace fusedopt
