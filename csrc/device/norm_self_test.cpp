#include "norm_self_test.h"

#include <vector>

#include "../multi_tensor/grad_norm.h"
#include "apply_gpu.h"
#include "trial.h"

namespace fusedopt {

namespace {

// The places of what GradNorm points at, and of gradients.
struct NormTrial {
  Trial trial;
  std::size_t clip, partials, ticket, loss_scale;
  std::vector<std::size_t> grads;
  std::vector<GradToMeasure> sizes;
  std::uint32_t num_partials = 0;

  NormTrial() {
    static constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16,
                                        Dtype::kFloat64};
    trial.add_zeros(1);
    for (const std::int64_t numel :
         {std::int64_t{1}, std::int64_t{13}, std::int64_t{2048 + 77}, kNormElements + 5}) {
      for (const Dtype dtype : kDtypes) {
        for (const int shift : {0, 1}) {
          if (numel > kNormElements && (dtype != Dtype::kFloat32 || shift != 0)) continue;
          grads.push_back(trial.add(dtype, numel, shift, "a gradient"));
          sizes.push_back({nullptr, dtype, numel});
          num_partials += static_cast<std::uint32_t>(sizes.back().num_chunks());
        }
      }
    }
    // Its squares leave the range of float: the chunk is summed again in double.
    grads.push_back(trial.add(Dtype::kFloat32, 64, 0, "a gradient"));
    sizes.push_back({nullptr, Dtype::kFloat32, 64});
    ++num_partials;
    trial.set(grads.back(), 1e30f);
    loss_scale = trial.add_zeros(sizeof(float));
    trial.set(loss_scale, 8.0f);
    clip = trial.add_zeros(StepScaling::kNumClip * sizeof(double), "the norm");
    ticket = trial.add_zeros(sizeof(std::uint32_t), "its ticket");
    partials = trial.add_zeros(num_partials * sizeof(double), "its sums");
  }

  GradNorm norm_at(std::byte* base) {
    GradNorm norm = {};
    norm.max_norm = 1.5;
    norm.skip_nonfinite = true;
    norm.loss_scale = reinterpret_cast<const float*>(base + loss_scale);
    norm.clip = reinterpret_cast<double*>(base + clip);
    norm.partials = reinterpret_cast<double*>(base + partials);
    norm.num_partials = num_partials;
    norm.ticket = reinterpret_cast<std::uint32_t*>(base + ticket);
    for (std::size_t g = 0; g < grads.size(); ++g) sizes[g].data = base + grads[g];
    return norm;
  }
};

}  // namespace

std::string norm_self_test(const Driver& driver, int device) {
  NormTrial test;
  std::vector<std::byte> found = test.trial.host();
  const TrialMemory memory(driver, found.size());
  memory.upload(found);
  const GradNorm on_gpu = test.norm_at(memory.begin());
  grad_norm_gpu(test.sizes, on_gpu, device, memory.stream());
  const GradNorm here = test.norm_at(test.trial.host().data());
  grad_norm_cpu(test.sizes, here, 1);
  memory.download(&found);
  return test.trial.difference(found, 0);
}

}  // namespace fusedopt
