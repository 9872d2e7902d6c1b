#include "grad_norm.h"

#include <unordered_map>
#include <utility>
#include <vector>

#include "../device/apply_gpu.h"
#include "../device/kernels.h"
#include "../multi_tensor/tensor_lists.h"
#include "device.h"
#include "module.h"
#include "torch.h"

namespace fusedopt {

GradNorm norm_into(const TensorView& clip, std::int64_t num_chunks, double max_norm) {
  GradNorm norm = {};
  norm.max_norm = max_norm;
  norm.clip = static_cast<double*>(clip.data);
  norm.ticket = reinterpret_cast<std::uint32_t*>(norm.clip + StepScaling::kNumClip);
  norm.partials = norm.clip + kClipHeader;
  norm.num_partials = static_cast<std::uint32_t>(num_chunks);
  return norm;
}

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

// Which DTensors are sharded alike. Asks the spec of each once; a spec is held, so that no other
// one takes its place.
class Shardings {
 public:
  std::size_t find(const py::object& spec) {
    const auto known = number_of_.find(spec.ptr());
    if (known != number_of_.end()) return known->second;
    std::size_t number = 0;
    while (number < specs_.size() && !is_same_sharding(spec, specs_[number])) ++number;
    if (number == specs_.size()) specs_.push_back(spec);
    number_of_.emplace(spec.ptr(), number);
    held_.push_back(spec);
    return number;
  }
  const py::object& spec(std::size_t number) const { return specs_[number]; }
  // Forgets all, if these are more than `most`: gradients may have other specs in each step.
  void limit(std::size_t most) {
    if (held_.size() <= most) return;
    number_of_.clear();
    const auto held = std::exchange(held_, {}), specs = std::exchange(specs_, {});
  }

 private:
  std::unordered_map<PyObject*, std::size_t> number_of_;
  std::vector<py::object> held_, specs_;
};

bool is_sum(const py::object& spec) {
  for (const py::handle placement : spec.attr("placements")) {
    if (placement.attr("is_partial")().cast<bool>()) return true;
  }
  return false;
}

// The gradients that the parameters have, if all of both are plain tensors or DTensors, which are
// no sums: [(spec, what this process holds)], by sharding, without a spec for the plain ones. Those
// of the parameters come first, in their order, whether they have gradients or not. Else None.
py::object ordinary_gradients(const py::list& params, Shardings* shardings) {
  find_slots();
  const FoundGradients finds = found_gradients();
  shardings->limit(4 * params.size() + 64);
  py::list found;
  std::vector<py::list> held;
  std::vector<int> place_of;  // in `found`, by the number of the sharding plus one
  const auto place = [&](PyObject* tensor) {
    const std::size_t at = is_plain_tensor(tensor) ? 0 : shardings->find(torch.spec.of(tensor)) + 1;
    if (at >= place_of.size()) place_of.resize(at + 1, -1);
    if (place_of[at] < 0) {
      const py::object spec = at == 0 ? py::object(py::none()) : shardings->spec(at - 1);
      if (at != 0 && is_sum(spec)) return -1;
      place_of[at] = static_cast<int>(held.size());
      held.emplace_back();
      found.append(py::make_tuple(spec, held.back()));
    }
    return place_of[at];
  };
  const auto is_ordinary = [](PyObject* tensor) {
    return is_plain_tensor(tensor) || is_dtensor(tensor);
  };
  for (const py::handle param : params) {
    if (!is_ordinary(param.ptr()) || place(param.ptr()) < 0) return py::none();
  }
  for (const py::handle param : params) {
    const py::object grad = finds.grad_of(param.ptr());
    if (grad.is_none()) continue;
    if (!is_ordinary(grad.ptr()) || is_dtensor(grad.ptr()) != is_dtensor(param.ptr())) {
      return py::none();
    }
    const int at = place(grad.ptr());
    PyObject* const local = local_of(grad.ptr());
    if (at < 0 || !is_plain_tensor(local)) return py::none();
    held[static_cast<std::size_t>(at)].append(py::handle(local));
  }
  return std::move(found);
}

// Measures the norm of gradients on one device. `clip` is a float64 tensor there: what StepScaling
// reads, a zero for the kernel to count in, and room for sums. None if done; the size that `clip`
// must have if it is too small; False if there is nothing to measure or this GPU refuses the kernel;
// or a list of the gradients that are no dense float tensors.
py::object grad_norm_of(const py::list& tensors, const py::object& clip,
                        const py::object& loss_scale, double max_norm, bool skip_nonfinite,
                        int num_threads) {
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
  if (num_chunks == 0) return py::bool_(false);
  if (num_chunks > 0x7FFFFFFF) throw py::value_error("too many gradients for one norm");
  if (numel(space) < kClipHeader + num_chunks) return py::int_(kClipHeader + num_chunks);

  GradNorm norm = norm_into(space, num_chunks, max_norm);
  norm.skip_nonfinite = skip_nonfinite;
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
    if (kernel_state(kernel, space.device) != KernelState::kReady) return py::bool_(false);
  }
  measure(grads, norm, space.device, num_threads);
  return py::none();
}

}  // namespace

void export_grad_norm(py::module_& module) {
  py::class_<Shardings>(module, "Shardings", py::module_local()).def(py::init<>());
  module.def("ordinary_gradients", &ordinary_gradients);
  module.def("grad_norm", &grad_norm_of);
}

}  // namespace fusedopt
