// The only file that knows Python: reads groups, gradients and state, checks each tensor against
// what the plan remembers of it, and hands plain tensor lists to multi_tensor/.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "dlpack_exchange.h"
#include "multi_tensor/apply.h"
#include "multi_tensor/apply_cuda.h"
#include "multi_tensor/grad_norm.h"
#include "multi_tensor/launch_plan.h"
#include "multi_tensor/memory_floor.h"
#include "multi_tensor/parallel.h"
#include "multi_tensor/tensor_lists.h"
#include "storage/blockwise8.h"
#include "update_rules/adagrad.h"
#include "update_rules/adam.h"
#include "update_rules/rmsprop.h"
#include "update_rules/sgd.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace py = pybind11;

namespace fusedopt {
namespace {

#if FUSEDOPT_HAS_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

// torch, as far as it is needed here; set once by bind() and never released.
struct Torch {
  const dlpack::ExchangeApi* exchange = nullptr;
  PyObject* tensor_type = nullptr;
  PyObject* parameter_type = nullptr;
  PyObject* dtensor_type = nullptr;  // null while nobody has imported it
  py::handle increment_version;
  py::handle own_param, own_state;
  // Where a tensor object keeps the address of its TensorImpl, and where that keeps those of its
  // storage and its version counter, in bytes; 0 if not found. Only to fetch memory ahead of time,
  // never to learn anything.
  std::size_t impl_offset = 0, storage_offset = 0, version_offset = 0;
} torch;

constexpr std::size_t kImplSize = 176;  // of a TensorImpl in torch 2.13

bool is_plain_tensor(PyObject* object) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == torch.tensor_type || type == torch.parameter_type;
}

// What this process holds of a tensor: of a DTensor its shard, else the tensor itself. Borrowed.
PyObject* local_of(PyObject* object) {
  static PyObject* const name = PyUnicode_InternFromString("_local_tensor");
  if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != torch.dtensor_type) return object;
  PyObject* const local = PyObject_GetAttr(object, name);
  if (local == nullptr) throw py::error_already_set();
  Py_DECREF(local);  // the DTensor goes on holding it
  return local;
}

bool read_dtype(const dlpack::DataType& type, Dtype* dtype) {
  if (type.lanes != 1) return false;
  switch (type.code * 256 + type.bits) {
    case dlpack::kFloat * 256 + 64:
      return *dtype = Dtype::kFloat64, true;
    case dlpack::kFloat * 256 + 32:
      return *dtype = Dtype::kFloat32, true;
    case dlpack::kFloat * 256 + 16:
      return *dtype = Dtype::kFloat16, true;
    case dlpack::kBfloat * 256 + 16:
      return *dtype = Dtype::kBFloat16, true;
    case dlpack::kInt * 256 + 8:
      return *dtype = Dtype::kInt8, true;
    case dlpack::kUInt * 256 + 8:
      return *dtype = Dtype::kUInt8, true;
    case dlpack::kInt * 256 + 16:
      return *dtype = Dtype::kInt16, true;
    case dlpack::kInt * 256 + 64:
      return *dtype = Dtype::kInt64, true;
    default:
      return false;
  }
}

bool read_device(const dlpack::Device& device, int* out) {
#if defined(FUSEDOPT_CUDA_ON_HOST)
  if (device.type == dlpack::kCpu) return *out = 0, true;  // all memory is that of one GPU
#else
  if (device.type == dlpack::kCpu) return *out = kCpu, true;
  if (device.type == dlpack::kCuda) return *out = device.id, kHasCuda;
#endif
  return false;
}

// The tensor as it is now, or false if the kernels cannot touch it (sparse, another device, ...).
// Conjugate and negative bits are not looked at: see has_negative_bit.
bool view_any(PyObject* object, TensorView* out) {
  if (!is_plain_tensor(object)) {
    object = local_of(object);
    if (!is_plain_tensor(object)) return false;
  }
  dlpack::Tensor tensor;
  if (torch.exchange->tensor_from_py_object_no_sync(object, &tensor) != 0) {
    PyErr_Clear();  // the Python side looks at this tensor again and says what is wrong with it
    return false;
  }
  if (!read_device(tensor.device, &out->device) || !read_dtype(tensor.dtype, &out->dtype)) {
    return false;
  }
  out->data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  out->ndim = tensor.ndim;
  out->shape = tensor.shape;
  out->strides = tensor.strides;
  return true;
}

bool view(PyObject* object, TensorView* out) {
  return view_any(object, out) && is_float(out->dtype);
}

// Whether it can be read and written from here.
bool is_host(const TensorView& tensor) {
#if defined(FUSEDOPT_CUDA_ON_HOST)
  return tensor.device == 0;
#else
  return tensor.device == kCpu;
#endif
}

bool has_negative_bit(PyObject* tensor) {
  return py::cast<bool>(py::handle(local_of(tensor)).attr("is_neg")());
}

// Options of one param group, read by name for a rule.
class Options {
 public:
  Options(PyObject* group, std::string where) : group_(group), where_(std::move(where)) {
    capturable_ = get("capturable", 0) != 0;
  }

  bool capturable() const { return capturable_; }
  // The device of the numbers that the kernel reads for itself, or kCpu if there are none.
  int device() const { return device_; }

  double operator()(const char* name) const { return host_number(name, find(name)); }

  double get(const char* name, double otherwise) const {
    PyObject* value = PyDict_GetItemString(group_, name);
    return value == nullptr || value == Py_None ? otherwise : host_number(name, value);
  }

  // One that may be a tensor on the device, which a capturable step leaves there.
  Number number(const char* name) const { return device_number(name, find(name)); }

  // One item of a pair of such.
  Number number(const char* name, Py_ssize_t item) const {
    PyObject* pair = find(name);
    if (!PySequence_Check(pair) || PySequence_Size(pair) != 2)
      fail(name, "a pair of numbers", pair);
    const auto value = py::reinterpret_steal<py::object>(PySequence_GetItem(pair, item));
    if (!value) fail(name, "a pair of numbers", pair);
    return device_number(name, value.ptr());
  }

 private:
  PyObject* find(const char* name) const {
    PyObject* value = PyDict_GetItemString(group_, name);
    if (value == nullptr) throw py::key_error(where_ + " has no '" + name + "'");
    return value;
  }

  Number device_number(const char* name, PyObject* value) const {
    TensorView now;
    if (!capturable_ || !view(value, &now) || now.device == kCpu || itemsize(now.dtype) < 4 ||
        numel(now) != 1 || (device_ != kCpu && device_ != now.device)) {
      return {host_number(name, value)};
    }
    device_ = now.device;
    return {0.5, now.data, now.dtype == Dtype::kFloat64};
  }

  double host_number(const char* name, PyObject* value) const {
    if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    const auto as_float =
        py::reinterpret_steal<py::object>(PyUnicode_Check(value) ? nullptr : PyNumber_Float(value));
    if (!as_float) fail(name, "a number", value);
    return PyFloat_AS_DOUBLE(as_float.ptr());
  }

  // A TypeError, caused by what Python has to say, if anything.
  [[noreturn]] void fail(const char* name, const char* expected, PyObject* value) const {
    PyObject *type, *cause, *traceback;
    PyErr_Fetch(&type, &cause, &traceback);
    const std::string got = py::repr(value);
    PyErr_Restore(type, cause, traceback);
    const std::string message = where_ + ": '" + name + "' must be " + expected + ", got " + got;
    if (type == nullptr) throw py::type_error(message);
    py::raise_from(PyExc_TypeError, message.c_str());
    throw py::error_already_set();
  }

  PyObject* group_;
  std::string where_;
  bool capturable_ = false;
  mutable int device_ = kCpu;
};

