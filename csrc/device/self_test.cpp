#include "self_test.h"

#include <algorithm>
#include <memory>

#include "../multi_tensor/apply.h"
#include "../multi_tensor/launch_plan.h"
#include "../rules/sample_options.h"
#include "../storage/blockwise8.h"
#include "apply_gpu.h"
#include "norm_self_test.h"
#include "trial.h"

namespace fusedopt {

namespace {

constexpr int kPasses = 3;  // as it is, with all that scales gradients, and one that is skipped
constexpr double kPowTolerance = 1e-12;

const char* name_of(Dtype dtype) {
  static const char* const names[] = {"float32", "float64", "bfloat16", "float16",
                                      "int8",    "uint8",   "int16",    "int64"};
  return names[static_cast<int>(dtype)];
}

// A rule whose updates the kernel has.
struct Sample {
  const RuleEntry* entry;
  std::unique_ptr<GroupRule> rule;
};

// Where the parts of one parameter are.
struct Placed {
  std::size_t pointers[kMaxPointers] = {};  // 0: it has none
  std::size_t scalars[Scalars::kMost] = {};
  std::int64_t numel;
  bool first_step;
  Scalars before, now;
  StoredAs stored;
  const GroupRule* rule;
};

class SelfTest {
 public:
  SelfTest(const DeviceKernel& kernel, bool prepares) : kernel_(kernel), prepares_(prepares) {
    trial_.add_zeros(1);  // no tensor is at place 0
    scaling_ = trial_.add_zeros(64);
    tickets_ = trial_.add_zeros(kMaxTableTensors * sizeof(std::uint32_t), "tickets");
  }

  void add(const Sample& sample, const SlotDtypes& dtypes, std::int64_t numel, int shift);
  std::string run(const Driver& driver, int device);

 private:
  Step step_at(std::byte* base, Where where, int pass) const;
  void count(int pass);

