#include "work.h"

#include <algorithm>
#include <limits>
#include <unordered_set>

#include "../multi_tensor/tuning.h"

namespace fusedopt {

namespace {

// Of a scalar on the host.
double value_of(const void* data, Dtype dtype) {
  if (dtype == Dtype::kFloat64) return *static_cast<const double*>(data);
  return static_cast<double>(*static_cast<const float*>(data));
}

double rounded(double value, Dtype dtype) {
  return dtype == Dtype::kFloat64 ? value : static_cast<double>(static_cast<float>(value));
}

// Those of the next step, as they are kept. False if the step count cannot go on.
bool go_on(const GroupRule& rule, const Scalars& before, UpdateSource* source) {
  source->scalars = rule.advanced(before);
  source->scalars.second = rounded(source->scalars.second, source->second_dtype);
  return rounded(source->scalars.step, source->step_dtype) > before.step;
}

}  // namespace

void Work::clear() {
  for (Step& step : steps_) step.clear();
  for (auto& sources : sources_) sources.clear();
  repeats_ = false;
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
  records_->params[p].is_refused = false;
  UpdateSource source{records_->groups[param.group].like, Scalars(param.first_step ? 1 : 2)};
  source.is_counted = has_step_ && !param.device_step;
  if (source.is_counted && !advance(param, &source)) return false;
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
  source.dtypes = param.stored;
  source.dtypes.slots[1] = grad.dtype;
  source.options_device = records_->groups[param.group].options_device;
  const bool prepares = param.device_step || source.options_device != kCpu;
  source.where = param.device == kCpu ? Where::kCpu : prepares ? Where::kGpuPrepares : Where::kGpu;
  task.update = prepared_update(source, param.device);
  if (task.update == kUndefined) return false;  // the Python side says why
  records_->params[p].is_refused = task.update == kRefused;
  if (param.is_refused) return false;
  if (source.is_counted) write_later(param, source, task.update);
  step_on(param.device).tasks.push_back(task);
  stepping_.push_back(p);
  return true;
}

// The scalars of this step, from memory of the host.
bool Work::advance(const ParamRecord& param, UpdateSource* source) {
  const TensorRecord& count = param[Role::kStep];
  const TensorRecord& second = param[scalar(1)];
  source->step_dtype = count.dtype;
  source->second_dtype = second.dtype;
  Scalars before(value_of(count.data, count.dtype));
  if (param.roles.has(scalar(1))) before.second = value_of(second.data, second.dtype);
  before.second_is_double = second.dtype == Dtype::kFloat64;
  if (!(before.step >= 0)) return false;
  if (param.shares_step >= 0) before.step += ahead_[count.data]++;
  return go_on(*records_->groups[param.group].rule, before, source);
}

void Work::write_later(const ParamRecord& param, const UpdateSource& source, std::uint32_t update) {
  const auto write = [&](Role role, bool is_second, double value) {
    const TensorRecord& scalar = param[role];
    scalars_.push_back({scalar.data, scalar.dtype, is_second, update, param.device, value});
  };
  write(Role::kStep, false, source.scalars.step);
  if (param.roles.has(scalar(1))) write(scalar(1), true, source.scalars.second);
}

bool Work::is_repeatable() const {
  std::size_t num_tasks = 0;
  for (const Step& step : steps_) {
    num_tasks += step.tasks.size();
    for (const TensorTask& task : step.tasks) {
      if (task.first_step) return false;
    }
  }
  return num_tasks == stepping_.size() && num_tasks != 0 && odd_.empty() && in_order_.empty() &&
         readers_.empty() && ahead_.empty() && unknown_kernels_.empty();
}

bool Work::repeat() {
  repeats_ = true;
  for (std::size_t g = 0; g < likes_.size(); ++g) {
    if (records_->groups[g].like != likes_[g]) return false;
  }
  for (std::size_t s = 0; s < steps_.size(); ++s) {
    for (std::size_t u = 0; u < sources_[s].size(); ++u) {
      UpdateSource& source = sources_[s][u];
      const GroupRecord& group = records_->groups[source.group];
      if (group.options_device != source.options_device) return false;
      Scalars before = source.scalars;
      before.second_is_double = source.second_dtype == Dtype::kFloat64;
      if (source.is_counted && !go_on(*group.rule, before, &source)) return false;
      if (!is_defined(source)) return false;
      steps_[s].updates[u] = prepare(source);
      if (s == 0) continue;
      const DeviceKernel& kernel = *steps_[s].updates[u].device_kernel;
      if (is_refused(kernel, static_cast<int>(s) - 1) || !unknown_kernels_.empty()) return false;
    }
  }
  for (ScalarToWrite& scalar : scalars_) {
    if (value_of(scalar.data, scalar.dtype) != scalar.value) return false;
    const auto step = static_cast<std::size_t>(scalar.device + 1);
    const Scalars& now = sources_[step][scalar.update].scalars;
    scalar.value = scalar.is_second ? now.second : now.step;
  }
  return true;
}

bool Work::is_short() const {
  constexpr std::int64_t kShortElements = 4 * kSerialElements;
  const auto is_idle = [](const Step& step) { return step.tasks.empty(); };
  return !steps_.empty() && std::all_of(steps_.begin() + 1, steps_.end(), is_idle) &&
         chunks_.num_elements() <= kShortElements;
}

void Work::forget_scaling() {
  for (Step& step : steps_) step.scaling = {};
}

void* Work::grad_of(int device, std::size_t task) const {
  return steps_[static_cast<std::size_t>(device + 1)].tasks[task].slots[1];
}

void Work::set_grad(int device, std::size_t task, void* grad) {
  Step& step = steps_[static_cast<std::size_t>(device + 1)];
  TensorTask& of = step.tasks[task];
  of.slots[1] = grad;
  if (of.extras >= 0) step.extras[static_cast<std::size_t>(of.extras) + 1] = grad;
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
  if (index >= steps_.size()) {
    steps_.resize(index + 1);
    sources_.resize(index + 1);
  }
  return steps_[index];
}

std::uint32_t Work::prepared_update(const UpdateSource& source, int device) {
  PreparedUpdates& prepared = prepared_[source.group];
  // All that decides how they go on from step to step: of one key, all do so together.
  std::uint64_t place = static_cast<std::uint64_t>(device + 1) * 4;
  place = (place + static_cast<std::uint64_t>(source.where)) * 2 + source.is_counted;
  place = place * 4 + (source.step_dtype == Dtype::kFloat64) * 2u +
          (source.second_dtype == Dtype::kFloat64);
  const UpdateKey key{source.scalars.step, source.scalars.second,
                      place << SlotDtypes::kKeyBits | source.dtypes.key()};
  if (!prepared.index_of.empty() && key == prepared.last_key) return prepared.last_index;
  std::vector<PreparedUpdate>& updates = step_on(device).updates;
  const auto [found, is_new] =
      prepared.index_of.emplace(key, static_cast<std::uint32_t>(updates.size()));
  if (is_new) {
    if (!is_defined(source)) return found->second = kUndefined;
    updates.push_back(prepare(source));
    sources_[static_cast<std::size_t>(device + 1)].push_back(source);
    if (source.where != Where::kCpu && is_refused(*updates.back().device_kernel, device)) {
      found->second = kRefused;
    }
  }
  prepared.last_key = key;
  return prepared.last_index = found->second;
}

bool Work::is_defined(const UpdateSource& source) const {
  constexpr double kAny = std::numeric_limits<double>::infinity(), kAnySecond = 0.5;
  const double largest = source.dtypes.slots[0] == Dtype::kFloat64
                             ? std::numeric_limits<double>::max()
                             : static_cast<double>(std::numeric_limits<float>::max());
  const GroupRule& rule = *records_->groups[source.group].rule;
  // Only the device knows the step.
  if (source.where == Where::kGpuPrepares) return rule.is_defined(Scalars(1, kAnySecond), kAny);
  return rule.is_defined(source.scalars, largest);
}

PreparedUpdate Work::prepare(const UpdateSource& source) const {
  const GroupRecord& group = records_->groups[source.group];
  return group.rule->prepare(source.scalars, {source.dtypes, group.ema_weight}, source.where);
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
  likes_.clear();
  for (const GroupRecord& group : records_->groups) likes_.push_back(group.like);
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
