#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <utility>

#include "apply.h"
#include "apply_cuda.h"
#include "launch_table.h"
#include "tuning.h"

#if !defined(FUSEDOPT_CUDA_ON_HOST)
#include <cuda_runtime.h>
#endif

namespace fusedopt {

namespace {

std::atomic<std::int64_t> launches{0};

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
                void* stream, std::uint32_t* tickets, const DeviceGuard& guard) {
  const int num_scalars = on_device ? kernel.num_scalars : 0;
  const bool needs_tickets =
      num_scalars != 0 || !kernel.is_plain;  // which may count what it rounds with
  TablePacker packer(kernel.num_slots + num_scalars, bytes);
  std::vector<std::int64_t> index(step.updates.size(), -1);  // of an update in the table, or -1
  LaunchTable table;
  const auto flush = [&] {
    if (packer.empty()) return;
    packer.pack(&table);
    table.scaling = step.scaling;
    table.on_device = on_device;
    table.tickets = needs_tickets ? tickets : nullptr;
    kernel.launch(table, stream);
    guard.launched();
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

void apply_cuda(const Step& step, int device, void* stream, std::uint32_t* tickets) {
  const DeviceGuard guard(device);
  // One launch, or more if there are several kernels among the updates, of which there may be one
  // for each tensor.
  std::vector<std::pair<const DeviceKernel*, bool>> launched;
  for (const PreparedUpdate& update : step.updates) {
    const std::pair<const DeviceKernel*, bool> kernel{update.device_kernel, update.on_device};
    if (std::find(launched.begin(), launched.end(), kernel) != launched.end()) continue;
    launched.push_back(kernel);
    launch_all(step, *update.device_kernel, update.on_device, update.num_bytes, stream, tickets,
               guard);
  }
}

std::int64_t num_launches() { return launches; }

#if defined(FUSEDOPT_CUDA_ON_HOST)

std::string cuda_problem(int) { return ""; }
bool is_capturing(void*) { return false; }
DeviceGuard::DeviceGuard(int device) : device_(device) {}
DeviceGuard::~DeviceGuard() = default;
void DeviceGuard::launched() const { ++launches; }

#else

namespace {

void check(cudaError_t error, const char* what, int device) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("fusedopt: ") + what + " on cuda:" + std::to_string(device) +
                           " failed: " + cudaGetErrorString(error));
}

std::string version(int number) {  // 13000 is 13.0
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// There to be asked about: every kernel of the module is built for the same architectures.
__global__ void probe_kernel() {}

}  // namespace

std::string cuda_problem(int device) {
  int driver = 0, major = 0, minor = 0;
  const cudaError_t has_driver = cudaDriverGetVersion(&driver);
  if (has_driver != cudaSuccess || driver / 1000 < CUDART_VERSION / 1000) {
    return "this driver knows CUDA " + version(driver) + ", fusedopt was built with CUDA " +
           version(CUDART_VERSION) + ": update the driver, or build with an older nvcc";
  }
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // it has been heard
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorUnsupportedPtxVersion &&
      error != cudaErrorInvalidDeviceFunction && error != cudaErrorInvalidKernelImage) {
    check(error, "loading the kernels", device);
  }
  const std::string arch = std::to_string(major) + std::to_string(minor);
  return "the kernels are built for " FUSEDOPT_CUDA_ARCHS ", cuda:" + std::to_string(device) +
         " is sm_" + arch + " (" + cudaGetErrorString(error) +
         "): build with FUSEDOPT_CUDA_ARCHS=" + arch;
}

bool is_capturing(void* stream) {
  if (stream == nullptr) return false;  // the legacy stream cannot be captured
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) != cudaSuccess) {
    cudaGetLastError();  // another stream's capture: the launch will tell
    return false;
  }
  return status != cudaStreamCaptureStatusNone;
}

DeviceGuard::DeviceGuard(int device) : device_(device) {
  check(cudaGetDevice(&previous_), "cudaGetDevice", device);
  if (previous_ != device) check(cudaSetDevice(device), "cudaSetDevice", device);
}

DeviceGuard::~DeviceGuard() {
  if (previous_ != device_ && previous_ >= 0) cudaSetDevice(previous_);
}

void DeviceGuard::launched() const {
  check(cudaGetLastError(), "a launch", device_);
  ++launches;
}

#endif

}  // namespace fusedopt
