#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <string>

#include "../multi_tensor/tensor_view.h"
#include "../rules/option_reader.h"

namespace fusedopt {

// Options of a dict of Python's. Its TypeErrors say where it is.
class Options final : public OptionReader {
 public:
  // `owner` and the number of the group are for messages.
  Options(PyObject* group, const std::string& owner, std::size_t number, bool counts_steps);

  bool capturable() const { return capturable_; }
  // The device of the numbers that the kernel reads for itself, or kCpu if there are none.
  int device() const { return device_; }

  // All that has been read so far, as one word each: of options that read the same, rules are the same.
  const std::string& read() const { return read_; }
  // Whether nothing that has been read can change while it stays in the dict.
  bool is_constant() const { return is_constant_; }

  double operator()(const char* name) const override;
  double get(const char* name, double otherwise) const override;

  // Whatever Python takes for true; None is off.
  bool flag(const char* name) const override;
  bool flag(const char* name, bool otherwise) const override;

  Number number(const char* name) const override;
  Number number(const char* name, int item) const override;

 private:
  std::string where() const;
  // Held, for what reads it may run code that replaces it. Null if it is not there.
  pybind11::object look_up(const char* name) const;
  pybind11::object find(const char* name) const;
  Number device_number(const char* name, PyObject* value) const;
  bool stays_on(int device) const;
  template <typename T>
  T note(T value) const;
  double host_number(const char* name, PyObject* value) const;
  [[noreturn]] void fail(const char* name, const char* expected, PyObject* value) const;

  PyObject* group_;
  const std::string& owner_;
  std::size_t number_;
  bool capturable_ = false;
  const bool counts_steps_;
  mutable int device_ = kCpu;
  mutable std::string read_;
  mutable bool is_constant_ = true;
};

// Whether it is a number, a name, nothing, or a tuple of such.
bool is_constant(PyObject* value);

}  // namespace fusedopt
