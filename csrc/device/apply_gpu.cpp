#include "apply_gpu.h"

#include <algorithm>
#include <utility>

#include "../multi_tensor/device_kernel.h"
#include "../multi_tensor/table_packer.h"
#include "../multi_tensor/tuning.h"
#include "gpu.h"

namespace fusedopt {

namespace {

bool is_aligned(const TensorTask& task, const SlotDtypes& dtypes, std::size_t elements) {
  for (int s = 0; s < dtypes.num_slots; ++s) {
    const auto address = reinterpret_cast<std::uintptr_t>(task.slots[s]);
    const std::size_t bytes = elements * itemsize(dtypes.slots[s]);
    if (address % (bytes < 16 ? bytes : 16) != 0) return false;
  }
  return true;
}

Access access_of(const TensorTask& task, const SlotDtypes& dtypes, void* const* pointers) {
  if (!dtypes.is_plain()) {
    bool aligned = is_aligned(task, dtypes, 8);
    for (const int extra : {int{kMaster}, int{kEma}}) {
      const auto address = reinterpret_cast<std::uintptr_t>(pointers[extra]);
      aligned &= address % 16 == 0;
    }
    return aligned ? Access::kVectors : Access::kUnaligned;
  }
  if (dtypes.all(dtypes.slots[0])) {
    const bool aligned = is_aligned(task, dtypes, 16 / itemsize(dtypes.slots[0]));
    return aligned ? Access::kVectors : Access::kUnaligned;
  }
  return is_aligned(task, dtypes, 4) ? Access::kMixed : Access::kUnaligned;
}

// Launches the tensors of the step that get `kernel`, with coefficients that are prepared here or on
// the device; as many per launch as one table holds.
void launch_all(const Step& step, const DeviceKernel& kernel, bool on_device, std::size_t bytes,
                std::uint32_t* tickets, const Gpu& gpu, int* num_launches) {
  const int num_scalars = on_device ? kernel.num_scalars : 0;
  const bool needs_tickets =
      num_scalars != 0 || !kernel.is_plain();  // which may count what it rounds with
  TablePacker packer(kernel.num_slots + num_scalars, bytes, gpu.table_bytes());
  std::vector<std::int64_t> index(step.updates.size(), -1);  // of an update in the table, or -1
  LaunchTable table;
  const auto flush = [&] {
    if (packer.empty()) return;
    packer.pack(&table);
    table.scaling = step.scaling;
    table.on_device = on_device;
    table.tickets = needs_tickets ? tickets : nullptr;
    gpu.launch(kernel, table);
    ++*num_launches;
    index.assign(index.size(), -1);
  };
  for (const TensorTask& task : step.tasks) {
    const PreparedUpdate& update = step.updates[task.update];
    if (update.device_kernel != &kernel || update.on_device != on_device) continue;
    // A tensor without elements has its step counted all the same.
    std::int64_t chunks = (task.numel + kBlockElements - 1) / kBlockElements;
    if (chunks == 0 && needs_tickets) chunks = 1;
    if (chunks == 0) continue;
    TableTensor tensor;
    tensor.numel = task.numel;
    tensor.num_chunks = static_cast<std::uint32_t>(chunks);
    void* const* const pointers = step.pointers(task);
    for (int p = 0; p < kernel.num_slots; ++p) tensor.pointers[p] = pointers[p];
    tensor.pointers[kernel.num_slots] = task.step;
    tensor.pointers[kernel.num_slots + 1] = task.second;
    if (!packer.fits(tensor.num_chunks, index[task.update] < 0)) flush();
    if (index[task.update] < 0) index[task.update] = packer.add_update(update.coefficients);
    tensor.info = TensorInfo::pack(static_cast<std::uint32_t>(index[task.update]),
                                   access_of(task, update.stored.dtypes, pointers),
                                   update.stored.dtypes, task.first_step);
    packer.add(tensor);
  }
  flush();
}

}  // namespace

void apply_gpu(const Step& step, int device, void* stream, std::uint32_t* tickets,
               int* num_launches) {
  const Gpu gpu(device, stream);
  // One launch, or more if there are several kernels among the updates, of which there may be one
  // for each tensor.
  std::vector<std::pair<const DeviceKernel*, bool>> launched;
  for (const PreparedUpdate& update : step.updates) {
    const std::pair<const DeviceKernel*, bool> kernel{update.device_kernel, update.on_device};
    if (std::find(launched.begin(), launched.end(), kernel) != launched.end()) continue;
    launched.push_back(kernel);
    launch_all(step, *update.device_kernel, update.on_device, update.num_bytes, tickets, gpu,
               num_launches);
  }
}

void grad_norm_gpu(const std::vector<GradToMeasure>& grads, GradNorm norm, int device,
                   void* stream) {
  const Gpu gpu(device, stream);
  TablePacker packer(1, sizeof(GradNorm), gpu.table_bytes());
  LaunchTable table;
  norm.first_partial = 0;
  const auto flush = [&] {
    if (packer.empty()) return;
    packer.add_update(&norm);
    packer.pack(&table);
    try {
      gpu.launch(grad_norm_kernel(), table);
    } catch (...) {
      gpu.try_to_zero(norm.ticket);  // the launches before this one have counted
      throw;
    }
    norm.first_partial += table.num_chunks;
  };
  for (const GradToMeasure& grad : grads) {
    if (grad.numel == 0) continue;
    TableTensor tensor;
    tensor.pointers[0] = grad.data;
    tensor.numel = grad.numel;
    tensor.num_chunks = static_cast<std::uint32_t>(grad.num_chunks());
    const bool aligned = reinterpret_cast<std::uintptr_t>(grad.data) % 16 == 0;
    SlotDtypes dtypes;
    dtypes.slots[dtypes.num_slots++] = grad.dtype;
    tensor.info =
        TensorInfo::pack(0, aligned ? Access::kVectors : Access::kUnaligned, dtypes, false);
    if (!packer.fits(tensor.num_chunks, true)) flush();
    packer.add(tensor);
  }
  flush();
}

}  // namespace fusedopt
