#include "portrait.h"

#include "torch.h"

namespace fusedopt {

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

Portrait portrait_of(PyObject* param, PyObject* state) {
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

}  // namespace fusedopt
