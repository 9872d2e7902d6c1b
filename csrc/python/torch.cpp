#include "torch.h"

#include <structmember.h>

#include <stdexcept>
#include <string>
#include <unordered_map>

#include "../device/gpu.h"
#include "../multi_tensor/apply.h"
#include "../multi_tensor/parallel.h"
#include "../multi_tensor/tensor_lists.h"
#include "module.h"

namespace fusedopt {

Torch torch;

PyObject* interned(const char* name) {
  static std::unordered_map<const char*, PyObject*> names;
  PyObject*& object = names[name];
  if (object == nullptr) object = PyUnicode_InternFromString(name);
  if (object == nullptr) throw py::error_already_set();
  return object;
}

PyObject* item_of(PyObject* dict, PyObject* key) {
  PyObject* const value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

void FixedAttribute::find(PyTypeObject* type) {
  offset = 0;
  PyObject* const found = _PyType_Lookup(type, interned(name));
  if (found == nullptr || Py_TYPE(found) != &PyMemberDescr_Type ||
      type->tp_getattro != &PyObject_GenericGetAttr) {
    return;
  }
  const PyMemberDef* const member = reinterpret_cast<PyMemberDescrObject*>(found)->d_member;
  if (member->type == T_OBJECT_EX) offset = member->offset;
}

py::object FixedAttribute::of(PyObject* object) const {
  if (PyObject* const value = at(object)) return py::reinterpret_borrow<py::object>(value);
  auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, interned(name)));
  if (!value) throw py::error_already_set();
  return value;
}

PyObject* FixedAttribute::asked(PyObject* object) const {
  const py::object value = of(object);
  if (Py_REFCNT(value.ptr()) > 1) return value.ptr();
  throw std::runtime_error(std::string("fusedopt: ") + name + " of a " + Py_TYPE(object)->tp_name +
                           " is made anew each time it is asked for; it must stay the same one");
}

bool is_same_sharding(py::handle one, py::handle other) {
  if (one.is(other)) return true;
  for (const char* part : {"mesh", "placements", "shard_order"}) {
    const py::object none = py::none();  // shard_order is younger than torch 2.10
    if (!py::getattr(one, part, none).equal(py::getattr(other, part, none))) return false;
  }
  return true;
}

namespace {

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
  if (device.type == dlpack::kCpu) return *out = kHostDevice, true;
  return device.type == dlpack::kCuda && !kKernelsOnHost && (*out = device.id, true);
}

}  // namespace

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

bool has_negative_bit(PyObject* tensor) {
  tensor = local_of(tensor);
  if (torch.layout.knows_negative()) {
    return (word_at(impl_of(tensor), torch.layout.keys) & torch.layout.negative) != 0;
  }
  return py::cast<bool>(py::handle(tensor).attr("is_neg")());
}

void find_slots() {
  if (torch.dtensor_type == nullptr) return;
  auto* const type = reinterpret_cast<PyTypeObject*>(torch.dtensor_type);
  torch.local_tensor.find(type);
  torch.spec.find(type);
}

py::object FoundGradients::asked(PyObject* tensor) {
  auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, interned("grad")));
  if (!grad) throw py::error_already_set();
  return grad;
}

FoundGradients found_gradients() {
  PyObject* const grad = interned("grad");
  PyObject* const function = interned("__torch_function__");
  if (!torch.layout.knows_gradient() || torch.num_function_modes().cast<int>() != 0) return {};
  const auto is_torchs = [grad](PyObject* object) {
    auto* const type = reinterpret_cast<PyTypeObject*>(object);
    PyObject* const attribute = _PyType_Lookup(type, grad);
    return attribute != nullptr && Py_TYPE(attribute) == &PyGetSetDescr_Type &&
           type->tp_getattro == &PyObject_GenericGetAttr;
  };
  // Those of parameters have it switched off.
  const auto function_of = [function](PyObject* object) {
    return _PyType_Lookup(reinterpret_cast<PyTypeObject*>(object), function);
  };
  FoundGradients found;
  found.of_plain = is_torchs(torch.tensor_type) && is_torchs(torch.parameter_type);
  found.of_dtensors = found.of_plain && torch.dtensor_type != nullptr &&
                      is_torchs(torch.dtensor_type) &&
                      function_of(torch.dtensor_type) == function_of(torch.parameter_type);
  return found;
}

void bump_versions(const std::vector<PyObject*>& written) {
  if (torch.layout.knows_version()) {
    for (PyObject* tensor : written) bump_version(impl_of(tensor));
    return;
  }
  py::list list(written.size());
  for (std::size_t i = 0; i < written.size(); ++i) {
    Py_INCREF(written[i]);
    PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), written[i]);
  }
  torch.increment_version(list);
}

void* current_stream(int device) {
  static char on_host;
  void* stream = &on_host;  // which no driver knows, but that which stands in for it
  if constexpr (!kKernelsOnHost) {
    if (torch.exchange->current_work_stream(dlpack::kCuda, device, &stream) != 0) {
      throw py::error_already_set();
    }
  }
  return stream;
}

namespace {

void bind(const py::object& table, const py::object& tensor_type, const py::object& parameter_type,
          const py::object& increment_version, const py::object& num_function_modes,
          const py::object& parts_of, const py::object& reading_problem,
          const py::object& defaultdict_type) {
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
  torch.num_function_modes = num_function_modes.inc_ref();
  torch.parts_of = parts_of.inc_ref();
  torch.reading_problem = reading_problem.inc_ref();
  torch.defaultdict_type = defaultdict_type.inc_ref().ptr();
  cpu_isa();  // a bad FUSEDOPT_CPU_ISA is an error now, not at the first step
  shares_always();
}

void set_dtensor_type(const py::object& type) {
  if (torch.dtensor_type != nullptr) return;
  torch.dtensor_type = type.inc_ref().ptr();
  find_slots();
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

}  // namespace

void export_torch(py::module_& module) {
  module.def("bind", &bind);
  module.def("set_dtensor_type", &set_dtensor_type);
  module.def("is_ordinary", &is_ordinary);
}

}  // namespace fusedopt
