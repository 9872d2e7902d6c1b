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
#include "plan/written_memory.h"
#include "rules/registry.h"
#include "storage/blockwise8.h"
#include "torch_layout.h"

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
  PyObject* defaultdict_type = nullptr;
  py::handle increment_version;
  py::handle parts_of, reading_problem;  // see fusedopt/memory.py
  TorchLayout layout;
} torch;

// A dict whose entries are what the C interface sees; a subclass may keep them elsewhere.
bool is_plain_dict(PyObject* object) {
  return PyDict_CheckExact(object) ||
         reinterpret_cast<PyObject*>(Py_TYPE(object)) == torch.defaultdict_type;
}

bool is_tensor(PyObject* object) {
  return PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(torch.tensor_type)) != 0;
}

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

// The TensorImpl of a plain tensor; only if the layout knows where that is.
const char* impl_of(PyObject* tensor) { return pointer_at(tensor, torch.layout.impl); }

// Where the storage of a plain tensor begins and how long it is. False if it has none.
bool storage_of(PyObject* tensor, std::uintptr_t* begin, std::uint64_t* num_bytes) {
  if (torch.layout.knows_memory()) {
    const char* const storage = pointer_at(impl_of(tensor), torch.layout.storage);
    if (storage == nullptr) return false;
    *begin = static_cast<std::uintptr_t>(word_at(storage, torch.layout.memory));
    *num_bytes = word_at(storage, torch.layout.num_bytes);
    return *begin != 0;
  }
  try {
    const py::object storage = py::handle(tensor).attr("untyped_storage")();
    *begin = storage.attr("data_ptr")().cast<std::uintptr_t>();
    *num_bytes = storage.attr("nbytes")().cast<std::uint64_t>();
  } catch (const py::error_already_set&) {
    return false;  // it has none
  }
  return *begin != 0;
}

// What a tensor is, whatever its dtype. False if it has no memory, or less than its elements span:
// the storage may have been cut short, and the exchange does not look.
bool exchange(PyObject* tensor, dlpack::Tensor* out, MemoryRange* range) {
  if (torch.exchange->tensor_from_py_object_no_sync(tensor, out) != 0) {
    PyErr_Clear();  // the Python side looks at this tensor again and says what is wrong with it
    return false;
  }
  const auto data = reinterpret_cast<std::uintptr_t>(out->data) + out->byte_offset;
  const auto element = static_cast<std::int64_t>(out->dtype.bits) * out->dtype.lanes / 8;
  *range = memory_range(data, out->ndim, out->shape, out->strides, element);
  if (range->begin == range->end) return true;
  std::uintptr_t begin;
  std::uint64_t num_bytes;
  return data != 0 && storage_of(tensor, &begin, &num_bytes) && range->begin >= begin &&
         range->end - begin <= num_bytes;
}

// The tensor as it is now, or false if the kernels cannot touch it (sparse, another device, without
// memory, ...). Conjugate and negative bits are not looked at: see has_negative_bit.
bool view_stored(PyObject* object, TensorView* out) {
  if (!is_plain_tensor(object)) {
    object = local_of(object);
    if (!is_plain_tensor(object)) return false;
  }
  dlpack::Tensor tensor;
  MemoryRange range;
  if (!exchange(object, &tensor, &range)) return false;
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
  return view_stored(object, out) && is_float(out->dtype);
}

// Whether it can be read and written from here.
bool is_host(const TensorView& tensor) {
#if defined(FUSEDOPT_CUDA_ON_HOST)
  return tensor.device == 0;
#else
  return tensor.device == kCpu;
#endif
}

// Of a tensor that is plain, or whose shard is.
bool has_negative_bit(PyObject* tensor) {
  tensor = local_of(tensor);
  if (torch.layout.knows_negative()) {
    return (word_at(impl_of(tensor), torch.layout.keys) & torch.layout.negative) != 0;
  }
  return py::cast<bool>(py::handle(tensor).attr("is_neg")());
}

class Options final : public OptionReader {
 public:
  Options(PyObject* group, std::string where) : group_(group), where_(std::move(where)) {
    capturable_ = flag("capturable", false);
  }

  bool capturable() const { return capturable_; }
  // The device of the numbers that the kernel reads for itself, or kCpu if there are none.
  int device() const { return device_; }

  double operator()(const char* name) const override { return host_number(name, find(name)); }

  double get(const char* name, double otherwise) const override {
    PyObject* value = PyDict_GetItemString(group_, name);
    return value == nullptr || value == Py_None ? otherwise : host_number(name, value);
  }

  // Whatever Python takes for true; None is off.
  bool flag(const char* name) const override { return is_true(find(name)); }
  bool flag(const char* name, bool otherwise) const override {
    PyObject* value = PyDict_GetItemString(group_, name);
    return value == nullptr ? otherwise : is_true(value);
  }

  Number number(const char* name) const override { return device_number(name, find(name)); }

  Number number(const char* name, int item) const override {
    PyObject* pair = find(name);
    if (!PySequence_Check(pair) || PySequence_Size(pair) != 2)
      fail(name, "a pair of numbers", pair);
    const auto value = py::reinterpret_steal<py::object>(PySequence_GetItem(pair, item));
    if (!value) fail(name, "a pair of numbers", pair);
    return device_number(name, value.ptr());
  }

