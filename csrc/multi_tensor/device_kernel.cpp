#include "device_kernel.h"

#include <cstdio>
#include <utility>

#if defined(FUSEDOPT_KERNELS_ON_HOST)
#include "grad_norm_on_host.h"
#endif

namespace fusedopt {

DeviceKernel::DeviceKernel(std::string name, const std::string& header, const std::string& call)
    : name(std::move(name)) {
  program = header +
            "extern \"C\" __global__ void\n"
            "__launch_bounds__(fusedopt::kBlockThreads, fusedopt::kMinBlocks)\n" +
            this->name + "(const __grid_constant__ fusedopt::LaunchTable table) {\n  " + call +
            "(table);\n}\n";
}

namespace {

struct Made {
  std::mutex mutex;
  std::vector<const DeviceKernel*> kernels;
};

Made& made() {
  static Made* const made = new Made;  // threads may outlive the statics
  return *made;
}

// As FUSEDOPT_STORED in stored_kernel.h.
std::string in_braces(const SlotDtypes& dtypes) {
  const auto in_words = [](Dtype dtype) {
    return "fusedopt::Dtype(" + std::to_string(static_cast<int>(dtype)) + ")";
  };
  std::string text = "{{";
  for (const Dtype slot : dtypes.slots) text += in_words(slot) + ", ";
  text += "}, " + std::to_string(dtypes.num_slots) + ", " + in_words(dtypes.master) + ", " +
          in_words(dtypes.ema) + ", " + (dtypes.stochastic ? "true" : "false") + "}";
  return text;
}

}  // namespace

const DeviceKernel& StoredKernels::get(
    const SlotDtypes& dtypes, const std::function<DeviceKernel(const std::string& suffix)>& make) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = kernels_.find(dtypes.key());
  if (found != kernels_.end()) return found->second;
  char key[16];
  std::snprintf(key, sizeof(key), "%06x", static_cast<unsigned>(dtypes.key()));
  DeviceKernel kernel = make("_stored_" + std::string(key));
  kernel.program = "#define FUSEDOPT_STORED " + in_braces(dtypes) + "\n" + kernel.program;
  kernel.stored = dtypes;
  const DeviceKernel& kept = kernels_.emplace(dtypes.key(), std::move(kernel)).first->second;
  const std::lock_guard<std::mutex> of_all(made().mutex);
  made().kernels.push_back(&kept);
  return kept;
}

std::vector<const DeviceKernel*> stored_kernels() {
  const std::lock_guard<std::mutex> lock(made().mutex);
  return made().kernels;
}

const DeviceKernel& grad_norm_kernel() {
  static const DeviceKernel kernel = [] {
    DeviceKernel made("fusedopt_grad_norm", "#include \"multi_tensor/grad_norm_on_device.h\"\n",
                      "fusedopt::grad_norm_on_device");
#if defined(FUSEDOPT_KERNELS_ON_HOST)
    made.on_host = grad_norm_on_host;
#endif
    return made;
  }();
  return kernel;
}

}  // namespace fusedopt