// A rule with the options of one group; what the plan needs to know of an algorithm.
class GroupRule {
 public:
  virtual ~GroupRule() = default;
  virtual unsigned state_mask() const = 0;
  virtual bool is_defined(double step, double largest) const = 0;
  virtual PreparedUpdate prepare(double step, const StoredAs& stored, Where where) const = 0;
};

template <typename Rule>
class GroupRuleOf : public GroupRule {
 public:
  explicit GroupRuleOf(const Options& options) : rule_(Rule::from(options)) {}
  unsigned state_mask() const override { return rule_.state_mask(); }
  bool is_defined(double step, double largest) const override {
    return rule_.is_defined(step, largest);
  }
  PreparedUpdate prepare(double step, const StoredAs& stored, Where where) const override {
    return fusedopt::prepare(rule_, step, stored, where);
  }

 private:
  Rule rule_;
};

struct RuleEntry {
  const char* name;
  bool has_step;
  std::unique_ptr<GroupRule> (*read)(const Options&);
};

template <typename Rule>
RuleEntry entry(const char* name) {
  return {name, Rule::kHasStep, [](const Options& options) -> std::unique_ptr<GroupRule> {
            return std::make_unique<GroupRuleOf<Rule>>(options);
          }};
}

const RuleEntry kRules[] = {
    entry<Adam>("adam"),
    entry<Adagrad>("adagrad"),
    entry<RMSprop>("rmsprop"),
    entry<SGD>("sgd"),
};

const RuleEntry& find_rule(const std::string& name) {
  for (const RuleEntry& rule : kRules) {
    if (name == rule.name) return rule;
  }
  throw py::value_error("no rule '" + name + "'");
}

// What a tensor was when the plan was made. The step compares it with what the tensor is now.
struct Expected {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  bool owned = false;   // by the plan, see Plan::own
  bool exists = false;  // also without elements, when there may be no data
};

// Order and meaning of the keys in a state dict; nearly all parameters share one.
struct StateLayout {
  // Else the index of a state slot; the extras follow the step.
  static constexpr int kStep = kMaxStates, kFirstExtra = kStep + 1, kIgnored = -1;
  static constexpr int kNumRoles = kFirstExtra + kNumExtras;
  std::vector<std::pair<py::object, int>> keys;
};

struct Entry {
  PyObject* param = nullptr;  // compared, and used only while its group's list holds it
  std::uint32_t group = 0, index = 0;
  bool python = false;       // takes the Python rule
  bool first_step = false;   // its state is new; rules without a step count want to know
  bool device_step = false;  // its step count is on its device
  bool needs_state = false;  // whatever its rule needs
  int device = kCpu;
  int layout = -1;       // of its state dict, -1 if it has none
  py::object spec;       // where the shards of a DTensor are; null for other tensors
  int ndim = -1;         // below 0: the kernels cannot touch it
  std::size_t dims = 0;  // where its shape and then its strides begin in Plan::dims_
  std::int64_t numel = 0;
  Expected data;
  Expected state[kMaxStates + 1];  // the last is the step count
  std::int64_t extras = -1;        // where they begin in Plan::extras_, if there are any
  SlotDtypes stored;               // with a gradient of the parameter's dtype
};

// The tensors of an optimizer as they were at the last full check. A step compares every tensor
// with it, writes only if all is as expected, and otherwise says what is not.
class Plan {
 public:
  Plan(const std::string& rule, std::string owner)
      : rule_(find_rule(rule)), owner_(std::move(owner)) {}

  // Memory for what the kernels of a device count, all zero; see apply_cuda. Tensors on a device
  // without it take the Python rule.
  void add_tickets(const py::object& tensor);
  // `storage`: the options that decide how values are stored, by name.
  void add_group(bool python, bool capturable, bool amp_fused, const py::dict& storage);
  void add(py::handle param, const py::object& state, const py::tuple& keys,
           const py::tuple& extras, bool first_step);
  void finish(const py::dict& state);
  py::object step(const py::list& groups, const py::dict& state, int num_threads,
                  const py::object& grads, const py::object& scaling, const py::object& created,
                  const py::dict& owner);
  bool has_stepped() const { return has_stepped_; }
  py::tuple locate(std::size_t e) const {
    const Entry& entry = entries_.at(e);
    return py::make_tuple(entry.group, entry.index, !entry.python);
  }

 private:
  enum class Verdict { kFine, kNoGrad, kPython, kStale };
  static constexpr std::size_t kBlock = 32;  // tensors looked at together

  // What one step sees of one entry; borrowed from the group's list and the optimizer's state.
  struct Seen {
    std::size_t entry = 0;
    PyObject* state = nullptr;
    PyObject* tensors[StateLayout::kNumRoles] = {};
    PyObject* grad = nullptr;  // owned by held_
    bool is_copy = false;      // the gradient, made for this step
  };

  // A step count to be written once everything has been checked.
  struct StepCount {
    void* data;
    Dtype dtype;
    double value;
    int device;  // of the parameter
  };

  struct Group {
    std::size_t num_params = 0;
    bool python = false;
    bool capturable = false;
    bool amp_fused = false;
    int state_mask = -1;        // -1 until the first step
    int options_device = kCpu;  // see Options::device
    float ema_weight = 0;
    std::vector<std::pair<py::object, py::object>> storage;
    std::unique_ptr<GroupRule> rule;
    // Updates prepared in this step, by step count and dtypes.
    std::map<std::pair<double, std::uint32_t>, std::uint32_t> prepared;
    std::pair<double, std::uint32_t> last_key;
    std::uint32_t last_update = 0;
  };

  void own(py::object owner, Expected* expected);
  bool add_state(PyObject* state, const py::tuple& keys, const py::tuple& extras, Entry* entry);
  static bool is_extra(int extra, const TensorView& tensor, const Entry& entry,
                       const TensorView& param);
  SlotDtypes stored_as(const Entry& entry) const;
  int layout_of(PyObject* state, const py::tuple& keys, const py::tuple& extras);
  std::vector<std::int64_t> overlaps() const;
  void list_written();
  bool is_written(const void* data) const;
  TensorView view_of(const Entry& entry, const Expected& tensor) const {
    const std::int64_t* shape = dims_.data() + entry.dims;
    return {tensor.data, tensor.dtype, entry.ndim, shape, shape + entry.ndim};
  }

  bool read_groups(const py::list& groups);
  Verdict look(const py::dict& state, const py::object& grads, py::list* todo);
  Verdict look_at(Seen* block, std::size_t size, const py::object& grads, py::list* todo);
  bool find_tensors(Seen* seen) const;
  void fetch(const Seen* block, std::size_t size) const;
  void bump_versions();
  Verdict check(const Seen& seen);
  bool is_where_expected(PyObject* tensor, const Entry& entry, Expected* expected);
  // Whether the process holds the same elements of both: then shards can be updated one by one.
  static bool is_placed_like(PyObject* tensor, const Entry& entry) {
    return entry.spec ? is_sharded_like(tensor, entry) : is_plain_tensor(tensor);
  }
  static bool is_sharded_like(PyObject* tensor, const Entry& entry);
  bool is_usable(const Entry& entry, const Seen& seen, const TensorView& now) const;
  bool are_extras_expected(const Seen& seen);
  bool add_task(const Seen& seen, const TensorView& grad);
  bool counts_on_device(const Entry& entry, const TensorView& step) const;
  static constexpr std::uint32_t kUndefined = ~0u;
  std::uint32_t prepared_update(Group* group, double step, const SlotDtypes& dtypes, int device,
                                Where where);
  Step& step_on(int device);
  void read_scaling(const py::object& scaling);
  void launch(int num_threads, const py::dict& owner, const py::object& created);

