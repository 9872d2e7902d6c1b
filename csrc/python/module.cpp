#include "module.h"

#include <string>

#include "../multi_tensor/apply.h"
#include "../multi_tensor/launch_table.h"
#include "../multi_tensor/memory_floor.h"
#include "../multi_tensor/tensor_lists.h"
#include "torch.h"

namespace fusedopt {
namespace {

std::string describe() {
  std::string text = std::string("cpu, ") + name(cpu_isa());
#if defined(_OPENMP)
  text += ", OpenMP";
#else
  text += ", one thread: built without OpenMP";
#endif
  return text;
}

// A plain in-place loop with the memory traffic of a step, for benchmarks.
void memory_floor_of(const py::list& reads, const py::list& writes, int num_threads) {
  std::vector<void*> arrays;
  std::int64_t bytes = -1;
  for (const py::list& tensors : {writes, reads}) {
    for (const py::handle tensor : tensors) {
      TensorView now;
      if (!view(tensor.ptr(), &now) || !is_flat(now)) {
        throw py::value_error("memory_floor takes contiguous float tensors on the CPU");
      }
      const auto size = static_cast<std::int64_t>(itemsize(now.dtype)) * numel(now);
      if (bytes >= 0 && size != bytes) throw py::value_error("memory_floor: sizes differ");
      bytes = size;
      arrays.push_back(now.data);
    }
  }
  py::gil_scoped_release release;
  memory_floor(arrays.data(), static_cast<int>(writes.size()), static_cast<int>(reads.size()),
               bytes, num_threads);
}

}  // namespace

PYBIND11_MODULE(FUSEDOPT_MODULE_NAME, module) {
  export_torch(module);
  export_layout(module);
  export_grad_norm(module);
  export_plan(module);
  export_rules(module);
  export_device(module);
  module.def("describe", &describe);
  module.attr("NUM_TICKETS") = kMaxTableTensors;
  module.def("memory_floor", &memory_floor_of, py::arg("reads"), py::arg("writes"),
             py::arg("num_threads"));
}

}  // namespace fusedopt
