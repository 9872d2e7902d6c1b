// What tests/test_plan.py calls: records, verification, overlaps, work and launch, with a rule that
// subtracts the gradient. Each function returns 0, or the line of what is not as it should be.
#include <cmath>
#include <map>

#include "../../csrc/multi_tensor/apply_cpu.cpp"
#include "../../csrc/multi_tensor/launch_plan.cpp"
#include "../../csrc/multi_tensor/parallel.cpp"
#include "../../csrc/multi_tensor/tensor_lists.cpp"
#include "../../csrc/plan/launch.cpp"
#include "../../csrc/plan/overlaps.cpp"
#include "../../csrc/plan/record.cpp"
#include "../../csrc/plan/verify.cpp"
#include "../../csrc/plan/work.cpp"
#include "../../csrc/plan/written_memory.cpp"
#include "../../csrc/torch_layout.cpp"

namespace fusedopt {

// Nothing here is on a GPU.
void apply_gpu(const Step&, int, void*, std::uint32_t*, int*) {}
bool is_capturing(void*) { return false; }

}  // namespace fusedopt

using namespace fusedopt;

namespace {

void subtract(const PreparedUpdate&, void* const* slots, std::int64_t begin, std::int64_t count) {
  for (std::int64_t i = begin; i < begin + count; ++i) {
    static_cast<float*>(slots[0])[i] -= static_cast<const float*>(slots[1])[i];
  }
}

struct Subtraction : GroupRule {
  unsigned state_mask() const override { return 1; }
  Scalars advanced(const Scalars& before) const override {
    return {before.step + 1, before.second / 2};
  }
  bool is_defined(const Scalars& scalars, double) const override { return scalars.step < 100; }
  PreparedUpdate prepare(const Scalars&, const StoredAs& stored, Where) const override {
    PreparedUpdate update;
    update.stored = stored;
    update.kernel = &subtract;
    update.scale_grads = [](PreparedUpdate*, double) {};
    return update;
  }
};

constexpr std::int64_t kCount = 4, kOne = 1;

TensorView row(void* data, Dtype dtype = Dtype::kFloat32, const std::int64_t* count = &kCount) {
  return {data, dtype, 1, count, &kOne};
}

TensorView number(void* data, Dtype dtype = Dtype::kFloat32) { return {data, dtype}; }

struct World {
  Records records;
  Overlaps overlaps;
  Verification verification{&records, &overlaps};
  Work work{true, &records, &overlaps};
  float params[3][4] = {}, states[3][4] = {}, grads[3][4] = {}, steps[3] = {};

  World() {
    records.groups.emplace_back();
    records.groups[0].rule = std::make_unique<Subtraction>();
  }

  void add(void* param, void* state, float* step) {
    ParamRecord record;
    records.add_param(row(param), &record);
    record.add(Role::kState, row(state));
    record.add(Role::kStep, number(step));
    record.stored = stored_as(record);
    record.has_state = true;
    records.params.push_back(record);
  }

  void list() {
    overlaps.list(&records);
    work.clear();
  }

  void run() {
    Launch launch(&work);
    launch.prepare("", [](int) { return Queue(); });
    launch.run(1);
  }
};

#define EXPECT(condition) \
  if (!(condition)) return __LINE__

}  // namespace