  const RuleEntry& rule_;
  const std::string owner_;  // for messages
  std::vector<Entry> entries_;
  std::vector<std::int64_t> dims_;
  std::vector<Expected> extras_;  // kNumExtras for each entry that has any
  std::vector<Group> groups_;
  std::vector<StateLayout> layouts_;
  std::vector<std::int64_t> state_order_;  // entries in the order of the optimizer's state, or -1
  std::vector<std::size_t> stateless_;     // the other entries
  std::unordered_set<const void*> written_starts_;  // where written tensors begin
  std::vector<bool> written_filter_;                // a Bloom filter of the same
  py::list owners_;

  // Of the running step.
  bool running_ = false;
  bool has_stepped_ = false;  // in the last call of step()
  bool moved_ = false;        // since overlaps were looked for
  std::vector<py::object> held_;
  std::vector<PyObject*> written_;  // of the block
  std::vector<std::size_t> updated_;
  std::vector<StepCount> counts_;
  std::vector<std::uint64_t*> roundings_;  // counts of random bits used, on the CPU
  std::vector<Step> steps_;                // the CPU first, then the GPUs
  std::map<int, std::pair<py::object, std::uint32_t*>> tickets_;  // by device
};

// Gives a small tensor a second owner. A tensor that Python alone owns costs torch two trips
// through the interpreter lock whenever C++ borrows it: with a second owner the exchange and the
// version bump of the four tensors of a small Adam parameter went from 0.40 to 0.25 us (EPYC 9005,
// 2026-11).
void Plan::own(py::object owner, Expected* expected) {
  expected->owned = !owner.is_none();
  if (expected->owned) owners_.append(std::move(owner));
}

void Plan::add_tickets(const py::object& tensor) {
  TensorView now;
  if (!view(tensor.ptr(), &now) || now.dtype != Dtype::kFloat32 || numel(now) < kMaxTableTensors) {
    throw py::value_error("tickets must be float32 zeros on a device");
  }
  tickets_[now.device] = {tensor, static_cast<std::uint32_t*>(now.data)};
}

void Plan::add_group(bool python, bool capturable, bool amp_fused, const py::dict& storage) {
  groups_.emplace_back();
  groups_.back().python = python;
  groups_.back().capturable = capturable;
  groups_.back().amp_fused = amp_fused;
  for (const auto& [name, value] : storage) {
    groups_.back().storage.emplace_back(py::reinterpret_borrow<py::object>(name),
                                        py::reinterpret_borrow<py::object>(value));
  }
}

// A parameter of the last group.
void Plan::add(py::handle param, const py::object& state, const py::tuple& keys,
               const py::tuple& extras, bool first_step) {
  Group& group = groups_.back();
  Entry entry;
  entry.param = param.ptr();
  entry.group = static_cast<std::uint32_t>(groups_.size() - 1);
  entry.index = static_cast<std::uint32_t>(group.num_params++);
  entry.first_step = first_step;
  for (int e = 0; e < kScales - kMaxSlots; ++e) entry.needs_state |= !extras[e].is_none();
  TensorView now;
  if (view(entry.param, &now)) {
    entry.ndim = now.ndim;
    entry.dims = dims_.size();
    dims_.insert(dims_.end(), now.shape, now.shape + now.ndim);
    dims_.insert(dims_.end(), now.strides, now.strides + now.ndim);
    entry.numel = numel(now);
    entry.device = now.device;
    if (now.device != kCpu && tickets_.count(now.device) == 0) entry.python = true;
    entry.data.data = now.data;
    entry.data.dtype = now.dtype;
    entry.stored = stored_as(entry);
    if (is_plain_tensor(entry.param)) {
      own(torch.own_param(param), &entry.data);
    } else {
      entry.spec = param.attr("_spec");
    }
    entry.python |= group.python || !is_flat(now) || has_negative_bit(entry.param);
  } else {
    entry.python = true;
  }
  if (!state.is_none() && !add_state(state.ptr(), keys, extras, &entry)) entry.python = true;
  entries_.push_back(std::move(entry));
}

// False if the kernels cannot take the state.
bool Plan::add_state(PyObject* state, const py::tuple& keys, const py::tuple& extras,
                     Entry* entry) {
  if (!PyDict_Check(state) || entry->ndim < 0) return false;
  const int layout = layout_of(state, keys, extras);
  Expected extra[kNumExtras];
  bool has_extras = false;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  bool found[StateLayout::kNumRoles] = {};
  for (const auto& [name, role] : layouts_[layout].keys) {
    PyDict_Next(state, &position, &key, &value);
    TensorView now;
    if (role == StateLayout::kIgnored) continue;
    if (!view_any(value, &now) || has_negative_bit(value)) return false;
    if (reinterpret_cast<std::uintptr_t>(now.data) % itemsize(now.dtype) != 0) return false;
    if (role == StateLayout::kStep) {
      if (numel(now) != 1 || !is_float(now.dtype) || itemsize(now.dtype) < 4) return false;
      entry->device_step = counts_on_device(*entry, now);
      if (entry->device_step && now.dtype != Dtype::kFloat32) return false;
      if (!entry->device_step && !is_host(now)) return false;
    } else {
      if (now.device != entry->device) return false;
      const bool is_state = role < StateLayout::kStep;
      const int kind = is_state ? 0 : role - StateLayout::kFirstExtra + kMaxSlots;
      if ((is_state || is_elementwise(kind)) && !is_placed_like(value, *entry)) return false;
      const TensorView param = view_of(*entry, entry->data);
      if (!is_state) {
        if (!is_extra(kind, now, *entry, param)) return false;
        extra[kind - kMaxSlots].data = now.data;
        extra[kind - kMaxSlots].dtype = now.dtype;
        extra[kind - kMaxSlots].exists = true;
        found[role] = has_extras = true;
        continue;
      }
      if (!same_layout(now, param) || now.dtype > Dtype::kUInt8) return false;
    }
    entry->state[role].data = now.data;
    entry->state[role].dtype = now.dtype;
    entry->state[role].exists = true;
    if (is_plain_tensor(value)) own(torch.own_state(py::handle(value)), &entry->state[role]);
    found[role] = true;
  }
  for (std::size_t s = 0; s < keys.size(); ++s) {
    if (!found[s]) return false;
    const int scale = StateLayout::kFirstExtra + kScales - kMaxSlots + static_cast<int>(s);
    if (!is_float(entry->state[s].dtype) && !found[scale]) return false;
  }
  if (rule_.has_step && !found[StateLayout::kStep]) return false;
  for (int e = 0; e < kScales - kMaxSlots; ++e) {
    if (!extras[e].is_none() && !found[StateLayout::kFirstExtra + e]) return false;
  }
  entry->layout = layout;
  if (has_extras) {
    entry->extras = static_cast<std::int64_t>(extras_.size());
    extras_.insert(extras_.end(), extra, extra + kNumExtras);
  }
  entry->stored = stored_as(*entry);
  return can_combine(entry->stored) &&
         (entry->stored.is_plain() || entry->data.dtype != Dtype::kFloat64);
}

// Whether the kernels can take what the state has under the name of an extra.
bool Plan::is_extra(int extra, const TensorView& tensor, const Entry& entry,
                    const TensorView& param) {
  const auto address = reinterpret_cast<std::uintptr_t>(tensor.data);
  if (tensor.device != entry.device || address % itemsize(tensor.dtype) != 0) return false;
  if (extra == kMaster) {
    const bool split = tensor.dtype == Dtype::kInt16 && param.dtype == Dtype::kBFloat16;
    const bool whole = tensor.dtype == Dtype::kFloat32 && itemsize(param.dtype) == 2;
    return (split || whole) && same_layout(tensor, param);
  }
  if (extra == kEma) {
    return is_float(tensor.dtype) && tensor.dtype != kNone && same_layout(tensor, param);
  }
  // A shard has one row of several, as long as the longest.
  if (tensor.ndim < 1 || (tensor.ndim > 1 && !entry.spec)) return false;
  const std::int64_t length = tensor.shape[tensor.ndim - 1];
  const bool is_row =
      numel(tensor) == length && (tensor.strides[tensor.ndim - 1] == 1 || length < 2);
  if (extra == kRounding) {
    return is_row && tensor.dtype == Dtype::kInt64 && length == 2 &&
           param.dtype == Dtype::kBFloat16;
  }
  const std::int64_t scales = num_scales(entry.numel);
  return is_row && tensor.dtype == Dtype::kFloat32 &&
         (length == scales || (entry.spec && length > scales));
}

