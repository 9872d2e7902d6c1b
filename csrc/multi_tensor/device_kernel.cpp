#include "device_kernel.h"

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
