#include "plan.h"

#include <optional>
#include <stdexcept>
#include <tuple>

#include "../multi_tensor/tensor_lists.h"
#include "../plan/launch.h"
#include "device.h"
#include "grad_norm.h"
#include "module.h"

namespace fusedopt {

Plan::Plan(const std::string& rule, std::string owner)
    : rule_(find_rule(rule)), owner_(std::move(owner)) {}

void Plan::add_tickets(const py::object& tensor) {
  TensorView now;
  if (!view(tensor.ptr(), &now) || now.dtype != Dtype::kFloat32 || numel(now) < kMaxTableTensors) {
    throw py::value_error("tickets must be float32 zeros on a device");
  }
  tickets_[now.device] = {tensor, static_cast<std::uint32_t*>(now.data)};
  recorder_.add_device(now.device);
}

void Plan::add_group(bool python, bool capturable, bool amp_fused, const py::dict& storage) {
  records_.groups.emplace_back();
  records_.groups.back().python = python;
  records_.groups.back().capturable = capturable;
  records_.groups.back().amp_fused = amp_fused;
  group_reader_.add(storage);
}

void Plan::add(py::handle param, const py::object& state, const py::tuple& keys,
               const py::tuple& extras, bool first_step) {
  recorder_.add(param, state, {keys, extras, rule_.scalars}, first_step);
}

py::tuple Plan::locate(std::size_t entry) const {
  const ParamRecord& param = records_.params.at(entry);
  const bool can_copy = !param.python && !param.in_order && !param.is_refused;
  return py::make_tuple(param.group, param.index, can_copy, param.is_refused);
}

struct Plan::Running {
  explicit Running(Plan* plan) : plan(plan) {
    if (plan->running_) {
      throw std::runtime_error(plan->owner_ + ": step() is running in another thread");
    }
    plan->running_ = true;
    plan->has_stepped_ = plan->has_repeated_ = false;
  }
  ~Running() {
    plan->inspector_.release();
    plan->repetition_.release();
    plan->running_ = false;
  }
  Plan* plan;
};

Outcome Plan::step(const py::object& groups, const py::object& state, int num_threads,
                   const py::object& grads, const py::object& scaling, const py::object& created,
                   const py::object& owner) {
  const Running running(this);
  const Outcome stale{false, true, {}};
  if (!PyList_CheckExact(groups.ptr()) || !is_plain_dict(state.ptr())) return stale;

  const auto list = py::reinterpret_borrow<py::list>(groups);
  if (created.is_none() && grads.is_none() && repetition_.is_known()) {
    const auto same = py::reinterpret_borrow<py::dict>(state);
    if (repeat(list, same, scaling, [] { return true; })) {
      has_repeated_ = true;
      launch(num_threads, NewState(created, owner), work_.is_short());
      return {true, false, {}};
    }
    repetition_.give_up();
  }
  repetition_.forget();  // the work is listed anew, be it that this comes to nothing
  const py::dict all = with_created(py::reinterpret_borrow<py::dict>(state), created);
  if (!look(list, all, grads)) return stale;
  if (verification_.has_moved()) {
    overlaps_.list(&records_);
    // The gradients were compared with the places where the tensors were before.
    if (!overlaps_.are_known(records_) || !look(list, all, grads)) return stale;
  }
  while (!work_.unknown_kernels().empty()) {
    load_needed(work_.unknown_kernels(), owner_ + ": the first step");
    // Without the lock anything may have happened.
    if (!look(list, all, grads)) return stale;
  }
  work_.finish();
  if (!work_.odd().empty()) return {false, false, work_.odd()};
  if (!read_scaling(scaling) || work_.awaits_device()) return stale;
  launch(num_threads, NewState(created, owner));
  // Other threads may have exchanged the parameters meanwhile.
  const bool is_known =
      grads.is_none() && group_reader_.have_same_params(list, recogniser_, records_.groups);
  if (is_known) repetition_.learn();
  return {true, false, {}};
}

// Whether this step is the last one once more: then it is all verified and listed. Between this and
// the step no code of Python's runs.
template <typename AndThen>
bool Plan::repeat(const py::list& groups, const py::dict& state, const py::object& scaling,
                  AndThen&& and_then) {
  work_.forget_scaling();
  if (!repetition_.is_ready() || !group_reader_.read(groups, rule_, owner_, &records_.groups) ||
      !read_scaling(scaling)) {
    return false;
  }
  const auto has_same_params = [&] {
    return group_reader_.have_same_params(groups, recogniser_, records_.groups);
  };
  if (!has_same_params()) return false;  // those that are known may be gone
  const bool releases = !work_.is_short();
  if (releases) {
    repetition_.ask_for_gradients();
    if (!has_same_params()) return false;
  }
  if (!repetition_.look(state) || !work_.repeat() || work_.awaits_device() || !and_then()) {
    return false;
  }
  if (releases && !repetition_.hold_all()) return false;
  repetition_.go_on();
  repetition_.bump_versions();
  return true;
}

bool Plan::repeat_clipped(const py::object& groups, const py::object& state, int num_threads,
                          const py::object& clip, double max_norm) {
  const Running running(this);
  if (!repetition_.is_known()) return false;
  TensorView space;
  if (!PyList_CheckExact(groups.ptr()) || !is_plain_dict(state.ptr()) || !work_.is_short() ||
      repetition_.has_dtensors() || !view(clip.ptr(), &space) || space.device != kCpu) {
    return false;
  }
  const auto measure = [&] {
    const std::vector<GradToMeasure> grads = repetition_.gradients();
    std::int64_t num_chunks = 0;
    for (const GradToMeasure& grad : grads) num_chunks += grad.num_chunks();
    if (num_chunks == 0 || numel(space) < kClipHeader + num_chunks) return false;
    const GradNorm norm = norm_into(space, num_chunks, max_norm);
    grad_norm_cpu(grads, norm, num_threads);
    StepScaling scaling;
    scaling.clip = norm.clip;
    work_.set_scaling(kCpu, scaling);
    return true;
  };
  const auto list = py::reinterpret_borrow<py::list>(groups);
  has_repeated_ = repeat(list, py::reinterpret_borrow<py::dict>(state), py::none(), measure);
  if (has_repeated_) {
    launch(num_threads, NewState(py::none(), py::none()), true);
  } else {
    repetition_.give_up();
  }
  return has_repeated_;
}

// Recognises and verifies everything, and lists the work. False if the plan does not fit any more.
bool Plan::look(const py::list& groups, const py::dict& state, const py::object& grads) {
  work_.clear();
  return group_reader_.read(groups, rule_, owner_, &records_.groups) &&
         group_reader_.have_same_params(groups, recogniser_, records_.groups) &&
         inspector_.inspect(state, grads);
}

// The scalars of each device: {device: (found_inf, loss_scale, clip)}, where each may be None. False
// if the kernels cannot read one.
bool Plan::read_scaling(const py::object& scaling) {
  if (scaling.is_none()) return true;
  for (const auto& [key, tensors] : py::cast<py::dict>(scaling)) {
    static_cast<void>(key);
    int device = kCpu;
    bool is_readable = true;
    const auto scalar = [&](const py::handle tensor, Dtype dtype) {
      TensorView now;
      if (tensor.is_none()) return static_cast<void*>(nullptr);
      is_readable &= view(tensor.ptr(), &now) && now.dtype == dtype;
      if (is_readable) device = now.device;
      return now.data;
    };
    const auto [found_inf, loss_scale, clip] =
        tensors.cast<std::tuple<py::object, py::object, py::object>>();
    StepScaling step_scaling;
    step_scaling.found_inf = static_cast<const float*>(scalar(found_inf, Dtype::kFloat32));
    step_scaling.loss_scale = static_cast<const float*>(scalar(loss_scale, Dtype::kFloat32));
    step_scaling.clip = static_cast<const double*>(scalar(clip, Dtype::kFloat64));
    if (!is_readable) return false;
    work_.set_scaling(device, step_scaling);
  }
  return true;
}

// What can fail comes first, then what is written from here. To Python it is one action: no code of
// an interrupt or of a destructor runs between the new state, the update and the step counts.
// `is_short`: it keeps the interpreter lock, so that nobody need hold what it reads.
void Plan::launch(int num_threads, const NewState& new_state, bool is_short) {
  Launch launch(&work_);
  launch.prepare(owner_, [&](int device) -> Queue {
    return {current_stream(device), tickets_.at(device).second};
  });
  new_state.commit();
  has_stepped_ = true;
  try {
    std::optional<py::gil_scoped_release> release;
    if (!is_short) release.emplace();
    launch.run(num_threads);
  } catch (...) {
    if (!launch.has_written()) {
      has_stepped_ = false;
      new_state.take_back();
    }
    throw;
  }
}

int Plan::traverse(visitproc visit, void* arg) const {
  for (const auto& [device, tickets] : tickets_) Py_VISIT(tickets.first.ptr());
  if (const int stop = recogniser_.traverse(visit, arg)) return stop;
  if (const int stop = group_reader_.traverse(visit, arg)) return stop;
  if (const int stop = repetition_.traverse(visit, arg)) return stop;
  return inspector_.traverse(visit, arg);
}

// What a destructor runs may call the plan: it is empty before anything goes.
void Plan::clear() {
  const Recogniser recogniser = std::exchange(recogniser_, {});
  const GroupReader group_reader = std::exchange(group_reader_, {});
  const auto tickets = std::exchange(tickets_, {});
  work_.clear();
  records_ = Records();
  repetition_.forget();
}

namespace {

// A plan can be part of a cycle: what it holds is the collector's to see.
void take_part_in_collection(PyHeapTypeObject* heap_type) {
  static constexpr auto plan_of = [](PyObject* object) -> Plan* {
    auto* const instance = reinterpret_cast<py::detail::instance*>(object);
    return instance->get_value_and_holder().holder_constructed()
               ? py::cast<Plan*>(py::handle(object))
               : nullptr;
  };
  PyTypeObject* const type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* object, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(object));
    const Plan* const plan = plan_of(object);
    return plan == nullptr ? 0 : plan->traverse(visit, arg);
  };
  type->tp_clear = [](PyObject* object) {
    if (Plan* const plan = plan_of(object)) plan->clear();
    return 0;
  };
}

py::list odd_of(const Outcome& outcome) {
  py::list odd;
  for (const std::size_t entry : outcome.odd) odd.append(entry);
  return odd;
}

}  // namespace

void export_plan(py::module_& module) {
  // The module for tests has classes of these names, too.
  const py::module_local is_local;
  py::class_<Outcome>(module, "Outcome", is_local)
      .def_readonly("is_done", &Outcome::is_done)
      .def_readonly("is_stale", &Outcome::is_stale)
      .def_property_readonly("odd", &odd_of);
  py::class_<Plan>(module, "Plan", is_local, py::custom_type_setup(&take_part_in_collection))
      .def(py::init<const std::string&, std::string>())
      .def("add_tickets", &Plan::add_tickets)
      .def("add_group", &Plan::add_group)
      .def("add", &Plan::add)
      .def("finish", &Plan::finish)
      .def("step", &Plan::step)
      .def("repeat_clipped", &Plan::repeat_clipped)
      .def_property_readonly("has_stepped", &Plan::has_stepped)
      .def_property_readonly("has_repeated", &Plan::has_repeated)
      .def("locate", &Plan::locate);
}

}  // namespace fusedopt