SlotDtypes Plan::stored_as(const Entry& entry) const {
  SlotDtypes dtypes;
  dtypes.num_slots = 2;
  dtypes.slots[0] = dtypes.slots[1] = entry.data.dtype;
  for (int s = 0; s < kMaxStates; ++s) {
    if (entry.state[s].exists) dtypes.slots[dtypes.num_slots++] = entry.state[s].dtype;
  }
  if (entry.extras >= 0) {
    const auto extra = [&](int which) -> const Expected& {
      return extras_[static_cast<std::size_t>(entry.extras + which - kMaxSlots)];
    };
    if (extra(kMaster).exists) dtypes.master = extra(kMaster).dtype;
    if (extra(kEma).exists) dtypes.ema = extra(kEma).dtype;
    dtypes.stochastic = extra(kRounding).exists;
  }
  return dtypes;
}

// A step count beside its parameter is read and written by the kernel.
bool Plan::counts_on_device(const Entry& entry, const TensorView& step) const {
#if defined(FUSEDOPT_CUDA_ON_HOST)
  static_cast<void>(step);
  return groups_[entry.group].capturable || groups_[entry.group].amp_fused;
#else
  return entry.device != kCpu && step.device == entry.device;
#endif
}

int Plan::layout_of(PyObject* state, const py::tuple& keys, const py::tuple& extras) {
  StateLayout layout;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(state, &position, &key, &value)) {
    int role = StateLayout::kIgnored;
    const auto name = py::reinterpret_borrow<py::object>(key);
    for (std::size_t s = 0; s < keys.size(); ++s) {
      if (name.equal(keys[s])) role = static_cast<int>(s);
    }
    for (std::size_t e = 0; e < extras.size(); ++e) {
      if (!name.is_none() && name.equal(extras[e])) {
        role = StateLayout::kFirstExtra + static_cast<int>(e);
      }
    }
    if (rule_.has_step && name.equal(py::str("step"))) role = StateLayout::kStep;
    layout.keys.emplace_back(name, role);
  }
  const auto same = [&](const StateLayout& other) {
    return std::equal(layout.keys.begin(), layout.keys.end(), other.keys.begin(), other.keys.end(),
                      [](const auto& a, const auto& b) {
                        return a.first.ptr() == b.first.ptr() && a.second == b.second;
                      });
  };
  const auto found = std::find_if(layouts_.begin(), layouts_.end(), same);
  if (found != layouts_.end()) return static_cast<int>(found - layouts_.begin());
  layouts_.push_back(std::move(layout));
  return static_cast<int>(layouts_.size()) - 1;
}

void Plan::finish(const py::dict& state) {
  std::unordered_map<PyObject*, std::size_t> entry_of;
  for (std::size_t e = 0; e < entries_.size(); ++e) {
    const auto [first, is_new] = entry_of.emplace(entries_[e].param, e);
    if (!is_new) {  // listed twice: updated twice, one after the other
      entries_[e].python = entries_[first->second].python = true;
      entries_[e].layout = -1;
    }
  }
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(state.ptr(), &position, &key, &value)) {
    const auto found = entry_of.find(key);
    const bool known = found != entry_of.end() && entries_[found->second].layout >= 0;
    state_order_.push_back(known ? static_cast<std::int64_t>(found->second) : -1);
  }
  for (std::size_t e = 0; e < entries_.size(); ++e) {
    if (entries_[e].layout < 0) stateless_.push_back(e);
  }
  for (const std::int64_t e : overlaps()) entries_[e].python = true;
  list_written();
}

std::size_t filter_bit(const void* data, std::size_t size) {
  return (reinterpret_cast<std::uintptr_t>(data) * 0x9E3779B97F4A7C15u >> 20) & (size - 1);
}

void Plan::list_written() {
  std::size_t size = 1024;
  while (size < entries_.size() * (1 + kMaxStates) * 16) size *= 2;
  written_filter_.assign(size, false);
  written_starts_.clear();
  const auto add = [&](const Expected& tensor) {
    if (tensor.data == nullptr) return;
    written_filter_[filter_bit(tensor.data, size)] = true;
    written_starts_.insert(tensor.data);
  };
  for (const Entry& entry : entries_) {
    add(entry.data);
    for (int s = 0; s < kMaxStates; ++s) add(entry.state[s]);
  }
  for (const Expected& extra : extras_) add(extra);
}

bool Plan::is_written(const void* data) const {
  return written_filter_[filter_bit(data, written_filter_.size())] &&
         written_starts_.count(data) != 0;
}

// Entries whose memory another entry writes too.
std::vector<std::int64_t> Plan::overlaps() const {
  std::vector<WrittenRange> ranges;
  ranges.reserve(entries_.size() * (2 + kMaxStates));
  for (std::size_t e = 0; e < entries_.size(); ++e) {
    const Entry& entry = entries_[e];
    const auto owner = static_cast<std::int64_t>(e);
    if (entry.data.data == nullptr) continue;
    ranges.push_back(written_range(view_of(entry, entry.data), owner));
    for (int s = 0; s < kMaxStates; ++s) {
      if (entry.state[s].data == nullptr) continue;
      ranges.push_back(written_range(view_of(entry, entry.state[s]), owner));
    }
    for (int e = 0; e < kNumExtras && entry.extras >= 0; ++e) {
      const Expected& extra = extras_[static_cast<std::size_t>(entry.extras + e)];
      if (extra.data == nullptr) continue;
      const std::int64_t listed = e + kMaxSlots == kRounding ? 2 : num_scales(entry.numel);
      const std::int64_t stride = 1;
      ranges.push_back(written_range(is_elementwise(e + kMaxSlots)
                                         ? view_of(entry, extra)
                                         : TensorView{extra.data, extra.dtype, 1, &listed, &stride},
                                     owner));
    }
    const Expected& step = entry.state[StateLayout::kStep];
    if (step.data != nullptr) ranges.push_back(written_range({step.data, step.dtype}, owner));
  }
  return overlapping_owners(std::move(ranges));
}

// Reads this step's options. False if the groups are not those of the plan.
bool Plan::read_groups(const py::list& groups) {
  if (groups.size() != groups_.size()) return false;
  std::size_t e = 0;
  for (std::size_t g = 0; g < groups_.size(); ++g) {
    Group& group = groups_[g];
    PyObject* dict = PyList_GET_ITEM(groups.ptr(), g);
    PyObject* params = PyDict_Check(dict) ? PyDict_GetItemString(dict, "params") : nullptr;
    if (params == nullptr || !PyList_Check(params) ||
        static_cast<std::size_t>(PyList_GET_SIZE(params)) != group.num_params) {
      return false;
    }
    for (std::size_t i = 0; i < group.num_params; ++i, ++e) {
      if (PyList_GET_ITEM(params, i) != entries_[e].param) return false;
    }
    const Options options(dict, owner_ + ", param group " + std::to_string(g));
    const bool python = options.get("differentiable", 0) != 0;
    if (python != group.python || options.capturable() != group.capturable) return false;
    if (python) continue;  // the Python rule reads its options itself
    group.rule = rule_.read(options);
    group.options_device = options.device();
    for (const auto& [name, value] : group.storage) {
      PyObject* const now = PyDict_GetItem(dict, name.ptr());
      if (!value.equal(now == nullptr ? py::handle(Py_None) : py::handle(now))) return false;
    }
    group.ema_weight = static_cast<float>(1 - options.get("ema", 1));
    const int mask = static_cast<int>(group.rule->state_mask());
    if (group.state_mask >= 0 && mask != group.state_mask) return false;
    group.state_mask = mask;
    group.prepared.clear();
  }
  return true;
}