  const DeviceKernel& kernel_;
  const bool prepares_;
  Trial trial_;
  std::size_t scaling_, tickets_;
  std::vector<Placed> placed_;
};

void SelfTest::add(const Sample& sample, const SlotDtypes& dtypes, std::int64_t numel, int shift) {
  static constexpr int kSteps[] = {1, 2, 3, 7, 20, 1000};
  const RuleEntry& entry = *sample.entry;
  const auto n = placed_.size();
  Placed placed;
  placed.numel = numel;
  placed.rule = sample.rule.get();
  placed.stored = {dtypes, 0.1f};
  const auto tensor = [&](Dtype dtype, std::int64_t count, const std::string& what) {
    const std::string name = what + " (" + name_of(dtype) + ", " + std::to_string(numel) +
                             (shift != 0 ? " elements, misaligned)" : " elements)");
    return trial_.add(dtype, count, shift, name);
  };
  placed.pointers[0] = tensor(dtypes.slots[0], numel, "the parameter");
  placed.pointers[1] = tensor(dtypes.slots[1], numel, "the gradient");
  const unsigned mask = sample.rule->state_mask();
  int slot = 2;
  for (std::size_t s = 0; s < entry.slots.size(); ++s) {
    if ((mask >> s & 1u) == 0) continue;
    const Dtype dtype = dtypes.slots[slot];
    placed.pointers[slot] = tensor(dtype, numel, entry.slots[s].name);
    if (is_float(dtype)) {
      if (entry.slots[s].is_unsigned) trial_.make_magnitudes(placed.pointers[slot]);
    } else {
      const std::size_t scales = trial_.add(Dtype::kFloat32, num_scales(numel), 0,
                                            entry.slots[s].name + std::string("_scale"));
      trial_.make_magnitudes(scales);
      placed.pointers[kScales + slot - 2] = scales;
    }
    ++slot;
  }
  if (dtypes.master != kNone) placed.pointers[kMaster] = tensor(dtypes.master, numel, "the master");
  if (dtypes.ema != kNone) placed.pointers[kEma] = tensor(dtypes.ema, numel, "the average");
  if (dtypes.stochastic) placed.pointers[kRounding] = trial_.add(Dtype::kInt64, 2, 0, "rounding");

  placed.first_step = n % 3 == 0;
  const int step = kSteps[n % (sizeof(kSteps) / sizeof(kSteps[0]))];
  placed.before = Scalars(entry.has_step ? step - 1 : placed.first_step ? 1 : 2, 0.75);
  for (std::size_t s = 0; s < entry.scalars.size(); ++s) {
    placed.scalars[s] = trial_.add(Dtype::kFloat32, 1, 0, entry.scalars[s]);
    const double number = s == 0 ? placed.before.step : placed.before.second;
    trial_.set(placed.scalars[s], static_cast<float>(number));
  }
  placed_.push_back(placed);
}

// The step of a pass over the memory that begins here.
Step SelfTest::step_at(std::byte* base, Where where, int pass) const {
  Step step;
  for (const Placed& placed : placed_) {
    TensorTask task;
    task.update = static_cast<std::uint32_t>(step.updates.size());
    task.first_step = placed.first_step;
    task.numel = placed.numel;
    const auto pointer = [&](std::size_t place) -> void* {
      return place == 0 ? nullptr : base + place;
    };
    for (int s = 0; s < kMaxSlots; ++s) task.slots[s] = pointer(placed.pointers[s]);
    task.step = where == Where::kGpuPrepares ? pointer(placed.scalars[0]) : nullptr;
    task.second = where == Where::kGpuPrepares ? pointer(placed.scalars[1]) : nullptr;
    if (!placed.stored.dtypes.is_plain()) {
      task.extras = static_cast<std::int64_t>(step.extras.size());
      for (const std::size_t place : placed.pointers) step.extras.push_back(pointer(place));
    }
    step.updates.push_back(placed.rule->prepare(placed.now, placed.stored, where));
    step.tasks.push_back(task);
  }
  if (pass > 0) {
    step.scaling.clip = reinterpret_cast<const double*>(base + scaling_);
    step.scaling.loss_scale = reinterpret_cast<const float*>(base + scaling_ + 32);
    step.scaling.found_inf = reinterpret_cast<const float*>(base + scaling_ + 36);
  }
  return step;
}

// What a kernel that prepares writes beside the elements.
void SelfTest::count(int pass) {
  const bool skipped = pass == kPasses - 1;
  for (Placed& placed : placed_) {
    if (skipped) continue;
    if (placed.stored.dtypes.stochastic) {
      ++*reinterpret_cast<std::uint64_t*>(trial_.host().data() + placed.pointers[kRounding] + 8);
    }
    if (placed.scalars[0] == 0) continue;
    placed.before = placed.now;
    if (!prepares_) continue;
    trial_.set(placed.scalars[0], static_cast<float>(placed.now.step));
    if (placed.scalars[1] != 0) {
      trial_.set(placed.scalars[1], static_cast<float>(placed.now.second));
    }
  }
}

std::string SelfTest::run(const Driver& driver, int device) {
  std::vector<std::byte> found = trial_.host();
  const TrialMemory memory(driver, found.size());
  const double clip[] = {2.0, 0.375, 0.0};
  for (std::size_t c = 0; c < 3; ++c) trial_.set(scaling_ + c * sizeof(double), clip[c]);
  trial_.set(scaling_ + 32, 4.0f);
  bool in_double = false;
  for (int pass = 0; pass < kPasses; ++pass) {
    trial_.set(scaling_ + 36, pass == kPasses - 1 ? 1.0f : 0.0f);
    for (Placed& placed : placed_) {
      in_double |= placed.stored.dtypes.slots[0] == Dtype::kFloat64;
      placed.now = placed.before;
      if (placed.scalars[0] == 0) continue;
      placed.now = placed.rule->advanced(placed.before);
      placed.now.second = static_cast<float>(placed.now.second);
    }
    memory.upload(trial_.host());
    const Step on_gpu =
        step_at(memory.begin(), prepares_ ? Where::kGpuPrepares : Where::kGpu, pass);
    int num_launches = 0;
    apply_gpu(on_gpu, device, memory.stream(),
              reinterpret_cast<std::uint32_t*>(memory.begin() + tickets_), &num_launches);
    Step here = step_at(trial_.host().data(), Where::kCpu, pass);
    apply_cpu(&here, chunks_of(here), 1);
    count(pass);
    memory.download(&found);
    const double tolerance = in_double && prepares_ ? kPowTolerance : 0;
    const std::string difference = trial_.difference(found, tolerance);
    if (!difference.empty()) return difference;
  }
  return "";
}

// The dtypes that a kernel combines.
std::vector<SlotDtypes> combinations(const DeviceKernel& kernel, unsigned mask, bool in_double) {
  if (!kernel.is_plain()) return {kernel.stored};
  if (in_double) return {plain_dtypes(mask, Dtype::kFloat64)};
  std::vector<SlotDtypes> all;
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    all.push_back(plain_dtypes(mask, dtype));
    all.push_back(all.back());  // and the gradient, and a state, of another
    all.back().slots[1] = dtype == Dtype::kFloat32 ? Dtype::kBFloat16 : Dtype::kFloat32;
    if (all.back().num_slots > 2) all.back().slots[2] = Dtype::kFloat32;
  }
  return all;
}

}  // namespace

