#pragma once

// torch as the native side meets it: Python objects that are tensors, as views of their memory.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "../multi_tensor/tensor_view.h"
#include "../plan/written_memory.h"
#include "../torch_layout.h"
#include "dlpack_exchange.h"

namespace fusedopt {

namespace py = pybind11;

// Set once by bind() and never released.
struct Torch {
  const dlpack::ExchangeApi* exchange = nullptr;
  PyObject* tensor_type = nullptr;
  PyObject* parameter_type = nullptr;
  PyObject* dtensor_type = nullptr;  // null while nobody has imported it
  PyObject* defaultdict_type = nullptr;
  py::handle increment_version;
  py::handle parts_of, reading_problem;  // see fusedopt/memory.py
  TorchLayout layout;
};
extern Torch torch;

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

PyObject* shard_of(PyObject* dtensor);

// What this process holds of a tensor: of a DTensor its shard, else the tensor itself. Borrowed.
inline PyObject* local_of(PyObject* object) {
  const bool is_dtensor = reinterpret_cast<PyObject*>(Py_TYPE(object)) == torch.dtensor_type;
  return is_dtensor ? shard_of(object) : object;
}

// Whether two shards of DTensors are of the same elements: `spec` is that of one of them.
bool is_sharded_like(PyObject* tensor, const py::object& spec);

// The TensorImpl of a plain tensor; only if the layout knows where that is.
inline const char* impl_of(PyObject* tensor) { return pointer_at(tensor, torch.layout.impl); }

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

// Tells autograd that these tensors are written.
void bump_versions(const std::vector<PyObject*>& written);

// That of torch on a GPU.
void* current_stream(int device);

}  // namespace fusedopt