 private:
  static bool is_true(PyObject* value) {
    const int answer = PyObject_IsTrue(value);
    if (answer < 0) throw py::error_already_set();
    return answer != 0;
  }

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
    TensorView now;
    if (is_tensor(value) && !view(value, &now)) {  // one without its memory cannot be printed
      const py::object problem = torch.reading_problem(py::handle(value));
      if (!problem.is_none()) {
        const std::string what = where_ + ": '" + name + "' " + py::cast<std::string>(problem);
        throw std::runtime_error(what);
      }
    }
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

// What a tensor was when the plan was made. The step compares it with what the tensor is now.
struct Expected {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  std::int32_t words = -1;  // where they are in Plan::words_, if they are
  bool exists = false;      // also without elements, when there may be no data
};

// Order and meaning of the keys in a state dict; nearly all parameters share one.
struct StateLayout {
  // Else the index of a state slot; the extras follow the step.
  static constexpr int kStep = kMaxStates, kFirstExtra = kStep + 1, kIgnored = -1;
  static constexpr int kNumRoles = kFirstExtra + kNumExtras;
  std::vector<std::pair<py::object, int>> keys;
};

// What is looked at of a tensor that takes the Python rule, so that it leaves it when it can.
struct Portrait {
  std::uint64_t hash = 0;           // of what decides whether the kernels can take it
  std::vector<MemoryRange> memory;  // of the parameter and its state

  void add(std::uint64_t word) {
    hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
};

struct Entry {
  PyObject* param = nullptr;  // compared, and used only while its group's list holds it
  std::uint32_t group = 0, index = 0;
  bool python = false;            // takes the Python rule, and
  bool for_memory = false;        // only because it shares memory with another entry
  bool in_order = false;          // in this step, because its gradient is what another entry writes
  std::int64_t shares_step = -1;  // its step count is that of all in Plan::shared_steps_[this]
  bool first_step = false;        // its state is new: see Scalars::step
  bool device_step = false;       // its step count is on its device
  bool needs_state = false;       // whatever its rule needs
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
  std::int64_t portrait = -1;      // where it is in Plan::portraits_, if it has one
  Expected grad;                   // the last one that nothing overlapped, and when
  std::size_t free_since = 0;      // Plan::generation_ was this then
};

class NewState;

// The tensors of an optimizer as they were at the last full check. A step compares every tensor
// with it, writes only if all is as expected, and otherwise says what is not.
class Plan {
 public:
  Plan(const std::string& rule, std::string owner)
      : rule_(find_rule(rule)), owner_(std::move(owner)) {
    if (rule_.scalars.size() > 1) throw py::value_error("plans know one number of a tensor");
  }

  // Memory for what the kernels of a device count, all zero; see apply_cuda. Tensors on a device
  // without it take the Python rule.
  void add_tickets(const py::object& tensor);
  // `storage`: the options that decide how values are stored, by name.
  void add_group(bool python, bool capturable, bool amp_fused, const py::dict& storage);
  void add(py::handle param, const py::object& state, const py::tuple& keys,
           const py::tuple& extras, bool first_step);
  void finish(const py::dict& state);
  py::object step(const py::object& groups, const py::object& state, int num_threads,
                  const py::object& grads, const py::object& scaling, const py::object& created,
                  const py::object& owner);
  bool has_stepped() const { return has_stepped_; }
  // Group and index, and whether the kernels can take it if its gradient is copied.
  py::tuple locate(std::size_t e) const {
    const Entry& entry = entries_.at(e);
    return py::make_tuple(entry.group, entry.index, !entry.python && !entry.in_order);
  }
  // For the garbage collector.
  int traverse(visitproc visit, void* arg) const;
  void clear();

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

  bool add_state(PyObject* state, const py::tuple& keys, const py::tuple& extras, Entry* entry);
  static bool is_extra(int extra, const TensorView& tensor, const Entry& entry,
                       const TensorView& param);
  SlotDtypes stored_as(const Entry& entry) const;
  int layout_of(PyObject* state, const py::tuple& keys, const py::tuple& extras);
  void list_written();
  std::vector<std::size_t> sharing() const;
  bool shares_as_before() const;
  void put_in_order(std::size_t e);
  Portrait portrait_of(PyObject* param, PyObject* state) const;
  bool is_as_portrayed(const Entry& entry, PyObject* state);
  void read_early(const Seen& seen);
  void order_readers();
  TensorView view_of(const Entry& entry, const Expected& tensor) const {
    const std::int64_t* shape = dims_.data() + entry.dims;
    return {tensor.data, tensor.dtype, entry.ndim, shape, shape + entry.ndim};
  }

  bool read_groups(const py::list& groups);
  Verdict look(const py::dict& state, const py::object& grads);
  Verdict look_at(Seen* block, std::size_t size, const py::dict& state, const py::object& grads);
  bool find_tensors(Seen* seen) const;
  void fetch(const Seen* block, std::size_t size) const;
  void bump_versions();
  Verdict check(const Seen& seen, const py::dict& state);
  Verdict leave_to_python(const Seen& seen);
  bool add_shared();
  bool is_step_expected(PyObject* tensor, Entry* entry);
  bool is_where_expected(PyObject* tensor, const Entry& entry, Expected* expected);
  bool is_as_seen(PyObject* tensor, const Expected& expected) const;
  void remember(PyObject* tensor, int ndim, Expected* expected);
  // Whether the process holds the same elements of both: then shards can be updated one by one.
  static bool is_placed_like(PyObject* tensor, const Entry& entry) {
    return entry.spec ? is_sharded_like(tensor, entry) : is_plain_tensor(tensor);
  }
  static bool is_sharded_like(PyObject* tensor, const Entry& entry);
  bool is_usable(Entry* entry, const Seen& seen, const TensorView& now);
  bool are_extras_expected(const Seen& seen);
  bool add_task(const Seen& seen, const TensorView& grad);
  bool counts_on_device(const Entry& entry, const TensorView& step) const;
  static constexpr std::uint32_t kUndefined = ~0u;
  std::uint32_t prepared_update(Group* group, double step, const SlotDtypes& dtypes, int device,
                                Where where);
  Step& step_on(int device);
  bool read_scaling(const py::object& scaling);
  void launch(int num_threads, const NewState& new_state);