extern "C" {

int roles() {
  Roles some = Roles(Role::kParam) | Role::kStep;
  EXPECT(some.has(Role::kParam) && !some.has(Role::kGrad) && some.has(Role::kStep));
  EXPECT(!some.has(kStates) && (some & kStates).empty() && (some | kStates).has(state(2)));
  EXPECT(position(scale(0)) == kScales && position(scalar(1)) == kNumRoles - 1);
  EXPECT(extra(0) == Role::kMaster && extra(3) == Role::kScale);
  int sum = 0;
  some.for_each([&](Role role) { sum += position(role); });
  EXPECT(sum == kMaxPointers);
  EXPECT(!is_elementwise(Role::kScale) && is_elementwise(Role::kEma));
  return 0;
}

int verification() {
  World w;
  w.add(w.params[0], w.states[0], &w.steps[0]);
  w.list();
  ParamRecord& param = w.records.params[0];
  Verification& verification = w.verification;
  EXPECT(verification.accepts(&param, Role::kState, row(w.states[0])) && !verification.has_moved());
  EXPECT(verification.accepts(&param, Role::kState, row(w.states[1])) && verification.has_moved());
  EXPECT(!verification.has_moved() && param[Role::kState].data == w.states[1]);
  const std::int64_t three = 3;
  EXPECT(!verification.accepts(&param, Role::kState, row(w.states[0], Dtype::kFloat32, &three)));
  EXPECT(!verification.accepts(&param, Role::kState, row(w.states[0], Dtype::kBFloat16)));
  char* const odd = reinterpret_cast<char*>(w.states[0]) + 1;
  EXPECT(!verification.accepts(&param, Role::kState, row(odd)));
  EXPECT(param[Role::kState].data == w.states[1]);
  TensorView elsewhere = row(w.states[0]);
  elsewhere.device = 3;
  EXPECT(!verification.accepts(&param, Role::kState, elsewhere));

  double count = 0;
  EXPECT(verification.can_take(param, Role::kStep, number(&count, Dtype::kFloat64)));
  EXPECT(!verification.accepts(&param, Role::kStep, number(&count, Dtype::kFloat64)));
  EXPECT(!verification.can_take(param, Role::kStep, number(&count, Dtype::kFloat16)));
  EXPECT(!verification.can_take(param, Role::kStep, row(w.states[0])));
  EXPECT(verification.can_take(param, scalar(1), number(&w.steps[1])));

  EXPECT(!verification.can_take(param, Role::kMaster, row(w.states[2])));  // of a float32 parameter
  EXPECT(verification.can_take(param, Role::kEma, row(w.states[2], Dtype::kBFloat16)));
  EXPECT(!verification.can_take(param, Role::kEma, row(w.states[2], Dtype::kFloat64)));
  EXPECT(verification.can_take(param, Role::kScale, row(w.states[2], Dtype::kFloat32, &kOne)));
  EXPECT(!verification.can_take(param, Role::kScale, row(w.states[2])));  // but of a shard
  param.is_shard = true;
  EXPECT(verification.can_take(param, Role::kScale, row(w.states[2])));
  return 0;
}

int gradients() {
  World w;
  w.add(w.params[0], w.states[0], &w.steps[0]);
  w.add(w.params[1], w.states[1], &w.steps[1]);
  w.list();
  const ParamRecord& param = w.records.params[0];
  EXPECT(w.verification.fits(param, row(w.grads[0])));
  EXPECT(w.verification.fits(param, row(w.grads[0], Dtype::kBFloat16)));
  EXPECT(!w.verification.fits(param, row(w.grads[0], Dtype::kFloat64)));
  EXPECT(w.verification.is_free(param, row(w.grads[0])));
  EXPECT(!w.verification.is_free(param, row(w.states[1])));
  EXPECT(!w.verification.is_free(param, row(w.params[1] + 3)));
  return 0;
}

int completeness() {
  World w;
  w.add(w.params[0], w.states[0], &w.steps[0]);
  ParamRecord& param = w.records.params[0];
  EXPECT(is_complete(param, Roles(Role::kState) | Role::kStep));
  EXPECT(!is_complete(param, Roles(Role::kState) | Role::kMaster));
  param.add(Role::kState, row(w.states[0], Dtype::kInt8));
  EXPECT(!is_complete(param, Role::kState));
  param.add(Role::kScale, row(w.states[1], Dtype::kFloat32, &kOne));
  EXPECT(is_complete(param, Role::kState));
  return 0;
}

int overlaps() {
  World w;
  w.add(w.params[0], w.states[0], &w.steps[0]);
  w.add(w.params[1], w.states[1], &w.steps[1]);
  w.add(w.params[2], w.states[2], &w.steps[1]);  // with the count of the one before
  w.list();
  EXPECT(w.overlaps.sharing(w.records).empty() && w.overlaps.are_known(w.records));
  EXPECT(w.records.params[0].shares_step < 0 && w.records.params[1].shares_step == 0);
  EXPECT((w.overlaps.shared_steps()[0] == std::vector<std::size_t>{1, 2}));
  w.records.params[1][Role::kState].data = w.states[0];
  w.list();
  EXPECT(w.overlaps.generation() == 2 && !w.overlaps.are_known(w.records));
  EXPECT((w.overlaps.sharing(w.records) == std::vector<std::size_t>{0, 1, 2}));
  for (ParamRecord& param : w.records.params) param.python = param.for_memory = true;
  EXPECT(w.overlaps.are_known(w.records));
  w.records.params[1][Role::kState].data = w.states[1];
  w.list();
  EXPECT(!w.overlaps.are_known(w.records));
  return 0;
}

int steps() {
  World w;
  w.add(w.params[0], w.states[0], &w.steps[0]);
  w.add(w.params[1], w.states[1], &w.steps[1]);
  w.add(w.params[2], w.states[2], &w.steps[1]);
  w.records.params[0].first_step = true;
  w.steps[1] = 5;
  for (int p = 0; p < 3; ++p) w.grads[p][3] = static_cast<float>(p + 1);
  w.list();
  for (std::size_t p = 0; p < 3; ++p) EXPECT(w.work.add(p, row(w.grads[p])));
  w.work.finish();
  EXPECT(w.work.odd().empty() && !w.work.awaits_device());
  w.run();
  EXPECT(w.params[0][3] == -1 && w.params[1][3] == -2 && w.params[2][3] == -3);
  EXPECT(w.params[0][0] == 0 && w.steps[0] == 1 && w.steps[1] == 7);  // two with this count
  EXPECT(!w.records.params[0].first_step);

  const float found_inf = 1;
  w.work.clear();
  EXPECT(w.work.add(0, row(w.grads[0])));
  StepScaling scaling;
  scaling.found_inf = &found_inf;
  w.work.set_scaling(kCpu, scaling);
  w.run();
  EXPECT(w.params[0][3] == -1 && w.steps[0] == 1);  // skipped
  return 0;
}

int second_scalars() {
  World w;
  float product = 1;
  w.add(w.params[0], w.states[0], &w.steps[0]);
  w.records.params[0].add(scalar(1), number(&product));
  w.list();
  for (const float expected : {0.5f, 0.25f}) {
    w.work.clear();
    EXPECT(w.work.add(0, row(w.grads[0])));
    EXPECT(product == 2 * expected);
    w.run();
    EXPECT(product == expected);
  }
  EXPECT(w.steps[0] == 2);
  return 0;
}

int counts_that_cannot_go_on() {
  World w;
  w.add(w.params[0], w.states[0], &w.steps[0]);
  w.list();
  for (const float count : {-1.0f, std::nanf(""), 16777216.0f, INFINITY, 99.0f}) {
    w.steps[0] = count;  // the last is one that the rule has no numbers for
    w.work.clear();
    EXPECT(!w.work.add(0, row(w.grads[0])));
  }
  w.steps[0] = 98;
  w.work.clear();
  EXPECT(w.work.add(0, row(w.grads[0])));
  return 0;
}

int order() {
  World w;
  w.add(w.params[0], w.states[0], &w.steps[0]);
  w.add(w.params[1], w.states[1], &w.steps[1]);
  w.add(w.params[2], w.states[2], &w.steps[1]);
  w.list();
  const auto memory = reinterpret_cast<std::uintptr_t>(w.params[2]);
  w.work.leave(0);
  w.work.add_early_read(0, {memory, memory + 4});
  w.work.finish();  // the writer rests
  EXPECT(w.work.odd().size() == 1 && !w.records.params[0].in_order);
  w.work.clear();
  EXPECT(w.work.add(1, row(w.grads[1])) && w.work.add(2, row(w.grads[2])));
  w.work.leave(0);
  w.work.add_early_read(0, {memory, memory + 4});
  w.work.finish();  // the writer steps, and with it the one that has its count
  EXPECT((w.work.odd() == std::vector<std::size_t>{0, 1, 2}));
  EXPECT(w.records.params[0].in_order && w.records.params[1].in_order);
  w.work.clear();
  EXPECT(!w.records.params[0].in_order && w.work.odd().empty());
  return 0;
}
}
