#include "options.h"

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "../device/gpu.h"
#include "../device/kernels.h"
#include "../multi_tensor/tensor_lists.h"
#include "torch.h"

namespace fusedopt {

namespace {

// What the host takes a number for that only the device knows: one that no rule refuses.
constexpr double kUnknownNumber = 0.5;

bool is_true(PyObject* value) {
  const int answer = PyObject_IsTrue(value);
  if (answer < 0) throw py::error_already_set();
  return answer != 0;
}

}  // namespace

bool is_constant(PyObject* value) {
  if (PyTuple_CheckExact(value)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
      if (!is_constant(PyTuple_GET_ITEM(value, i))) return false;
    }
    return true;
  }
  return value == Py_None || PyBool_Check(value) || PyFloat_CheckExact(value) ||
         PyLong_CheckExact(value) || PyUnicode_CheckExact(value);
}

Options::Options(PyObject* group, const std::string& owner, std::size_t number, bool counts_steps)
    : group_(group), owner_(owner), number_(number), counts_steps_(counts_steps) {
  capturable_ = flag("capturable", false);
}

template <typename T>
T Options::note(T value) const {
  char bytes[sizeof(std::uint64_t)] = {};
  static_assert(sizeof(value) <= sizeof(bytes));
  std::memcpy(bytes, &value, sizeof(value));
  read_.append(bytes, sizeof(bytes));
  return value;
}

double Options::operator()(const char* name) const {
  return note(host_number(name, find(name).ptr()));
}

double Options::get(const char* name, double otherwise) const {
  const py::object value = look_up(name);
  return note(!value || value.is_none() ? otherwise : host_number(name, value.ptr()));
}

bool Options::flag(const char* name) const { return note(is_true(find(name).ptr())); }

bool Options::flag(const char* name, bool otherwise) const {
  const py::object value = look_up(name);
  return note(value ? is_true(value.ptr()) : otherwise);
}

Number Options::number(const char* name) const { return device_number(name, find(name).ptr()); }

Number Options::number(const char* name, int item) const {
  const py::object pair = find(name);
  if (!PySequence_Check(pair.ptr()) || PySequence_Size(pair.ptr()) != 2) {
    fail(name, "a pair of numbers", pair.ptr());
  }
  const auto value = py::reinterpret_steal<py::object>(PySequence_GetItem(pair.ptr(), item));
  if (!value) fail(name, "a pair of numbers", pair.ptr());
  return device_number(name, value.ptr());
}

std::string Options::where() const { return owner_ + ", param group " + std::to_string(number_); }

py::object Options::look_up(const char* name) const {
  PyObject* const value = item_of(group_, interned(name));
  is_constant_ = is_constant_ && (value == nullptr || fusedopt::is_constant(value));
  return py::reinterpret_borrow<py::object>(value);
}

py::object Options::find(const char* name) const {
  py::object value = look_up(name);
  if (!value) throw py::key_error(where() + " has no '" + name + "'");
  return value;
}

Number Options::device_number(const char* name, PyObject* value) const {
  TensorView now;
  if ((counts_steps_ && !capturable_) || !view(value, &now) || now.device == kCpu ||
      itemsize(now.dtype) < 4 || numel(now) != 1 || (device_ != kCpu && device_ != now.device) ||
      !stays_on(now.device)) {
    return {note(host_number(name, value))};
  }
  device_ = now.device;
  return {kUnknownNumber, note(now.data), note(now.dtype == Dtype::kFloat64)};
}

// Whether the kernel reads what is there: always, or because a replay has to.
bool Options::stays_on(int device) const {
  return capturable_ || (device_problem(device).empty() && is_capturing(current_stream(device)));
}

double Options::host_number(const char* name, PyObject* value) const {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  TensorView now;
  if (is_tensor(value) && !view(value, &now)) {  // one without its memory cannot be printed
    const py::object problem = torch.reading_problem(py::handle(value));
    if (!problem.is_none()) {
      const std::string what = where() + ": '" + name + "' " + py::cast<std::string>(problem);
      throw std::runtime_error(what);
    }
  }
  const auto as_float =
      py::reinterpret_steal<py::object>(PyUnicode_Check(value) ? nullptr : PyNumber_Float(value));
  if (!as_float) fail(name, "a number", value);
  return PyFloat_AS_DOUBLE(as_float.ptr());
}

// A TypeError, caused by what Python has to say, if anything.
void Options::fail(const char* name, const char* expected, PyObject* value) const {
  PyObject *type, *cause, *traceback;
  PyErr_Fetch(&type, &cause, &traceback);
  const std::string got = py::repr(value);
  PyErr_Restore(type, cause, traceback);
  const std::string message = where() + ": '" + name + "' must be " + expected + ", got " + got;
  if (type == nullptr) throw py::type_error(message);
  py::raise_from(PyExc_TypeError, message.c_str());
  throw py::error_already_set();
}

}  // namespace fusedopt