  const RuleEntry& rule_;
  const std::string owner_;  // for messages
  std::vector<Entry> entries_;
  std::vector<std::int64_t> dims_;
  std::vector<Expected> extras_;  // kNumExtras for each entry that has any
  std::vector<Group> groups_;
  std::vector<StateLayout> layouts_;
  std::vector<std::int64_t> state_order_;  // entries in the order of the optimizer's state, or -1
  std::vector<std::size_t> stateless_;     // the other entries
  std::unordered_map<std::string, int> layout_index_;
  std::vector<Portrait> portraits_;
  std::vector<TensorWords> words_;                      // those of an entry follow each other
  std::vector<std::vector<std::size_t>> shared_steps_;  // entries that share a step count
  WrittenMemory written_memory_;
  std::size_t generation_ = 0;  // of written_memory_

  // Of the running step.
  bool running_ = false;
  bool has_stepped_ = false;  // in the last call of step()
  bool moved_ = false;        // since overlaps were looked for
  std::vector<py::object> held_;
  std::vector<PyObject*> written_;                            // of the block
  std::vector<std::size_t> todo_;                             // entries that need the Python side
  std::vector<std::size_t> in_order_;                         // entries of which that is true
  std::vector<std::pair<std::size_t, std::size_t>> readers_;  // with who writes their gradient
  std::vector<Seen> shared_;  // those that share a step count, which follow the others
  std::unordered_map<const void*, double> shared_counts_;
  std::vector<std::size_t> updated_;
  std::vector<StepCount> counts_;
  std::vector<std::uint64_t*> roundings_;  // counts of random bits used, on the CPU
  std::vector<Step> steps_;                // the CPU first, then the GPUs
  std::map<int, std::pair<py::object, std::uint32_t*>> tickets_;  // by device
};

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
    if (!is_plain_tensor(entry.param)) entry.spec = param.attr("_spec");
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
  if (!is_plain_dict(state) || entry->ndim < 0) return false;
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
    if (!view_stored(value, &now) || has_negative_bit(value)) return false;
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
  std::string index;  // keys that are equal have one layout, also if each dict has its own
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
    const auto address = std::to_string(reinterpret_cast<std::uintptr_t>(key));
    index += PyUnicode_CheckExact(key) ? py::cast<std::string>(py::repr(name)) : address;
    index += '=' + std::to_string(role) + ' ';
  }
  const auto [found, is_new] = layout_index_.emplace(index, static_cast<int>(layouts_.size()));
  if (is_new) layouts_.push_back(std::move(layout));
  return found->second;
}

// Null if it has none. The hash of a tensor is Python code.
PyObject* state_of(const Entry& entry, const py::dict& state) {
  PyObject* const found = PyDict_GetItemWithError(state.ptr(), entry.param);
  if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return found;
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
    Entry& entry = entries_[e];
    if (entry.layout < 0) stateless_.push_back(e);
    if (!entry.python || groups_[entry.group].python) continue;
    entry.portrait = static_cast<std::int64_t>(portraits_.size());
    portraits_.push_back(portrait_of(entry.param, state_of(entry, state)));
  }
  list_written();
  for (const std::size_t e : sharing()) {
    Entry& entry = entries_[e];
    if (!entry.python) entry.python = entry.for_memory = true;
  }
}

// The bytes of a tensor of any kind, as far as they can be told.
void add_memory_of(PyObject* tensor, std::vector<MemoryRange>* memory, Portrait* portrait) {
  PyObject* const local = local_of(tensor);
  dlpack::Tensor now;
  MemoryRange range;
  const bool is_known = is_plain_tensor(local) && exchange(local, &now, &range);
  if (portrait != nullptr) {
    portrait->add(reinterpret_cast<std::uintptr_t>(Py_TYPE(tensor)));
    portrait->add(is_known);
  }
  if (!is_known) {
    for (const py::handle part : torch.parts_of(py::handle(local))) {
      add_memory_of(part.ptr(), memory, portrait);
    }
    return;
  }
  memory->push_back(range);
  if (portrait == nullptr) return;
  portrait->add(now.dtype.code * 256u + now.dtype.bits);
  portrait->add(static_cast<std::uint64_t>(now.device.type) * 256 + now.device.id);
  portrait->add(range.begin % 16);
  portrait->add(has_negative_bit(local));
  for (int d = 0; d < now.ndim; ++d) {
    portrait->add(static_cast<std::uint64_t>(now.shape[d]));
    portrait->add(static_cast<std::uint64_t>(now.strides[d]));
  }
}

// `state` may be null.
Portrait Plan::portrait_of(PyObject* param, PyObject* state) const {
  Portrait portrait;
  add_memory_of(param, &portrait.memory, &portrait);
  if (state == nullptr) return portrait;
  portrait.add(reinterpret_cast<std::uintptr_t>(Py_TYPE(state)));
  if (!is_plain_dict(state)) {  // Python reads it, and writes that memory all the same
    if (!PyDict_Check(state)) return portrait;
    for (const py::handle value : py::list(py::handle(state).attr("values")())) {
      if (is_tensor(value.ptr())) add_memory_of(value.ptr(), &portrait.memory, nullptr);
    }
    return portrait;
  }
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(state, &position, &key, &value)) {
    if (is_tensor(value)) add_memory_of(value, &portrait.memory, &portrait);
  }
  return portrait;
}

// False if the kernels may be able to take it now. Memory may have moved.
bool Plan::is_as_portrayed(const Entry& entry, PyObject* state) {
  Portrait now = portrait_of(entry.param, state);
  Portrait& before = portraits_[static_cast<std::size_t>(entry.portrait)];
  if (now.hash != before.hash) return false;
  if (!(now.memory == before.memory)) {
    before.memory = std::move(now.memory);
    moved_ = true;
  }
  return true;
}

