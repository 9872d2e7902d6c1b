#include "../multi_tensor/grad_norm.h"

#include <vector>

#include "../device/apply_gpu.h"
#include "../device/kernels.h"
#include "../multi_tensor/tensor_lists.h"
#include "device.h"
#include "module.h"
#include "torch.h"

namespace fusedopt {
namespace {

void measure(const std::vector<GradToMeasure>& grads, const GradNorm& norm, int device,
             int num_threads) {
  if (device != kCpu) {
    void* const stream = current_stream(device);
    const py::gil_scoped_release release;
    return grad_norm_gpu(grads, norm, device, stream);
  }
  const py::gil_scoped_release release;
  grad_norm_cpu(grads, norm, num_threads);
}

// Measures the norm of gradients on one device. `clip` is a float64 tensor there: what StepScaling
// reads, a zero for the kernel to count in, and room for sums. None if done; the size that `clip`
// must have if it is too small; False if this GPU refuses the kernel; or a list of the gradients
// that are no dense float tensors.
py::object grad_norm_of(const py::list& tensors, const py::object& clip,
                        const py::object& loss_scale, double max_norm, bool skip_nonfinite,
                        int num_threads) {
  constexpr std::int64_t kHeader = StepScaling::kNumClip + 1;
  TensorView space, scale;
  if (!view(clip.ptr(), &space) || space.dtype != Dtype::kFloat64) {
    throw py::value_error("clip must be a float64 tensor");
  }
  std::vector<GradToMeasure> grads;
  std::int64_t num_chunks = 0;
  py::list unusual;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    TensorView now;
    PyObject* const tensor = PyList_GET_ITEM(tensors.ptr(), i);
    if (!view(tensor, &now) || now.device != space.device || !is_flat(now)) {
      unusual.append(i);
      continue;
    }
    grads.push_back({now.data, now.dtype, numel(now)});
    num_chunks += grads.back().num_chunks();
  }
  if (!unusual.empty()) return std::move(unusual);
  if (num_chunks > 0x7FFFFFFF) throw py::value_error("too many gradients for one norm");
  if (numel(space) < kHeader + num_chunks) return py::int_(kHeader + num_chunks);

  GradNorm norm = {};
  norm.max_norm = max_norm;
  norm.skip_nonfinite = skip_nonfinite;
  norm.clip = static_cast<double*>(space.data);
  norm.ticket = reinterpret_cast<std::uint32_t*>(norm.clip + StepScaling::kNumClip);
  norm.partials = norm.clip + kHeader;
  norm.num_partials = static_cast<std::uint32_t>(num_chunks);
  if (!loss_scale.is_none()) {
    if (!view(loss_scale.ptr(), &scale) || scale.dtype != Dtype::kFloat32 ||
        scale.device != space.device) {
      throw py::value_error("loss_scale must be a float32 tensor on the device of the gradients");
    }
    norm.loss_scale = static_cast<const float*>(scale.data);
  }
  if (space.device != kCpu) {
    const DeviceKernel& kernel = grad_norm_kernel();
    if (kernel_state(kernel, space.device) == KernelState::kUnknown) {
      load_needed({{&kernel, space.device}}, "the first norm");
    }
    if (kernel_state(kernel, space.device) == KernelState::kRefused) return py::bool_(false);
  }
  measure(grads, norm, space.device, num_threads);
  return py::none();
}

}  // namespace

void export_grad_norm(py::module_& module) { module.def("grad_norm", &grad_norm_of); }

}  // namespace fusedopt