// Looks at every tensor of the step and lists what there is to do. Writes no tensor.
Plan::Verdict Plan::look(const py::dict& state, const py::object& grads, py::list* todo) {
  Seen block[kBlock];
  std::size_t size = 0;
  const auto see = [&](std::size_t e, PyObject* entry_state) {
    block[size++] = Seen{e, entry_state};
    if (size < kBlock) return Verdict::kFine;
    size = 0;
    return look_at(block, kBlock, grads, todo);
  };
  Py_ssize_t position = 0;
  PyObject *key, *value;
  std::size_t seen_states = 0;
  while (PyDict_Next(state.ptr(), &position, &key, &value)) {
    if (seen_states == state_order_.size()) return Verdict::kStale;
    const std::int64_t e = state_order_[seen_states++];
    if (e < 0) continue;
    if (entries_[e].param != key || see(e, value) == Verdict::kStale) return Verdict::kStale;
  }
  if (seen_states != state_order_.size()) return Verdict::kStale;
  for (const std::size_t e : stateless_) {
    if (see(e, nullptr) == Verdict::kStale) return Verdict::kStale;
  }
  return look_at(block, size, grads, todo);
}

// Each pass over the block waits for memory once, not once per tensor: after a backward nothing
// of this is in a near cache.
Plan::Verdict Plan::look_at(Seen* block, std::size_t size, const py::object& grads,
                            py::list* todo) {
  static PyObject* const grad_name = PyUnicode_InternFromString("grad");
  for (std::size_t i = 0; i < size; ++i) {
    if (block[i].state != nullptr && !find_tensors(&block[i])) return Verdict::kStale;
  }
  fetch(block, size);
  for (std::size_t i = 0; i < size; ++i) {
    PyObject* grad = PyObject_GetAttr(entries_[block[i].entry].param, grad_name);
    if (grad == nullptr) throw py::error_already_set();
    held_.push_back(py::reinterpret_steal<py::object>(grad));
    block[i].grad = grad;
  }
  fetch(block, size);
  if (!grads.is_none()) {
    for (std::size_t i = 0; i < size; ++i) {
      const py::int_ key(block[i].entry);
      if (PyObject* other = PyDict_GetItem(grads.ptr(), key.ptr())) {
        block[i].grad = other;
        block[i].is_copy = true;
      }
    }
  }
  written_.clear();
  for (std::size_t i = 0; i < size; ++i) {
    const Verdict verdict = check(block[i]);
    if (verdict == Verdict::kStale) return verdict;
    if (verdict == Verdict::kPython) todo->append(block[i].entry);
  }
  bump_versions();
  return Verdict::kFine;
}

// Tells autograd that the tensors of the block are written. That happens before the last tensor has
// been checked, while torch's records are in the cache: for the four tensors of a small Adam
// parameter 0.26 us instead of 0.33 after a backward (EPYC 9005, 2026-11). If the step ends with an
// error then versions have moved for nothing.
void Plan::bump_versions() {
  py::list written(written_.size());
  for (std::size_t i = 0; i < written_.size(); ++i) {
    Py_INCREF(written_[i]);
    PyList_SET_ITEM(written.ptr(), static_cast<Py_ssize_t>(i), written_[i]);
  }
  torch.increment_version(written);
}

// Finds the state tensors by the remembered order of the keys.
bool Plan::find_tensors(Seen* seen) const {
  if (!PyDict_Check(seen->state)) return false;
  const auto& keys = layouts_[entries_[seen->entry].layout].keys;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (const auto& [name, role] : keys) {
    if (!PyDict_Next(seen->state, &position, &key, &value) || key != name.ptr()) return false;
    if (role != StateLayout::kIgnored) seen->tensors[role] = value;
  }
  return !PyDict_Next(seen->state, &position, &key, &value);
}

// Reads the memory that the checks of a block are about to need, so that they wait for it together:
// after a backward torch's records of the tensors are in no near cache. Prefetch instructions did
// nothing here, loads halved the time of the checks (1,000 x 64 Adam, EPYC 9005, 2026-11).
void Plan::fetch(const Seen* block, std::size_t size) const {
  if (torch.impl_offset == 0) return;
  constexpr std::size_t kTensors = 2 + StateLayout::kStep;
  const char* impls[kBlock * kTensors];
  std::size_t count = 0;
  const auto pointer_at = [](const char* base, std::size_t offset) {
    const char* pointer;
    std::memcpy(&pointer, base + offset, sizeof(pointer));
    return pointer;
  };
  const auto touch = [](const char* address) { (void)*const_cast<const volatile char*>(address); };
  const auto add = [&](PyObject* tensor) {
    if (tensor == nullptr || !is_plain_tensor(tensor)) return;
    const char* impl = pointer_at(reinterpret_cast<const char*>(tensor), torch.impl_offset);
    if (impl != nullptr) impls[count++] = impl;
  };
  for (std::size_t i = 0; i < size; ++i) {
    if (block[i].grad != nullptr) {
      add(block[i].grad);
      continue;
    }
    add(entries_[block[i].entry].param);
    for (int s = 0; s <= StateLayout::kStep; ++s) add(block[i].tensors[s]);
  }
  for (std::size_t i = 0; i < count; ++i) {
    for (std::size_t at = 0; at < kImplSize; at += 64) touch(impls[i] + at);
    touch(impls[i] + kImplSize - 1);
  }
  for (std::size_t i = 0; i < count; ++i) {
    for (const std::size_t offset : {torch.storage_offset, torch.version_offset}) {
      const char* record = offset == 0 ? nullptr : pointer_at(impls[i], offset);
      if (record == nullptr) continue;
      touch(record);
      touch(record + 16);
    }
  }
}

Plan::Verdict Plan::check(const Seen& seen) {
  Entry& entry = entries_[seen.entry];
  if (seen.grad == Py_None) {
    if (seen.is_copy) updated_.push_back(seen.entry);  // by the Python rule
    return Verdict::kNoGrad;
  }
  if (entry.python) return Verdict::kPython;
  TensorView grad;
  const bool is_dense = view(seen.grad, &grad);
  if (!is_dense && !rule_.has_step) return Verdict::kPython;
  const bool needs_state =
      rule_.has_step || groups_[entry.group].state_mask != 0 || entry.needs_state;
  if (needs_state && entry.layout < 0) return Verdict::kStale;
  if (!is_where_expected(entry.param, entry, &entry.data)) return Verdict::kStale;
  for (int s = 0; s < kMaxStates; ++s) {
    if (seen.tensors[s] != nullptr && !is_where_expected(seen.tensors[s], entry, &entry.state[s])) {
      return Verdict::kStale;
    }
  }
  if (entry.extras >= 0 && !are_extras_expected(seen)) return Verdict::kStale;
  if (!is_dense || !is_usable(entry, seen, grad)) return Verdict::kPython;
  if (!seen.is_copy && !is_placed_like(seen.grad, entry)) return Verdict::kPython;
  const int options_device = groups_[entry.group].options_device;
  if (options_device != kCpu && options_device != entry.device) return Verdict::kPython;
  return add_task(seen, grad) ? Verdict::kFine : Verdict::kStale;
}