void Plan::list_written() {
  std::vector<OwnedRange> ranges;
  ranges.reserve(entries_.size() * (2 + kMaxStates));
  std::vector<std::pair<const void*, std::size_t>> steps;
  const auto range_of = [](const TensorView& tensor) {
    return memory_range(reinterpret_cast<std::uintptr_t>(tensor.data), tensor.ndim, tensor.shape,
                        tensor.strides, static_cast<std::int64_t>(itemsize(tensor.dtype)));
  };
  for (std::size_t e = 0; e < entries_.size(); ++e) {
    Entry& entry = entries_[e];
    if (entry.portrait >= 0) {
      for (const MemoryRange& memory :
           portraits_[static_cast<std::size_t>(entry.portrait)].memory) {
        ranges.push_back({memory, e});
      }
      continue;
    }
    const Expected& step = entry.state[StateLayout::kStep];
    if (step.data != nullptr) steps.emplace_back(step.data, e);
    if (entry.data.data == nullptr) continue;  // of an empty parameter, the count remains
    ranges.push_back({range_of(view_of(entry, entry.data)), e});
    for (int s = 0; s < kMaxStates; ++s) {
      if (entry.state[s].data == nullptr) continue;
      ranges.push_back({range_of(view_of(entry, entry.state[s])), e});
    }
    for (int x = 0; x < kNumExtras && entry.extras >= 0; ++x) {
      const Expected& extra = extras_[static_cast<std::size_t>(entry.extras + x)];
      if (extra.data == nullptr) continue;
      const std::int64_t listed = x + kMaxSlots == kRounding ? 2 : num_scales(entry.numel);
      const std::int64_t stride = 1;
      ranges.push_back({range_of(is_elementwise(x + kMaxSlots)
                                     ? view_of(entry, extra)
                                     : TensorView{extra.data, extra.dtype, 1, &listed, &stride}),
                        e});
    }
  }
  // A count that several entries have is in the way of none of them: see add_shared.
  std::sort(steps.begin(), steps.end());
  shared_steps_.clear();
  for (std::size_t begin = 0, end = 0; begin < steps.size(); begin = end) {
    bool is_shared = false, on_host = true;
    const Expected& step = entries_[steps[begin].second].state[StateLayout::kStep];
    for (; end < steps.size() && steps[end].first == steps[begin].first; ++end) {
      const Entry& entry = entries_[steps[end].second];
      is_shared = end > begin;
      on_host &= !entry.device_step && entry.state[StateLayout::kStep].dtype == step.dtype;
    }
    is_shared &= on_host;
    if (is_shared) shared_steps_.emplace_back();
    for (std::size_t at = begin; at < end; ++at) {
      Entry& entry = entries_[steps[at].second];
      entry.shares_step = is_shared ? static_cast<std::int64_t>(shared_steps_.size()) - 1 : -1;
      if (is_shared) shared_steps_.back().push_back(steps[at].second);
      if (is_shared && at > begin) continue;
      ranges.push_back({range_of({step.data, step.dtype}), steps[at].second});
    }
  }
  written_memory_.assign(std::move(ranges));
  ++generation_;
}

// Entries whose order matters, because another one writes the same memory: in ascending order. Of
// those that share a step count all or none.
std::vector<std::size_t> Plan::sharing() const {
  std::vector<std::size_t> found = written_memory_.sharing();
  for (const std::vector<std::size_t>& members : shared_steps_) {
    const bool is_in_order = std::any_of(members.begin(), members.end(), [&](std::size_t e) {
      const bool is_python = entries_[e].python && !entries_[e].for_memory;
      return is_python || std::binary_search(found.begin(), found.end(), e);
    });
    if (!is_in_order) continue;
    found.insert(found.end(), members.begin(), members.end());
    std::sort(found.begin(), found.end());
  }
  found.erase(std::unique(found.begin(), found.end()), found.end());
  return found;
}

// Whether the same entries share memory as when the plan was made.
bool Plan::shares_as_before() const {
  const std::vector<std::size_t> now = sharing();
  for (const std::size_t e : now) {
    if (!entries_[e].python) return false;
  }
  for (std::size_t e = 0; e < entries_.size(); ++e) {
    if (entries_[e].for_memory && !std::binary_search(now.begin(), now.end(), e)) return false;
  }
  return true;
}

// The step of this entry, and of those that go with it, must come in the order of the groups.
void Plan::put_in_order(std::size_t e) {
  if (entries_[e].in_order) return;
  entries_[e].in_order = true;
  in_order_.push_back(e);
  if (entries_[e].shares_step < 0) return;
  for (const std::size_t other : shared_steps_[static_cast<std::size_t>(entries_[e].shares_step)]) {
    put_in_order(other);
  }
}

