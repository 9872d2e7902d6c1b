#pragma once

#include <cstdint>
#include <vector>

#include "../plan/overlaps.h"
#include "../plan/record.h"
#include "../plan/verify.h"
#include "../plan/work.h"
#include "../rules/registry.h"
#include "recogniser.h"
#include "seen.h"

namespace fusedopt {

// Looks at every tensor of a step, and lists what there is to do. Writes none.
class Inspector {
 public:
  Inspector(const RuleEntry& rule, Records* records, const Overlaps* overlaps,
            Verification* verification, Recogniser* recogniser, Work* work)
      : rule_(rule),
        records_(records),
        overlaps_(overlaps),
        verification_(verification),
        recogniser_(recogniser),
        work_(work) {}

  // False if the plan does not fit any more. `grads` has the gradients of some parameters instead of
  // their own, or is None.
  bool inspect(const py::dict& state, const py::object& grads);

  // Lets go of what is held while a step runs: the gradients, and what is written.
  void release() { release_all(&held_); }
  int traverse(visitproc visit, void* arg) const;

 private:
  enum class Verdict { kFine, kOdd, kStale };

  bool inspect_block(Seen* block, std::size_t size, const py::dict& state, const py::object& grads);
  bool inspect_shared();
  Verdict check(const Seen& seen, const py::dict& state);
  bool is_same(PyObject* tensor, const TensorRecord& record) const;
  bool has_moved(const Seen& seen, ParamRecord* param);
  bool is_as_recorded(PyObject* tensor, Role role, std::size_t e, ParamRecord* param);
  bool is_as_portrayed(const ParamRecord& param, PyObject* object, PyObject* state);
  bool is_usable(const Seen& seen, ParamRecord* param, const TensorView& grad);
  void remember(PyObject* tensor, int ndim, TensorRecord* record);
  Verdict leave_to_python(const Seen& seen);
  void read_early(const Seen& seen);
  Verdict add_work(const Seen& seen, const TensorView& grad);

  const RuleEntry& rule_;
  Records* const records_;
  const Overlaps* const overlaps_;
  Verification* const verification_;
  Recogniser* const recogniser_;
  Work* const work_;

  FoundGradients found_gradients_;  // in this step, without asking torch
  std::vector<py::object> held_;
  std::vector<PyObject*> written_;  // of the block
  std::vector<Seen> shared_;        // those that share a step count, which follow the others
};

}  // namespace fusedopt