// Dtype and layout must be what they were. Memory may have moved: then overlaps are looked for
// again.
bool Plan::is_where_expected(PyObject* tensor, const Entry& entry, Expected* expected) {
  TensorView now;
  if (!view_any(tensor, &now) || now.dtype != expected->dtype || now.device != entry.device ||
      !same_layout(now, view_of(entry, *expected)) || !is_placed_like(tensor, entry)) {
    return false;
  }
  if (now.data != expected->data) {
    if (reinterpret_cast<std::uintptr_t>(now.data) % itemsize(now.dtype) != 0) return false;
    if (has_negative_bit(tensor)) return false;
    expected->data = now.data;
    expected->owned = false;
    moved_ = true;
  }
  return true;
}

// As is_where_expected, of tensors that do not all look like the parameter.
bool Plan::are_extras_expected(const Seen& seen) {
  Entry& entry = entries_[seen.entry];
  for (int e = 0; e < kNumExtras; ++e) {
    PyObject* const tensor = seen.tensors[StateLayout::kFirstExtra + e];
    Expected& expected = extras_[static_cast<std::size_t>(entry.extras + e)];
    if (tensor == nullptr) continue;
    TensorView now;
    if (!view_any(tensor, &now) || now.dtype != expected.dtype ||
        !is_extra(e + kMaxSlots, now, entry, view_of(entry, entry.data)) ||
        has_negative_bit(tensor)) {
      return false;
    }
    if (is_elementwise(e + kMaxSlots) && !is_placed_like(tensor, entry)) return false;
    moved_ |= now.data != expected.data;
    expected.data = now.data;
  }
  return true;
}

bool Plan::is_sharded_like(PyObject* tensor, const Entry& entry) {
  if (is_plain_tensor(tensor)) return false;
  const py::object spec = py::handle(tensor).attr("_spec");
  if (spec.is(entry.spec)) return true;
  for (const char* part : {"mesh", "placements", "shard_order"}) {
    const py::object none = py::none();  // shard_order is younger than torch 2.10
    if (!py::getattr(spec, part, none).equal(py::getattr(entry.spec, part, none))) return false;
  }
  return true;
}

bool Plan::is_usable(const Entry& entry, const Seen& seen, const TensorView& now) const {
  if (now.device != entry.device || !same_layout(now, view_of(entry, entry.data))) return false;
  if (!can_combine({{entry.data.dtype, now.dtype}, 2})) return false;
  const auto begin = reinterpret_cast<std::uintptr_t>(now.data);
  if (begin % itemsize(now.dtype) != 0) return false;
  // A gradient may be the parameter itself, but not overlap it in another way.
  const auto param = reinterpret_cast<std::uintptr_t>(entry.data.data);
  if (begin != param && begin < param + entry.numel * itemsize(entry.data.dtype) &&
      param < begin + entry.numel * itemsize(now.dtype)) {
    return false;
  }
  // If it is another tensor of this step it is copied, so that all gradients are read before
  // anything is written. The copy may be where a tensor was that is in no step of late.
  if (begin != param && !seen.is_copy && is_written(now.data)) return false;
  if (begin == param && now.dtype != entry.data.dtype && entry.numel != 0) return false;
  // A view of the imaginary part of a conjugate is the only tensor that is negated lazily. It has
  // other strides than a parameter, except where strides do not matter.
  return entry.numel > 1 || !has_negative_bit(seen.grad);
}

// False if the step count of the tensor cannot go on.
bool Plan::add_task(const Seen& seen, const TensorView& grad) {
  Entry& entry = entries_[seen.entry];
  double step = entry.first_step ? 1 : 2;
  if (rule_.has_step) {
    PyObject* tensor = seen.tensors[StateLayout::kStep];
    const Expected& expected = entry.state[StateLayout::kStep];
    TensorView now;
    if (!view(tensor, &now) || now.dtype != expected.dtype || numel(now) != 1) return false;
    if (counts_on_device(entry, now) != entry.device_step) return false;
    if (!entry.device_step && !is_host(now)) return false;
    if (now.data != expected.data) {
      entry.state[StateLayout::kStep].data = now.data;
      entry.state[StateLayout::kStep].owned = false;
      moved_ = true;
    }
  }
  if (rule_.has_step && !entry.device_step) {
    const Expected& expected = entry.state[StateLayout::kStep];
    const TensorView now{expected.data, expected.dtype};
    const bool is_double = now.dtype == Dtype::kFloat64;
    const double count = is_double ? *static_cast<const double*>(now.data)
                                   : static_cast<double>(*static_cast<const float*>(now.data));
    step = count + 1;
    const bool counts_on = is_double ? step > count : static_cast<float>(step) > count;
    if (!(count >= 0) || !counts_on) return false;
    counts_.push_back({now.data, now.dtype, step, entry.device});
  }
  TensorTask task;
  SlotDtypes dtypes = entry.stored;
  dtypes.slots[1] = grad.dtype;
  int num_slots = 0;
  task.slots[num_slots++] = entry.data.data;
  task.slots[num_slots++] = grad.data;
  // What the plan does not own is held while the interpreter lock is released.
  const auto writes = [&](PyObject* tensor, const Expected& expected) {
    written_.push_back(tensor);
    if (!expected.owned) held_.push_back(py::reinterpret_borrow<py::object>(tensor));
    if (PyObject* const local = local_of(tensor); local != tensor) {
      written_.push_back(local);
      held_.push_back(py::reinterpret_borrow<py::object>(local));
    }
  };
  writes(entry.param, entry.data);
  for (int s = 0; s <= kMaxStates; ++s) {
    if (seen.tensors[s] == nullptr) continue;
    writes(seen.tensors[s], entry.state[s]);
    if (s != StateLayout::kStep) task.slots[num_slots++] = entry.state[s].data;
  }
  if (entry.extras >= 0) {
    std::vector<void*>& pointers = step_on(entry.device).extras;
    task.extras = static_cast<std::int64_t>(pointers.size());
    pointers.insert(pointers.end(), task.slots, task.slots + kMaxSlots);
    for (int e = 0; e < kNumExtras; ++e) {
      const Expected& expected = extras_[static_cast<std::size_t>(entry.extras + e)];
      PyObject* const tensor = seen.tensors[StateLayout::kFirstExtra + e];
      pointers.push_back(expected.data);
      if (tensor != nullptr) writes(tensor, expected);
    }
    if (dtypes.stochastic && entry.device == kCpu) {
      roundings_.push_back(static_cast<std::uint64_t*>(pointers[task.extras + kRounding]) + 1);
    }
  }
  task.numel = entry.numel;
  task.first_step = entry.first_step;
  task.step = entry.device_step ? entry.state[StateLayout::kStep].data : nullptr;
  Group& group = groups_[entry.group];
  const bool prepares = entry.device_step || group.options_device != kCpu;
  const Where where = entry.device == kCpu ? Where::kCpu
                      : prepares           ? Where::kGpuPrepares
                                           : Where::kGpu;
  task.update = prepared_update(&group, step, dtypes, entry.device, where);
  if (task.update == kUndefined) return false;  // the Python side says why
  step_on(entry.device).tasks.push_back(task);
  updated_.push_back(seen.entry);
  return true;
}

Step& Plan::step_on(int device) {
  const auto index = static_cast<std::size_t>(device + 1);
  if (index >= steps_.size()) steps_.resize(index + 1);
  return steps_[index];
}

