#include "work.h"

#include <algorithm>
#include <limits>
#include <unordered_set>

namespace fusedopt {

namespace {

// Of a scalar on the host.
double value_of(const TensorRecord& scalar) {
  if (scalar.dtype == Dtype::kFloat64) return *static_cast<const double*>(scalar.data);
  return static_cast<double>(*static_cast<const float*>(scalar.data));
}

double rounded(double value, Dtype dtype) {
  return dtype == Dtype::kFloat64 ? value : static_cast<double>(static_cast<float>(value));
}

}  // namespace

void Work::clear() {
  for (Step& step : steps_) step.clear();
  scalars_.clear();
  roundings_.clear();
  stepping_.clear();
  prepared_.resize(records_->groups.size());
  for (PreparedUpdates& prepared : prepared_) prepared.index_of.clear();
  ahead_.clear();
  odd_.clear();
  for (const std::size_t p : in_order_) records_->params[p].in_order = false;
  in_order_.clear();
  readers_.clear();
  unknown_kernels_.clear();
}

bool Work::add(std::size_t p, const TensorView& grad) {
  const ParamRecord& param = records_->params[p];
  Scalars scalars(param.first_step ? 1 : 2);
  if (has_step_ && !param.device_step && !advance(param, &scalars)) return false;
  TensorTask task;
  task.slots[0] = param[Role::kParam].data;
  task.slots[1] = grad.data;
  int num_slots = 2;
  (param.roles & kStates).for_each([&](Role role) { task.slots[num_slots++] = param[role].data; });
  if (!(param.roles & kExtras).empty()) add_pointers(param, &task);
  task.numel = param.numel;
  task.first_step = param.first_step;
  task.step = param.device_step ? param[Role::kStep].data : nullptr;
  task.second = param.device_step ? param[scalar(1)].data : nullptr;
  SlotDtypes dtypes = param.stored;
  dtypes.slots[1] = grad.dtype;
  const bool prepares = param.device_step || records_->groups[param.group].options_device != kCpu;
  const Where where = param.device == kCpu ? Where::kCpu
                      : prepares           ? Where::kGpuPrepares
                                           : Where::kGpu;
  task.update = prepared_update(param.group, scalars, dtypes, param.device, where);
  if (task.update == kUndefined) return false;  // the Python side says why
  records_->params[p].is_refused = task.update == kRefused;
  if (param.is_refused) return false;
  step_on(param.device).tasks.push_back(task);
  stepping_.push_back(p);
  return true;
}

// The scalars of this step, from memory of the host.
bool Work::advance(const ParamRecord& param, Scalars* scalars) {
  const TensorRecord& count = param[Role::kStep];
  const TensorRecord& second = param[scalar(1)];
  const bool has_second = param.roles.has(scalar(1));
  Scalars before(value_of(count), has_second ? value_of(second) : 1);
  before.second_is_double = second.dtype == Dtype::kFloat64;
  if (!(before.step >= 0)) return false;
  if (param.shares_step >= 0) before.step += ahead_[count.data]++;
  *scalars = records_->groups[param.group].rule->advanced(before);
  scalars->second = rounded(scalars->second, second.dtype);
  if (!(rounded(scalars->step, count.dtype) > before.step)) return false;
  scalars_.push_back({count.data, count.dtype, scalars->step, param.device});
  if (has_second) scalars_.push_back({second.data, second.dtype, scalars->second, param.device});
  return true;
}

void Work::add_pointers(const ParamRecord& param, TensorTask* task) {
  std::vector<void*>& pointers = step_on(param.device).extras;
  task->extras = static_cast<std::int64_t>(pointers.size());
  pointers.insert(pointers.end(), task->slots, task->slots + kMaxSlots);
  for (int e = 0; e < kNumExtras; ++e) pointers.push_back(param[extra(e)].data);
  if (param.stored.stochastic && param.device == kCpu) {
    roundings_.push_back(static_cast<std::uint64_t*>(param[Role::kRounding].data) + 1);
  }
}

bool Work::is_refused(const DeviceKernel& kernel, int device) {
  const KernelState state = state_of_ == nullptr ? KernelState::kReady : state_of_(kernel, device);
  const std::pair needed(&kernel, device);
  if (state == KernelState::kUnknown && std::find(unknown_kernels_.begin(), unknown_kernels_.end(),
                                                  needed) == unknown_kernels_.end()) {
    unknown_kernels_.push_back(needed);
  }
  return state == KernelState::kRefused;
}

Step& Work::step_on(int device) {
  const auto index = static_cast<std::size_t>(device + 1);
  if (index >= steps_.size()) steps_.resize(index + 1);
  return steps_[index];
}

std::uint32_t Work::prepared_update(std::uint32_t group, const Scalars& scalars,
                                    const SlotDtypes& dtypes, int device, Where where) {
  PreparedUpdates& prepared = prepared_[group];
  const auto place = static_cast<std::uint32_t>(device + 1) * 4 + static_cast<std::uint32_t>(where);
  const UpdateKey key{scalars.step, scalars.second, place << SlotDtypes::kKeyBits | dtypes.key()};
  if (!prepared.index_of.empty() && key == prepared.last_key) return prepared.last_index;
  const GroupRecord& record = records_->groups[group];
  std::vector<PreparedUpdate>& updates = step_on(device).updates;
  const auto [found, is_new] =
      prepared.index_of.emplace(key, static_cast<std::uint32_t>(updates.size()));
  if (is_new) {
    constexpr double kAny = std::numeric_limits<double>::infinity(), kAnySecond = 0.5;
    const double largest = dtypes.slots[0] == Dtype::kFloat64
                               ? std::numeric_limits<double>::max()
                               : static_cast<double>(std::numeric_limits<float>::max());
    const bool prepares = where == Where::kGpuPrepares;  // only the device knows the step
    const Scalars known = prepares ? Scalars(1, kAnySecond) : scalars;
    if (!record.rule->is_defined(known, prepares ? kAny : largest)) {
      return kUndefined;
    }
    updates.push_back(record.rule->prepare(scalars, {dtypes, record.ema_weight}, where));
    if (where != Where::kCpu && is_refused(*updates.back().device_kernel, device)) {
      found->second = kRefused;
    }
  }
  prepared.last_key = key;
  return prepared.last_index = found->second;
}

void Work::add_early_read(std::size_t reader, const MemoryRange& memory) {
  overlaps_->for_each(memory, [&](std::size_t writer) {
    if (writer != reader) readers_.emplace_back(reader, writer);
  });
}

void Work::put_in_order(std::size_t p) {
  ParamRecord& param = records_->params[p];
  if (param.in_order) return;
  param.in_order = true;
  in_order_.push_back(p);
  if (param.shares_step < 0) return;
  const auto shared = static_cast<std::size_t>(param.shares_step);
  for (const std::size_t other : overlaps_->shared_steps()[shared]) put_in_order(other);
}

void Work::finish() {
  if (!readers_.empty()) {
    std::unordered_set<std::size_t> stepping(stepping_.begin(), stepping_.end());
    stepping.insert(odd_.begin(), odd_.end());
    for (const auto& [reader, writer] : readers_) {
      if (stepping.count(writer) == 0) continue;
      put_in_order(reader);
      put_in_order(writer);
    }
  }
  for (const std::size_t p : stepping_) {
    if (records_->params[p].in_order) odd_.push_back(p);
  }
}

bool Work::awaits_device() const {
  for (const ScalarToWrite& scalar : scalars_) {
    const auto index = static_cast<std::size_t>(scalar.device + 1);
    if (scalar.device != kCpu && steps_[index].scaling.found_inf != nullptr) return true;
  }
  return false;
}

}  // namespace fusedopt
