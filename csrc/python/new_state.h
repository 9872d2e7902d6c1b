#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

namespace fusedopt {

// The state of the optimizer as it will be. `created`: new state by parameter, or None.
pybind11::dict with_created(const pybind11::dict& state, const pybind11::object& created);

// New state by parameter, as it becomes part of the optimizer: a dict that is there stays and gets
// other entries, for others may hold it. Whatever can fail or run Python code is in the constructor.
class NewState {
 public:
  // Each may be None: then nothing becomes part of it.
  NewState(const pybind11::object& created, const pybind11::object& owner);
  void commit() const;
  // What commit() changed is as it was.
  void take_back() const;

 private:
  pybind11::object owner_;
  pybind11::dict added_;
  struct Changed {
    pybind11::dict existing, entries, before;
  };
  std::vector<Changed> changed_;
};

}  // namespace fusedopt
