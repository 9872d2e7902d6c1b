#include "device_kernel.h"

#include <cstdio>
#include <map>
#include <mutex>
#include <utility>

#if defined(FUSEDOPT_KERNELS_ON_HOST)
#include "grad_norm_on_host.h"
#endif

namespace fusedopt {

DeviceKernel::DeviceKernel(std::string name, const std::string& header, const std::string& call,
                           int min_blocks)
    : name(std::move(name)) {
  program = header +
            "extern \"C\" __global__ void\n"
            "__launch_bounds__(fusedopt::kBlockThreads, " +
            std::to_string(min_blocks) + ")\n" + this->name +
            "(const __grid_constant__ fusedopt::LaunchTable table) {\n  " + call + "(table);\n}\n";
}

namespace {

struct StoredKernels {
  std::mutex mutex;
  std::map<std::pair<const DeviceKernel*, std::uint32_t>, DeviceKernel> kernels;
};

StoredKernels& made() {
  static StoredKernels* const made = new StoredKernels;  // threads may outlive the statics
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

const DeviceKernel& stored_kernel(
    const DeviceKernel& plain, const SlotDtypes& dtypes,
    const std::function<DeviceKernel(const std::string& suffix)>& make) {
  const std::pair key(&plain, dtypes.key());
  const std::lock_guard<std::mutex> lock(made().mutex);
  const auto found = made().kernels.find(key);
  if (found != made().kernels.end()) return found->second;
  char digits[16];
  std::snprintf(digits, sizeof(digits), "%06x", static_cast<unsigned>(key.second));
  DeviceKernel kernel = make("_stored_" + std::string(digits));
  kernel.program = "#define FUSEDOPT_STORED " + in_braces(dtypes) + "\n" + kernel.program;
  kernel.stored = dtypes;
  kernel.plain = &plain;
  return made().kernels.emplace(key, std::move(kernel)).first->second;
}

std::vector<const DeviceKernel*> stored_kernels() {
  const std::lock_guard<std::mutex> lock(made().mutex);
  std::vector<const DeviceKernel*> all;
  for (const auto& [key, kernel] : made().kernels) all.push_back(&kernel);
  return all;
}

const DeviceKernel& grad_norm_kernel() {
  static const DeviceKernel kernel = [] {
    DeviceKernel made("fusedopt_grad_norm", "#include \"multi_tensor/grad_norm_on_device.h\"\n",
                      "fusedopt::grad_norm_on_device", kMinBlocks);
#if defined(FUSEDOPT_KERNELS_ON_HOST)
    made.on_host = grad_norm_on_host;
#endif
    return made;
  }();
  return kernel;
}

}  // namespace fusedopt
