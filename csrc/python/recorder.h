#pragma once

#include <set>

#include "../plan/overlaps.h"
#include "../plan/record.h"
#include "../plan/verify.h"
#include "recogniser.h"

namespace fusedopt {

// Makes the records of a plan, and teaches its recogniser what it will see.
class Recorder {
 public:
  Recorder(Records* records, Overlaps* overlaps, Verification* verification, Recogniser* recogniser)
      : records_(records),
        overlaps_(overlaps),
        verification_(verification),
        recogniser_(recogniser) {}

  // A GPU with kernels. Parameters on others take the Python rule.
  void add_device(int device) { devices_.insert(device); }
  // A parameter of the last group, and its state or None.
  void add(py::handle param, const py::object& state, const StateNames& names, bool first_step);
  // Portraits, the order of the state, and who writes the same memory: once all have been added.
  void finish(const py::dict& state);

 private:
  bool add_param(PyObject* param, ParamRecord* record);
  bool add_state(PyObject* state, const StateNames& names, ParamRecord* record);
  bool add_tensor(PyObject* tensor, Role role, ParamRecord* record);

  Records* records_;
  Overlaps* overlaps_;
  Verification* verification_;
  Recogniser* recogniser_;
  std::set<int> devices_ = {kCpu};
};

}  // namespace fusedopt