std::uint32_t Plan::prepared_update(Group* group, double step, const SlotDtypes& dtypes, int device,
                                    Where where) {
  const auto place = static_cast<std::uint32_t>(device + 1) * 4 + static_cast<std::uint32_t>(where);
  const std::pair<double, std::uint32_t> key{step, place << SlotDtypes::kKeyBits | dtypes.key()};
  if (!group->prepared.empty() && key == group->last_key) return group->last_update;
  std::vector<PreparedUpdate>& updates = step_on(device).updates;
  const auto [found, is_new] =
      group->prepared.emplace(key, static_cast<std::uint32_t>(updates.size()));
  if (is_new) {
    constexpr double kAny = std::numeric_limits<double>::infinity();
    const double largest = dtypes.slots[0] == Dtype::kFloat64
                               ? std::numeric_limits<double>::max()
                               : static_cast<double>(std::numeric_limits<float>::max());
    const bool prepares = where == Where::kGpuPrepares;  // only the device knows the step
    if (!group->rule->is_defined(prepares ? 1 : step, prepares ? kAny : largest)) return kUndefined;
    updates.push_back(group->rule->prepare(step, {dtypes, group->ema_weight}, where));
  }
  group->last_key = key;
  return group->last_update = found->second;
}

// The state of the optimizer as it will be. Tensors hash with Python code, during which an interrupt
// may come or another thread run; a merge of dicts uses the hashes that they know.
py::dict with_created(const py::dict& state, const py::object& created) {
  if (created.is_none()) return state;
  auto all = py::reinterpret_steal<py::dict>(PyDict_Copy(state.ptr()));
  if (!all || PyDict_Update(all.ptr(), created.ptr()) != 0) throw py::error_already_set();
  return all;
}

// None if the step is done. Else nothing was written, and it returns the entries that need the
// Python side, or False if the plan does not fit any more. `created`: new state by parameter, which
// becomes part of `owner` together with the step, or None.
py::object Plan::step(const py::list& groups, const py::dict& state, int num_threads,
                      const py::object& grads, const py::object& scaling, const py::object& created,
                      const py::dict& owner) {
  if (running_) throw std::runtime_error(owner_ + ": step() is running in another thread");
  struct Running {
    explicit Running(Plan* plan) : plan(plan) { plan->running_ = true; }
    ~Running() {
      plan->running_ = false;
      plan->held_.clear();
    }
    Plan* plan;
  } running(this);
  has_stepped_ = false;

  py::list todo;
  const py::dict all = with_created(state, created);
  const auto look_at_all = [&] {
    updated_.clear();
    counts_.clear();
    roundings_.clear();
    for (Step& step : steps_) step.clear();
    todo = py::list();
    return read_groups(groups) && look(all, grads, &todo) != Verdict::kStale;
  };
  if (!look_at_all()) return py::bool_(false);
  if (moved_) {
    for (const std::int64_t e : overlaps()) {
      if (!entries_[e].python) return py::bool_(false);
    }
    list_written();
    moved_ = false;
    // The gradients were compared with the places where the tensors were before.
    if (!look_at_all()) return py::bool_(false);
  }
  if (!todo.empty()) return std::move(todo);
  read_scaling(scaling);
  for (const StepCount& count : counts_) {
    // Only the GPU knows whether it will count this step.
    if (count.device != kCpu && step_on(count.device).scaling.found_inf != nullptr) {
      return py::bool_(false);
    }
  }
  launch(num_threads, owner, created);
  return py::none();
}

// The scalars of each device: {device: (found_inf, loss_scale, clip)}, where each may be None.
void Plan::read_scaling(const py::object& scaling) {
  if (scaling.is_none()) return;
  for (const auto& [key, tensors] : py::cast<py::dict>(scaling)) {
    static_cast<void>(key);
    int device = kCpu;
    const auto scalar = [&](const py::handle tensor, Dtype dtype) {
      TensorView now;
      if (tensor.is_none()) return static_cast<void*>(nullptr);
      if (!view(tensor.ptr(), &now) || now.dtype != dtype) {
        throw py::value_error(owner_ + ": grad_scale and found_inf must be float32 tensors");
      }
      device = now.device;
      return now.data;
    };
    const auto [found_inf, loss_scale, clip] =
        tensors.cast<std::tuple<py::object, py::object, py::object>>();
    StepScaling step_scaling;
    step_scaling.found_inf = static_cast<const float*>(scalar(found_inf, Dtype::kFloat32));
    step_scaling.loss_scale = static_cast<const float*>(scalar(loss_scale, Dtype::kFloat32));
    step_scaling.clip = static_cast<const double*>(scalar(clip, Dtype::kFloat64));
    step_on(device).scaling = step_scaling;
  }
}

void* current_stream([[maybe_unused]] int device) {
  void* stream = nullptr;
#if !defined(FUSEDOPT_CUDA_ON_HOST)
  if (torch.exchange->current_work_stream(dlpack::kCuda, device, &stream) != 0) {
    throw py::error_already_set();
  }
#endif
  return stream;
}

// What can fail comes first, then what is written from here. To Python it is one action: no code of
// an interrupt or of a destructor runs between the new state, the update and the step counts.
void Plan::launch(int num_threads, const py::dict& owner, const py::object& created) {
  std::vector<void*> streams;
  for (std::size_t s = 1; s < steps_.size(); ++s) {
    const int device = static_cast<int>(s) - 1;
    streams.push_back(steps_[s].tasks.empty() ? nullptr : current_stream(device));
#if FUSEDOPT_HAS_CUDA
    if (steps_[s].tasks.empty() || !is_capturing(streams.back())) continue;
    for (std::size_t g = 0; g < groups_.size(); ++g) {
      if (groups_[g].capturable) continue;
      throw std::runtime_error(owner_ +
                               ": step() is being captured into a CUDA graph, but param "
                               "group " +
                               std::to_string(g) +
                               " has capturable=False; construct "
                               "the optimizer with capturable=True");
    }
#endif
  }
  const LaunchPlan chunks = steps_.empty() ? LaunchPlan() : chunks_of(steps_[0]);
  if (!created.is_none() && PyDict_Update(owner.ptr(), created.ptr()) != 0) {
    throw py::error_already_set();
  }
  has_stepped_ = true;
  for (const std::size_t e : updated_) entries_[e].first_step = false;
  const py::gil_scoped_release release;
  bool skipped = false;
#if FUSEDOPT_HAS_CUDA
  for (std::size_t s = 1; s < steps_.size(); ++s) {
    if (steps_[s].tasks.empty()) continue;
    const int device = static_cast<int>(s) - 1;
    apply_cuda(steps_[s], device, streams[s - 1], tickets_.at(device).second);
  }
#endif
  if (!steps_.empty()) skipped = !apply_cpu(&steps_[0], chunks, num_threads);
  if (!skipped) {
    for (std::uint64_t* rounding : roundings_) ++*rounding;
  }
  for (const StepCount& count : counts_) {
    if (skipped && count.device == kCpu) continue;
    if (count.dtype == Dtype::kFloat64) {
      *static_cast<double*>(count.data) = count.value;
    } else {
      *static_cast<float*>(count.data) = static_cast<float>(count.value);
    }
  }
}

void measure(const std::vector<GradToMeasure>& grads, const GradNorm& norm,
             [[maybe_unused]] int device, int num_threads) {
#if FUSEDOPT_HAS_CUDA
  if (device != kCpu) {
    void* const stream = current_stream(device);
    const py::gil_scoped_release release;
    return grad_norm_cuda(grads, norm, device, stream);
  }
#endif
  const py::gil_scoped_release release;
  grad_norm_cpu(grads, norm, num_threads);
}