// Reads this step's options. False if the groups are not those of the plan.
bool Plan::read_groups(const py::list& groups) {
  if (groups.size() != groups_.size()) return false;
  std::size_t e = 0;
  for (std::size_t g = 0; g < groups_.size(); ++g) {
    Group& group = groups_[g];
    PyObject* dict = PyList_GET_ITEM(groups.ptr(), g);
    PyObject* params = PyDict_CheckExact(dict) ? PyDict_GetItemString(dict, "params") : nullptr;
    if (params == nullptr || !PyList_CheckExact(params) ||
        static_cast<std::size_t>(PyList_GET_SIZE(params)) != group.num_params) {
      return false;
    }
    for (std::size_t i = 0; i < group.num_params; ++i, ++e) {
      if (PyList_GET_ITEM(params, i) != entries_[e].param) return false;
    }
    const Options options(dict, owner_ + ", param group " + std::to_string(g));
    const bool python = options.flag("differentiable", false);
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
Plan::Verdict Plan::look(const py::dict& state, const py::object& grads) {
  Seen block[kBlock];
  std::size_t size = 0;
  const auto see = [&](std::size_t e, PyObject* entry_state) {
    block[size++] = Seen{e, entry_state};
    if (size < kBlock) return Verdict::kFine;
    size = 0;
    return look_at(block, kBlock, state, grads);
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
  if (look_at(block, size, state, grads) == Verdict::kStale) return Verdict::kStale;
  return add_shared() ? Verdict::kFine : Verdict::kStale;
}

// The entries that share a step count take it one after the other, in the order of the groups, as a
// loop over them would.
bool Plan::add_shared() {
  std::sort(shared_.begin(), shared_.end(),
            [](const Seen& a, const Seen& b) { return a.entry < b.entry; });
  written_.clear();
  for (const Seen& seen : shared_) {
    TensorView grad;
    if (!view(seen.grad, &grad) || !add_task(seen, grad)) return false;
  }
  if (!shared_.empty()) bump_versions();
  return true;
}

// Each pass over the block waits for memory once, not once per tensor: after a backward nothing
// of this is in a near cache.
Plan::Verdict Plan::look_at(Seen* block, std::size_t size, const py::dict& state,
                            const py::object& grads) {
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
    const Verdict verdict = check(block[i], state);
    if (verdict == Verdict::kStale) return verdict;
    if (verdict == Verdict::kPython) todo_.push_back(block[i].entry);
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

// Two strings may be equal: what was unpickled has keys of its own.
bool is_same_name(PyObject* one, PyObject* other) {
  return PyUnicode_CheckExact(one) && PyUnicode_CheckExact(other) &&
         PyUnicode_Compare(one, other) == 0;
}

// Finds the state tensors by the remembered order of the keys.
bool Plan::find_tensors(Seen* seen) const {
  if (!is_plain_dict(seen->state)) return false;
  const auto& keys = layouts_[entries_[seen->entry].layout].keys;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (const auto& [name, role] : keys) {
    if (!PyDict_Next(seen->state, &position, &key, &value)) return false;
    if (key != name.ptr() && !is_same_name(key, name.ptr())) return false;
    if (role != StateLayout::kIgnored) seen->tensors[role] = value;
  }
  return !PyDict_Next(seen->state, &position, &key, &value);
}

// Reads the memory that the checks of a block are about to need, so that they wait for it together:
// after a backward torch's records of the tensors are in no near cache. Prefetch instructions did
// nothing here, loads halved the time of the checks (1,000 x 64 Adam, EPYC 9005, 2026-11).
void Plan::fetch(const Seen* block, std::size_t size) const {
  if (torch.layout.impl == 0) return;
  constexpr std::size_t kTensors = 2 + StateLayout::kStep;
  const char* impls[kBlock * kTensors];
  std::size_t count = 0;
  const auto touch = [](const char* address) { (void)*const_cast<const volatile char*>(address); };
  const auto add = [&](PyObject* tensor) {
    if (tensor == nullptr || !is_plain_tensor(tensor)) return;
    const char* impl = impl_of(tensor);
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
    for (std::size_t at = 0; at < kTensorImplBytes; at += 64) touch(impls[i] + at);
    touch(impls[i] + kTensorImplBytes - 1);
  }
  for (std::size_t i = 0; i < count; ++i) {
    for (const std::size_t offset : {torch.layout.storage, torch.layout.version}) {
      const char* record = offset == 0 ? nullptr : pointer_at(impls[i], offset);
      if (record == nullptr) continue;
      touch(record);
      touch(record + 16);
    }
  }
}

Plan::Verdict Plan::check(const Seen& seen, const py::dict& state) {
  Entry& entry = entries_[seen.entry];
  if (seen.grad == Py_None) {
    if (seen.is_copy) updated_.push_back(seen.entry);  // by the Python rule
    return Verdict::kNoGrad;
  }
  if (entry.python && !entry.for_memory) {
    if (entry.portrait >= 0 && !is_as_portrayed(entry, state_of(entry, state))) {
      return Verdict::kStale;
    }
    return leave_to_python(seen);
  }
  TensorView grad{entry.grad.data, entry.grad.dtype};
  const bool is_grad_known = entry.free_since == generation_ && is_as_seen(seen.grad, entry.grad);
  const bool is_dense = is_grad_known || view(seen.grad, &grad);
  const bool needs_state =
      rule_.has_step || groups_[entry.group].state_mask != 0 || entry.needs_state;
  if (needs_state && entry.layout < 0) {
    // State that the first step fills is made by a sparse step itself.
    const bool makes_state = !is_dense && rule_.first_step_fills;
    return makes_state ? leave_to_python(seen) : Verdict::kStale;
  }
  if (!is_where_expected(entry.param, entry, &entry.data)) return Verdict::kStale;
  for (int s = 0; s < kMaxStates; ++s) {
    if (seen.tensors[s] != nullptr && !is_where_expected(seen.tensors[s], entry, &entry.state[s])) {
      return Verdict::kStale;
    }
  }
  if (entry.extras >= 0 && !are_extras_expected(seen)) return Verdict::kStale;
  if (rule_.has_step && !is_step_expected(seen.tensors[StateLayout::kStep], &entry)) {
    return Verdict::kStale;
  }
  if (!is_dense || entry.for_memory) return leave_to_python(seen);
  if (!(is_grad_known || is_usable(&entry, seen, grad)) ||
      (!seen.is_copy && !is_placed_like(seen.grad, entry))) {
    const bool can_be_copied =
        Py_TYPE(local_of(seen.grad)) == reinterpret_cast<PyTypeObject*>(torch.tensor_type) &&
        can_combine({{entry.data.dtype, grad.dtype}, 2});
    if (!can_be_copied) return leave_to_python(seen);
    read_early(seen);
    return Verdict::kPython;
  }
  const int options_device = groups_[entry.group].options_device;
  if (options_device != kCpu && options_device != entry.device) return leave_to_python(seen);
  if (entry.shares_step >= 0) {
    shared_.push_back(seen);
    return Verdict::kFine;
  }
  return add_task(seen, grad) ? Verdict::kFine : Verdict::kStale;
}

// The gradient is read before the kernels start: by a copy, or by the Python rule. If it is what
// another entry writes in this step then both are put in order: see order_readers.
void Plan::read_early(const Seen& seen) {
  if (seen.is_copy) return;
  std::vector<MemoryRange> memory;
  add_memory_of(seen.grad, &memory, nullptr);
  for (const MemoryRange& range : memory) {
    written_memory_.for_each_overlap(range, [&](std::size_t writer) {
      if (writer != seen.entry) readers_.emplace_back(seen.entry, writer);
    });
  }
}

// Puts entries in order of which one reads what the other writes, if both step. (Where a parameter
// was that rests there may be a gradient now.)
void Plan::order_readers() {
  if (readers_.empty()) return;
  std::unordered_set<std::size_t> stepping(updated_.begin(), updated_.end());
  stepping.insert(todo_.begin(), todo_.end());
  for (const auto& [reader, writer] : readers_) {
    if (stepping.count(writer) == 0) continue;
    put_in_order(reader);
    put_in_order(writer);
  }
}

Plan::Verdict Plan::leave_to_python(const Seen& seen) {
  read_early(seen);
  if (entries_[seen.entry].shares_step >= 0) put_in_order(seen.entry);
  return Verdict::kPython;
}

// Dtype and layout must be what they were. Memory may have moved: then overlaps are looked for
// again.
bool Plan::is_where_expected(PyObject* tensor, const Entry& entry, Expected* expected) {
  if (is_as_seen(tensor, *expected)) return is_placed_like(tensor, entry);
  TensorView now;
  if (!view_stored(tensor, &now) || now.dtype != expected->dtype || now.device != entry.device ||
      !same_layout(now, view_of(entry, *expected)) || !is_placed_like(tensor, entry)) {
    return false;
  }
  if (reinterpret_cast<std::uintptr_t>(now.data) % itemsize(now.dtype) != 0) return false;
  if (has_negative_bit(tensor)) return false;
  moved_ |= now.data != expected->data;
  expected->data = now.data;
  remember(tensor, now.ndim, expected);
  return true;
}

// Whether the tensor is what it was when it was remembered; asks nobody.
bool Plan::is_as_seen(PyObject* tensor, const Expected& expected) const {
  if (expected.words < 0) return false;
  tensor = local_of(tensor);
  return is_plain_tensor(tensor) &&
         words_[static_cast<std::size_t>(expected.words)].are_those_of(impl_of(tensor));
}

void Plan::remember(PyObject* tensor, int ndim, Expected* expected) {
  if (!torch.layout.trusts_words) return;
  if (expected->words < 0) {
    expected->words = static_cast<std::int32_t>(words_.size());
    words_.emplace_back();
  }
  words_[static_cast<std::size_t>(expected->words)].remember(torch.layout,
                                                             impl_of(local_of(tensor)), ndim);
}

// As is_where_expected, of tensors that do not all look like the parameter.
bool Plan::are_extras_expected(const Seen& seen) {
  Entry& entry = entries_[seen.entry];
  for (int e = 0; e < kNumExtras; ++e) {
    PyObject* const tensor = seen.tensors[StateLayout::kFirstExtra + e];
    Expected& expected = extras_[static_cast<std::size_t>(entry.extras + e)];
    if (tensor == nullptr) continue;
    if (is_as_seen(tensor, expected)) {
      if (is_elementwise(e + kMaxSlots) && !is_placed_like(tensor, entry)) return false;
      continue;
    }
    TensorView now;
    if (!view_stored(tensor, &now) || now.dtype != expected.dtype ||
        !is_extra(e + kMaxSlots, now, entry, view_of(entry, entry.data)) ||
        has_negative_bit(tensor)) {
      return false;
    }
    if (is_elementwise(e + kMaxSlots) && !is_placed_like(tensor, entry)) return false;
    moved_ |= now.data != expected.data;
    expected.data = now.data;
    remember(tensor, now.ndim, &expected);
  }
  return true;
}

bool Plan::is_step_expected(PyObject* tensor, Entry* entry) {
  Expected& expected = entry->state[StateLayout::kStep];
  if (is_as_seen(tensor, expected)) return true;
  TensorView now;
  if (!view(tensor, &now) || now.dtype != expected.dtype || numel(now) != 1) return false;
  if (reinterpret_cast<std::uintptr_t>(now.data) % itemsize(now.dtype) != 0) return false;
  if (has_negative_bit(tensor)) return false;
  if (counts_on_device(*entry, now) != entry->device_step) return false;
  if (!entry->device_step && !is_host(now)) return false;
  moved_ |= now.data != expected.data;
  expected.data = now.data;
  remember(tensor, now.ndim, &expected);
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

// Whether the kernels can take the gradient as it is: nothing else of the step writes it.
bool Plan::is_usable(Entry* entry, const Seen& seen, const TensorView& now) {
  if (now.device != entry->device || !same_layout(now, view_of(*entry, entry->data))) return false;
  if (!can_combine({{entry->data.dtype, now.dtype}, 2})) return false;
  const auto begin = reinterpret_cast<std::uintptr_t>(now.data);
  if (begin % itemsize(now.dtype) != 0 || has_negative_bit(seen.grad)) return false;
  // The copy may be where a tensor was that is in no step of late.
  if (seen.is_copy || entry->numel == 0) return true;
  if (now.data == entry->data.data) return now.dtype == entry->data.dtype;
  const MemoryRange memory{begin,
                           begin + static_cast<std::size_t>(entry->numel) * itemsize(now.dtype)};
  const bool was_free = entry->free_since == generation_ && entry->grad.data == now.data &&
                        entry->grad.dtype == now.dtype;
  bool is_free = true;
  if (!was_free) {
    written_memory_.for_each_overlap(memory, [&](std::size_t) { is_free = false; });
  }
  if (!is_free) return false;
  entry->grad.data = now.data;
  entry->grad.dtype = now.dtype;
  entry->free_since = generation_;
  remember(seen.grad, now.ndim, &entry->grad);
  return true;
}

// False if the step count of the tensor cannot go on.
bool Plan::add_task(const Seen& seen, const TensorView& grad) {
  Entry& entry = entries_[seen.entry];
  double step = entry.first_step ? 1 : 2;
  if (rule_.has_step && !entry.device_step) {
    const Expected& expected = entry.state[StateLayout::kStep];
    const TensorView now{expected.data, expected.dtype};
    double unshared = 0;  // steps of other entries with this count
    const bool is_double = now.dtype == Dtype::kFloat64;
    const double count = is_double ? *static_cast<const double*>(now.data)
                                   : static_cast<double>(*static_cast<const float*>(now.data));
    double& counted = entry.shares_step >= 0 ? shared_counts_[now.data] : unshared;
    const double before = count + counted++;
    step = before + 1;
    const bool counts_on = is_double ? step > before : static_cast<float>(step) > before;
    if (!(count >= 0) || !counts_on) return false;
    counts_.push_back({now.data, now.dtype, step, entry.device});
  }
  TensorTask task;
  SlotDtypes dtypes = entry.stored;
  dtypes.slots[1] = grad.dtype;
  int num_slots = 0;
  task.slots[num_slots++] = entry.data.data;
  task.slots[num_slots++] = grad.data;
  // What is written is held while the interpreter lock is released.
  const auto writes = [&](PyObject* tensor) {
    written_.push_back(tensor);
    held_.push_back(py::reinterpret_borrow<py::object>(tensor));
    if (PyObject* const local = local_of(tensor); local != tensor) {
      written_.push_back(local);
      held_.push_back(py::reinterpret_borrow<py::object>(local));
    }
  };
  writes(entry.param);
  for (int s = 0; s <= kMaxStates; ++s) {
    if (seen.tensors[s] == nullptr) continue;
    writes(seen.tensors[s]);
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
      if (tensor != nullptr) writes(tensor);
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

// New state by parameter, as it becomes part of the optimizer: a dict that is there stays and gets
// other entries, for others may hold it. Whatever can fail or run Python code is in the constructor.
class NewState {
 public:
  NewState(const py::object& created, const py::object& owner) {
    if (created.is_none() || owner.is_none()) return;
    owner_ = owner;
    for (const auto& [param, entries] : py::cast<py::dict>(created)) {
      PyObject* const existing = PyDict_GetItemWithError(owner.ptr(), param.ptr());
      if (existing == nullptr && PyErr_Occurred()) throw py::error_already_set();
      if (existing == nullptr) {
        added_[param] = entries;
      } else {
        changed_.emplace_back(py::reinterpret_borrow<py::dict>(existing),
                              py::reinterpret_borrow<py::dict>(entries));
      }
    }
  }

  void commit() const {
    if (!owner_) return;
    if (PyDict_Update(owner_.ptr(), added_.ptr()) != 0) throw py::error_already_set();
    for (const auto& [existing, entries] : changed_) {
      PyDict_Clear(existing.ptr());
      if (PyDict_Update(existing.ptr(), entries.ptr()) != 0) throw py::error_already_set();
    }
  }

 private:
  py::object owner_;
  py::dict added_;
  std::vector<std::pair<py::dict, py::dict>> changed_;
};

// None if the step is done. Else nothing was written, and it returns the entries that need the
// Python side, or False if the plan does not fit any more. `created`: new state by parameter, or
// None, which becomes part of `owner` together with the step, unless that is None.
py::object Plan::step(const py::object& groups, const py::object& state, int num_threads,
                      const py::object& grads, const py::object& scaling, const py::object& created,
                      const py::object& owner) {
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
  if (!PyList_CheckExact(groups.ptr()) || !is_plain_dict(state.ptr())) return py::bool_(false);

  const py::dict all = with_created(py::reinterpret_borrow<py::dict>(state), created);
  const auto look_at_all = [&] {
    todo_.clear();
    shared_.clear();
    shared_counts_.clear();
    updated_.clear();
    counts_.clear();
    roundings_.clear();
    for (const std::size_t e : in_order_) entries_[e].in_order = false;
    in_order_.clear();
    readers_.clear();
    for (Step& step : steps_) step.clear();
    return read_groups(py::reinterpret_borrow<py::list>(groups)) &&
           look(all, grads) != Verdict::kStale;
  };
  if (!look_at_all()) return py::bool_(false);
  if (moved_) {
    list_written();
    moved_ = false;
    // The gradients were compared with the places where the tensors were before.
    if (!shares_as_before() || !look_at_all()) return py::bool_(false);
  }
  order_readers();
  for (const std::size_t e : updated_) {
    if (entries_[e].in_order) todo_.push_back(e);
  }
  if (!todo_.empty()) {
    py::list todo;
    for (const std::size_t e : todo_) todo.append(e);
    return std::move(todo);
  }
  if (!read_scaling(scaling)) return py::bool_(false);
  for (const StepCount& count : counts_) {
    // Only the GPU knows whether it will count this step.
    if (count.device != kCpu && step_on(count.device).scaling.found_inf != nullptr) {
      return py::bool_(false);
    }
  }
  launch(num_threads, NewState(created, owner));
  return py::none();
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
    step_on(device).scaling = step_scaling;
  }
  return true;
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
void Plan::launch(int num_threads, const NewState& new_state) {
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
  new_state.commit();
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

// Samples: (tensor, address of its TensorImpl, of its StorageImpl, of its memory, bytes, negative).
void learn_layout_from(const py::list& samples) {
  std::vector<LayoutSample> known;
  const auto pointer = [](const py::handle address) {
    return reinterpret_cast<const char*>(address.cast<std::uintptr_t>());
  };
  for (const py::handle sample : samples) {
    const auto tuple = py::cast<py::tuple>(sample);
    const auto object = reinterpret_cast<const char*>(tuple[0].ptr());
    const auto object_bytes = static_cast<std::size_t>(Py_TYPE(tuple[0].ptr())->tp_basicsize);
    known.push_back({object, object_bytes, pointer(tuple[1]), pointer(tuple[2]),
                     tuple[3].cast<std::uint64_t>(), tuple[4].cast<std::uint64_t>(),
                     tuple[5].cast<bool>()});
  }
  torch.layout = learn_layout(known);
}

// ((address of the memory, bytes), negative) of a plain tensor, each None if it is not known.
py::tuple read_layout(const py::object& tensor) {
  py::object memory = py::none(), negative = py::none();
  std::uintptr_t begin;
  std::uint64_t num_bytes;
  if (torch.layout.knows_memory()) {
    storage_of(tensor.ptr(), &begin, &num_bytes);
    memory = py::make_tuple(begin, num_bytes);
  }
  if (torch.layout.knows_negative()) negative = py::bool_(has_negative_bit(tensor.ptr()));
  return py::make_tuple(memory, negative);
}

void trust_words() { torch.layout.trusts_words = torch.layout.knows_memory(); }

// What the tensor's words were; None if they are not to be trusted.
class RememberedTensor {
 public:
  explicit RememberedTensor(const py::object& tensor) {
    words_.remember(torch.layout, impl_of(tensor.ptr()), tensor.attr("dim")().cast<int>());
  }
  bool is_equal(const py::object& tensor) const {
    return words_.are_those_of(impl_of(tensor.ptr()));
  }

 private:
  TensorWords words_;
};

void forget_layout(const std::string& what) {
  if (what == "words" || what == "memory") torch.layout.trusts_words = false;
  if (what == "memory") torch.layout.num_bytes = 0;
  if (what == "negative") torch.layout.keys = 0;
}

void bind(const py::object& table, const py::object& tensor_type, const py::object& parameter_type,
          const py::object& increment_version, const py::object& parts_of,
          const py::object& reading_problem, const py::object& defaultdict_type) {
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
  torch.parts_of = parts_of.inc_ref();
  torch.reading_problem = reading_problem.inc_ref();
  torch.defaultdict_type = defaultdict_type.inc_ref().ptr();
  cpu_isa();  // a bad FUSEDOPT_CPU_ISA is an error now, not at the first step
  shares_always();
}

// Whether the tensors, of which the first is a parameter, are what needs no other check: plain, with
// memory, of floating dtypes, one shape, layout and device; and the step count, unless it is None, is
// a number on the host that can go on.
bool is_ordinary(const py::list& tensors, const py::object& step) {
  TensorView first, now;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    PyObject* const tensor = PyList_GET_ITEM(tensors.ptr(), i);
    if (!is_plain_tensor(tensor) || !view(tensor, &now) || has_negative_bit(tensor)) return false;
    if (i == 0) first = now;
    if (!is_flat(now) || now.device != first.device || !same_layout(now, first)) return false;
  }
  if (step.is_none()) return true;
  if (!is_plain_tensor(step.ptr()) || !view(step.ptr(), &now) || numel(now) != 1) return false;
  if (now.device != kCpu) return false;
  if (now.dtype == Dtype::kFloat64) {
    const double count = *static_cast<const double*>(now.data);
    return count >= 0 && count + 1 > count;
  }
  if (now.dtype != Dtype::kFloat32) return false;
  const float count = *static_cast<const float*>(now.data);
  return count >= 0 && count + 1 > count;
}

void set_dtensor_type(const py::object& type) {
  if (torch.dtensor_type == nullptr) torch.dtensor_type = type.inc_ref().ptr();
}

int Plan::traverse(visitproc visit, void* arg) const {
  for (const StateLayout& layout : layouts_) {
    for (const auto& [name, role] : layout.keys) Py_VISIT(name.ptr());
  }
  for (const Group& group : groups_) {
    for (const auto& [name, value] : group.storage) {
      Py_VISIT(name.ptr());
      Py_VISIT(value.ptr());
    }
  }
  for (const Entry& entry : entries_) Py_VISIT(entry.spec.ptr());
  for (const auto& [device, tickets] : tickets_) Py_VISIT(tickets.first.ptr());
  for (const py::object& held : held_) Py_VISIT(held.ptr());
  return 0;
}

// What a destructor runs may call the plan: it is empty before anything goes.
void Plan::clear() {
  const std::vector<StateLayout> layouts = std::move(layouts_);
  const std::vector<Group> groups = std::move(groups_);
  const std::vector<Entry> entries = std::move(entries_);
  const auto tickets = std::move(tickets_);
  layouts_.clear();
  groups_.clear();
  entries_.clear();
  tickets_.clear();
  state_order_.clear();
  stateless_.clear();
}

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

std::string describe() {
  std::string text = std::string("cpu, ") + name(cpu_isa());
#if defined(_OPENMP)
  text += ", OpenMP";
#else
  text += ", one thread: built without OpenMP";
#endif
  return text;
}

// What each rule keeps of a tensor, by the rule's name.
py::dict rules() {
  py::dict all;
  for (const RuleEntry& rule : all_rules()) {
    py::list slots, unsigned_slots, scalars;
    for (const Slot& slot : rule.slots) {
      slots.append(slot.name);
      if (slot.is_unsigned) unsigned_slots.append(slot.name);
    }
    for (const std::string& scalar : rule.scalars) scalars.append(scalar);
    py::dict kept;
    kept["slots"] = slots;
    kept["unsigned"] = unsigned_slots;
    kept["scalars"] = scalars;
    all[rule.name.c_str()] = kept;
  }
  return all;
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
  module.def("learn_layout", &learn_layout_from);
  module.def("read_layout", &read_layout);
  module.def("forget_layout", &forget_layout);
  module.def("trust_words", &trust_words);
  py::class_<RememberedTensor>(module, "RememberedTensor")
      .def(py::init<const py::object&>())
      .def("is_equal", &RememberedTensor::is_equal);
  module.def("is_ordinary", &is_ordinary);
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
  module.def("rules", &rules);
  module.attr("NUM_TICKETS") = kMaxTableTensors;
  module.attr("SCALE_ELEMENTS") = kScaleElements;
  module.def("memory_floor", &memory_floor_of, py::arg("reads"), py::arg("writes"),
             py::arg("num_threads"));
  py::class_<Plan>(module, "Plan", py::custom_type_setup(&take_part_in_collection))
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
