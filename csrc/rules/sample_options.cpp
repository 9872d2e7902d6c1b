#include "sample_options.h"

#include <algorithm>
#include <string>

namespace fusedopt {

namespace {

// Answers what is a switch, or off where it is zero, by the bits of a number: in the order in which
// they are asked.
class SampleOptions final : public OptionReader {
 public:
  explicit SampleOptions(unsigned bits) : bits_(bits) {}

  double operator()(const char*) const override { return next() ? 0.7 / (1 + asked_) : 0.0; }
  double get(const char* name, double) const override { return (*this)(name); }
  bool flag(const char*) const override { return next(); }
  bool flag(const char*, bool) const override { return next(); }
  Number number(const char*) const override { return {0.01}; }
  Number number(const char*, int item) const override { return {item == 0 ? 0.9 : 0.99}; }

  int num_asked() const { return asked_; }

 private:
  bool next() const { return (bits_ >> asked_++ & 1u) != 0; }

  const unsigned bits_;
  mutable int asked_ = 0;
};

}  // namespace

std::vector<std::unique_ptr<GroupRule>> sample_rules(const RuleEntry& rule) {
  std::vector<std::unique_ptr<GroupRule>> samples;
  unsigned choices = 1;
  for (unsigned bits = 0; bits < choices; ++bits) {
    const SampleOptions options(bits);
    samples.push_back(rule.read(options));
    choices = 1u << options.num_asked();
  }
  return samples;
}

SlotDtypes plain_dtypes(unsigned state_mask, Dtype dtype) {
  SlotDtypes dtypes;
  dtypes.num_slots = 2;
  for (; state_mask != 0; state_mask &= state_mask - 1) ++dtypes.num_slots;
  std::fill(dtypes.slots, dtypes.slots + dtypes.num_slots, dtype);
  return dtypes;
}

namespace {

// One combination that is not plain: a split master, and states in codes.
SlotDtypes stored_dtypes(const RuleEntry& rule, unsigned state_mask) {
  SlotDtypes dtypes = plain_dtypes(state_mask, Dtype::kBFloat16);
  dtypes.master = Dtype::kInt16;
  int slot = 2;
  for (std::size_t s = 0; s < rule.slots.size(); ++s) {
    if ((state_mask >> s & 1u) == 0) continue;
    dtypes.slots[slot++] = rule.slots[s].is_unsigned ? Dtype::kUInt8 : Dtype::kInt8;
  }
  return dtypes;
}

}  // namespace

const std::vector<const DeviceKernel*>& all_kernels() {
  static const std::vector<const DeviceKernel*> kernels = [] {
    std::vector<const DeviceKernel*> found;
    for (const RuleEntry& entry : all_rules()) {
      for (const auto& rule : sample_rules(entry)) {
        const unsigned mask = rule->state_mask();
        for (const SlotDtypes& dtypes :
             {plain_dtypes(mask, Dtype::kFloat32), plain_dtypes(mask, Dtype::kFloat64),
              stored_dtypes(entry, mask)}) {
          const DeviceKernel* const kernel =
              rule->prepare(Scalars(1), {dtypes}, Where::kGpu).device_kernel;
          if (std::find(found.begin(), found.end(), kernel) == found.end()) {
            found.push_back(kernel);
          }
        }
      }
    }
    found.push_back(&grad_norm_kernel());
    return found;
  }();
  return kernels;
}

}  // namespace fusedopt