// Measures the norm of gradients on one device. `clip` is a float64 tensor there: what StepScaling
// reads, a zero for the kernel to count in, and room for sums. None if done; the size that `clip`
// must have if it is too small; or a list of the gradients that are no dense float tensors.
py::object grad_norm_of(const py::list& tensors, const py::object& clip,
                        const py::object& loss_scale, double max_norm, bool skip_nonfinite,
                        int num_threads) {
  constexpr std::int64_t kHeader = StepScaling::kNumClip + 1;
  TensorView space, scale;
  if (!view(clip.ptr(), &space) || space.dtype != Dtype::kFloat64) {
    throw py::value_error("clip must be a float64 tensor");
  }
  std::vector<GradToMeasure> grads;
  std::int64_t num_chunks = 0;
  py::list unusual;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    TensorView now;
    PyObject* const tensor = PyList_GET_ITEM(tensors.ptr(), i);
    if (!view(tensor, &now) || now.device != space.device || !is_flat(now)) {
      unusual.append(i);
      continue;
    }
    grads.push_back({now.data, now.dtype, numel(now)});
    num_chunks += grads.back().num_chunks();
  }
  if (!unusual.empty()) return std::move(unusual);
  if (num_chunks > 0x7FFFFFFF) throw py::value_error("too many gradients for one norm");
  if (numel(space) < kHeader + num_chunks) return py::int_(kHeader + num_chunks);

  GradNorm norm = {};
  norm.max_norm = max_norm;
  norm.skip_nonfinite = skip_nonfinite;
  norm.clip = static_cast<double*>(space.data);
  norm.ticket = reinterpret_cast<std::uint32_t*>(norm.clip + StepScaling::kNumClip);
  norm.partials = norm.clip + kHeader;
  norm.num_partials = static_cast<std::uint32_t>(num_chunks);
  if (!loss_scale.is_none()) {
    if (!view(loss_scale.ptr(), &scale) || scale.dtype != Dtype::kFloat32 ||
        scale.device != space.device) {
      throw py::value_error("loss_scale must be a float32 tensor on the device of the gradients");
    }
    norm.loss_scale = static_cast<const float*>(scale.data);
  }
  measure(grads, norm, space.device, num_threads);
  return py::none();
}

// Learns the layout that fetch() uses from tensors of which something is known: two that share
// storage and version counter, and a third. Nothing but these tensors' own memory is read.
void find_offsets(const py::object& sample, const py::object& alias, const py::object& other) {
  const auto address_of = [](const py::object& tensor) {
    return tensor.attr("_cdata").cast<std::uintptr_t>();
  };
  const auto word = [](std::uintptr_t base, std::size_t offset) {
    std::uintptr_t value;
    std::memcpy(&value, reinterpret_cast<const void*>(base + offset), sizeof(value));
    return value;
  };
  constexpr std::size_t kWord = sizeof(std::uintptr_t);
  const std::uintptr_t a = address_of(sample), b = address_of(alias), c = address_of(other);
  const auto object = reinterpret_cast<std::uintptr_t>(sample.ptr());
  const auto object_size = static_cast<std::size_t>(Py_TYPE(sample.ptr())->tp_basicsize);
  for (std::size_t at = sizeof(PyObject); at + kWord <= object_size; at += kWord) {
    if (word(object, at) == a) torch.impl_offset = at;
  }
  const auto storage = sample.attr("untyped_storage")().attr("_cdata").cast<std::uintptr_t>();
  for (std::size_t at = kWord; at + kWord <= kImplSize; at += kWord) {
    const std::uintptr_t value = word(a, at);
    if (value == storage) {
      torch.storage_offset = at;
    } else if (value == word(b, at) && value != word(c, at) && value % kWord == 0) {
      // Of two candidates neither is trusted.
      torch.version_offset = torch.version_offset == 0 ? at : kImplSize;
    }
  }
  if (torch.version_offset == kImplSize) torch.version_offset = 0;
}

void bind(const py::object& table, const py::object& tensor_type, const py::object& parameter_type,
          const py::object& increment_version, const py::object& own_param,
          const py::object& own_state, const py::tuple& samples) {
  const void* pointer = py::isinstance<py::int_>(table)
                            ? reinterpret_cast<void*>(table.cast<std::uintptr_t>())
                            : PyCapsule_GetPointer(table.ptr(), dlpack::kCapsuleName);
  if (pointer == nullptr) throw py::error_already_set();
  const auto* exchange = static_cast<const dlpack::ExchangeApi*>(pointer);
  while (exchange != nullptr && exchange->version.major != 1) exchange = exchange->previous;
  if (exchange == nullptr || exchange->tensor_from_py_object_no_sync == nullptr) {
    throw py::import_error("torch exports no DLPack 1.x exchange table that fusedopt knows");
  }
  torch.exchange = exchange;
  torch.tensor_type = tensor_type.inc_ref().ptr();
  torch.parameter_type = parameter_type.inc_ref().ptr();
  torch.increment_version = increment_version.inc_ref();
  torch.own_param = own_param.inc_ref();
  torch.own_state = own_state.inc_ref();
  find_offsets(samples[0], samples[1], samples[2]);
  cpu_isa();  // a bad FUSEDOPT_CPU_ISA is an error now, not at the first step
  shares_always();
}

void set_dtensor_type(const py::object& type) {
  if (torch.dtensor_type == nullptr) torch.dtensor_type = type.inc_ref().ptr();
}

std::string describe() {
  std::string text = std::string("cpu, ") + name(cpu_isa());
#if defined(_OPENMP)
  text += ", OpenMP";
#else
  text += ", one thread: built without OpenMP";
#endif
  return text;
}

// A plain in-place loop with the memory traffic of a step, for benchmarks.
void memory_floor_of(const py::list& reads, const py::list& writes, int num_threads) {
  std::vector<void*> arrays;
  std::int64_t bytes = -1;
  for (const py::list& tensors : {writes, reads}) {
    for (const py::handle tensor : tensors) {
      TensorView now;
      if (!view(tensor.ptr(), &now) || !is_flat(now)) {
        throw py::value_error("memory_floor takes contiguous float tensors on the CPU");
      }
      const auto size = static_cast<std::int64_t>(itemsize(now.dtype)) * numel(now);
      if (bytes >= 0 && size != bytes) throw py::value_error("memory_floor: sizes differ");
      bytes = size;
      arrays.push_back(now.data);
    }
  }
  py::gil_scoped_release release;
  memory_floor(arrays.data(), static_cast<int>(writes.size()), static_cast<int>(reads.size()),
               bytes, num_threads);
}

}  // namespace

PYBIND11_MODULE(FUSEDOPT_MODULE_NAME, module) {
  module.def("bind", &bind);
  module.def("set_dtensor_type", &set_dtensor_type);
  module.def("describe", &describe);
  module.def("describe_cuda", [] { return FUSEDOPT_CUDA_STATUS; });  // with CUDA or why not
#if FUSEDOPT_HAS_CUDA
  module.def("cuda_problem", &cuda_problem);
  module.def("num_launches", &num_launches);
#endif
#if defined(FUSEDOPT_CUDA_ON_HOST)
  module.attr("KERNEL_DEVICE") = "cpu";
#else
  module.attr("KERNEL_DEVICE") = kHasCuda ? "cuda" : "";
#endif
  module.def("grad_norm", &grad_norm_of);
  module.attr("NUM_TICKETS") = kMaxTableTensors;
  module.attr("SCALE_ELEMENTS") = kScaleElements;
  module.def("memory_floor", &memory_floor_of, py::arg("reads"), py::arg("writes"),
             py::arg("num_threads"));
  py::class_<Plan>(module, "Plan")
      .def(py::init<const std::string&, std::string>())
      .def("add_tickets", &Plan::add_tickets)
      .def("add_group", &Plan::add_group)
      .def("add", &Plan::add)
      .def("finish", &Plan::finish)
      .def("step", &Plan::step)
      .def_property_readonly("has_stepped", &Plan::has_stepped)
      .def("locate", &Plan::locate);
}

}  // namespace fusedopt
