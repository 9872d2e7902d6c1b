#pragma once

// torch as the native side meets it: Python objects that are tensors, as views of their memory.

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../multi_tensor/tensor_view.h"
#include "../plan/written_memory.h"
#include "../torch_layout.h"
#include "dlpack_exchange.h"

namespace fusedopt {

namespace py = pybind11;

// A name as dicts look it up best. Kept for good: names are literals.
PyObject* interned(const char* name);

// What a dict has under a key, or null. Borrowed.
PyObject* item_of(PyObject* dict, PyObject* key);

// The version of a dict changes with each change, and no two dicts have had the same. Younger Pythons
// have none: 0.
inline std::uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030C0000 && !defined(PYPY_VERSION)
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
  static_cast<void>(dict);
  return 0;
#endif
}

// An attribute that objects of a class keep at a fixed place, if they do.
struct FixedAttribute {
  const char* name;
  std::ptrdiff_t offset = 0;

  void find(PyTypeObject* type);
  py::object of(PyObject* object) const;
  // The same without any code of Python's. Null where that is not known.
  PyObject* peek(PyObject* object) const { return at(object); }
  // Borrowed from the object, which must hold it.
  PyObject* held_by(PyObject* object) const {
    PyObject* const value = at(object);
    return value != nullptr ? value : asked(object);
  }

 private:
  PyObject* at(PyObject* object) const {
    return offset == 0 ? nullptr
                       : *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset);
  }
  PyObject* asked(PyObject* object) const;
};

// Set once by bind() and never released.
struct Torch {
  const dlpack::ExchangeApi* exchange = nullptr;
  PyObject* tensor_type = nullptr;
  PyObject* parameter_type = nullptr;
  PyObject* dtensor_type = nullptr;                             // null while nobody has imported it
  FixedAttribute local_tensor{"_local_tensor"}, spec{"_spec"};  // of DTensors
  PyObject* defaultdict_type = nullptr;
  py::handle increment_version;
  py::handle num_function_modes;
  py::handle parts_of, reading_problem;  // see fusedopt/memory.py
  TorchLayout layout;
};
extern Torch torch;

// What a destructor runs may look at the vector, as the garbage collector does: it is empty by then.
inline void release_all(std::vector<py::object>* held) {
  std::vector<py::object> gone;
  gone.swap(*held);
  gone.clear();
  if (held->empty()) held->swap(gone);  // its memory
}

// A dict whose entries are what the C interface sees; a subclass may keep them elsewhere.
inline bool is_plain_dict(PyObject* object) {
  return PyDict_CheckExact(object) ||
         reinterpret_cast<PyObject*>(Py_TYPE(object)) == torch.defaultdict_type;
}

inline bool is_tensor(PyObject* object) {
  return PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(torch.tensor_type)) != 0;
}

inline bool is_plain_tensor(PyObject* object) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == torch.tensor_type || type == torch.parameter_type;
}

inline bool is_dtensor(PyObject* object) {
  return reinterpret_cast<PyObject*>(Py_TYPE(object)) == torch.dtensor_type;
}

// What this process holds of a tensor: of a DTensor its shard, else the tensor itself. Borrowed.
inline PyObject* local_of(PyObject* object) {
  return is_dtensor(object) ? torch.local_tensor.held_by(object) : object;
}

// Whether shards of DTensors are of the same elements, by the specs of these.
bool is_same_sharding(py::handle one, py::handle other);

// The TensorImpl of a plain tensor; only if the layout knows where that is.
inline const char* impl_of(PyObject* tensor) { return pointer_at(tensor, torch.layout.impl); }

// The gradient of a tensor, and the object of a TensorImpl; only if the layout knows where these are.
// Null if there is none: no gradient, or one that no Python code has seen yet. Borrowed from the
// tensor, which may get another one as soon as other code runs.
inline const char* gradient_impl(PyObject* tensor) {
  const char* const autograd = pointer_at(impl_of(tensor), torch.layout.autograd);
  const char* const grad = autograd == nullptr ? nullptr : pointer_at(autograd, torch.layout.grad);
  return grad == torch.layout.no_gradient ? nullptr : grad;
}
inline PyObject* object_of(const char* impl) {
  return reinterpret_cast<PyObject*>(const_cast<char*>(pointer_at(impl, torch.layout.object)));
}
inline PyObject* known_gradient(PyObject* tensor) {
  const char* const grad = gradient_impl(tensor);
  return grad == nullptr ? nullptr : object_of(grad);
}

// For which tensors that is what `grad` gives: no mode sees it, and nobody has put code of his own
// in its place.
struct FoundGradients {
  bool of_plain = false, of_dtensors = false;

  // None if there is none.
  py::object grad_of(PyObject* tensor) const {
    const bool is_found = is_plain_tensor(tensor) ? of_plain : of_dtensors && is_dtensor(tensor);
    PyObject* const grad = is_found ? known_gradient(tensor) : nullptr;
    return grad != nullptr ? py::reinterpret_borrow<py::object>(grad) : asked(tensor);
  }

 private:
  static py::object asked(PyObject* tensor);
};
FoundGradients found_gradients();

// Looks again at where DTensors keep what a step reads, which code of others can change.
void find_slots();

// Where the storage of a plain tensor begins and how long it is. False if it has none.
bool storage_of(PyObject* tensor, std::uintptr_t* begin, std::uint64_t* num_bytes);

// A tensor of whatever dtype, and the bytes that it spans. False if it has no memory, or less than
// its elements span: the storage may have been cut short, and the exchange does not look.
bool exchange(PyObject* tensor, dlpack::Tensor* out, MemoryRange* range);

// The tensor as it is now, or false if the kernels cannot touch it (sparse, another device, without
// memory, ...). Conjugate and negative bits are not looked at: see has_negative_bit.
bool view_stored(PyObject* object, TensorView* out);

// The same of a tensor of floats.
bool view(PyObject* object, TensorView* out);

// Of a tensor that is plain, or whose shard is.
bool has_negative_bit(PyObject* tensor);

// Tells autograd that a tensor is written, by its TensorImpl; only if the layout knows the version.
inline void bump_version(const char* impl) {
  const char* const counter = pointer_at(impl, torch.layout.version);
  if (counter == nullptr) return;  // made in inference mode
  auto* const count = const_cast<char*>(counter) + torch.layout.count;
  __atomic_fetch_add(reinterpret_cast<std::uint32_t*>(count), 1, __ATOMIC_RELAXED);
}
// Tells autograd that these tensors are written.
void bump_versions(const std::vector<PyObject*>& written);

// That of torch on a GPU.
void* current_stream(int device);

}  // namespace fusedopt