std::string self_test(const DeviceKernel& kernel, int device) {
  static constexpr std::int64_t kSizes[] = {1, 3, 8, 13, 64, 77, 1029, 2048 + 5};
  const Driver& driver = fusedopt::driver();
  if (&kernel == &grad_norm_kernel()) return norm_self_test(driver, device);
  // The choices of options that need this kernel; all of them are of one rule.
  const DeviceKernel& plain = kernel.is_plain() ? kernel : *kernel.plain;
  std::vector<Sample> samples;
  bool in_double = false;
  for (const RuleEntry& entry : all_rules()) {
    for (auto& rule : sample_rules(entry)) {
      const unsigned mask = rule->state_mask();
      const auto takes = [&](Dtype dtype) {
        const StoredAs stored{plain_dtypes(mask, dtype)};
        return rule->prepare(Scalars(1), stored, Where::kGpu).device_kernel == &plain;
      };
      const bool as_double = takes(Dtype::kFloat64);
      in_double |= as_double;
      const bool has_its_slots =
          kernel.is_plain() ||
          plain_dtypes(mask, Dtype::kFloat32).num_slots == kernel.stored.num_slots;
      const bool is_for_it = has_its_slots && (as_double || takes(Dtype::kFloat32));
      if (is_for_it) samples.push_back({&entry, std::move(rule)});
    }
  }
  if (samples.empty()) throw DeviceProblem("nobody knows how to try it out");
  for (const bool prepares : {false, true}) {
    SelfTest test(kernel, prepares);
    std::size_t next = 0;
    const auto add = [&](std::size_t dtypes, std::int64_t numel, int shift) {
      const Sample& sample = samples[next++ % samples.size()];
      const auto all = combinations(kernel, sample.rule->state_mask(), in_double);
      if (dtypes < all.size()) test.add(sample, all[dtypes], numel, shift);
      return dtypes + 1 < all.size();
    };
    bool more = true;
    for (std::size_t dtypes = 0; more; ++dtypes) {
      for (const int shift : {0, 1}) {
        for (const std::int64_t numel : kSizes) more = add(dtypes, numel, shift);
      }
      if (dtypes == 0) add(dtypes, kBlockElements + 77, 0);  // two blocks
    }
    const std::string difference = test.run(driver, device);
    if (!difference.empty()) return difference;
  }
  return "";
}

}  // namespace fusedopt
