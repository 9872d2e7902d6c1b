#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "../multi_tensor/grad_norm.h"
#include "../plan/overlaps.h"
#include "../plan/record.h"
#include "../plan/verify.h"
#include "../plan/work.h"
#include "recogniser.h"

namespace fusedopt {

// A step that does what the last one did: to the same tensors, which have other values by now. Then
// the last step's list of work is that of this one, and all that there is to look at are the words of
// its tensors. Whatever else there is, is for the Inspector to see.
class Repetition {
 public:
  Repetition(Records* records, const Overlaps* overlaps, Verification* verification,
             Recogniser* recogniser, Work* work)
      : records_(records),
        overlaps_(overlaps),
        verification_(verification),
        recogniser_(recogniser),
        work_(work) {}

  // What is known is that of a step that is done.
  void learn();
  void forget();
  // After a step that was no repetition of the last one, or was: where it seldom is one, fewer steps
  // are learned.
  void give_up();
  void go_on() { patience_ = 0; }
  bool is_known() const { return !entries_.empty(); }

  // Whether it can be asked for. Runs code of Python's, as what holds the gradients does: both come
  // before it.
  bool is_ready();
  // For a step that releases the interpreter lock. Asks for all gradients, so that each is an object
  // that can be held; the parameters have to be those that are known.
  void ask_for_gradients();
  // Holds what was found to be the same, which is read and written. False if it is not to be held.
  bool hold_all();
  void release() { release_all(&held_); }

  // Whether all of it is the same. Runs no code of Python's, so that it stays so until some does.
  bool look(const py::dict& state);
  // Those of a step that was looked at, in the order of the groups.
  std::vector<GradToMeasure> gradients() const;
  // Whether a parameter is one, be it that it has no gradient.
  bool has_dtensors() const { return has_dtensors_; }
  // Tells autograd that it is written.
  void bump_versions() const;

  int traverse(visitproc visit, void* arg) const;

 private:
  struct Known {
    PyObject* tensor;    // a plain one
    std::int32_t words;  // among those of the records
  };
  // A DTensor, of which that is the shard.
  struct Shard {
    PyObject *tensor, *local;
    bool is_placed;  // it is of the elements of the parameter
  };
  struct Entry {
    std::size_t e;
    PyObject* param;
    bool is_dtensor;
    std::uint32_t tensors, shards;  // where they begin
    std::uint32_t num_tensors = 0, num_shards = 0;
    std::int32_t grad_words = -1;  // below 0: it has no gradient
    std::uint32_t task = 0;        // on its device
    bool has_state = false;
  };

  Entry next_entry(std::size_t e) const;
  bool learn_resting(std::size_t e);
  bool learn_stepping(std::size_t e, std::uint32_t task);
  bool learn_tensor(PyObject* tensor, Role role, Entry* entry);
  bool look_at_tensors(const Entry* begin, const Entry* end) const;
  bool look_at_gradients(const Entry* begin, const Entry* end);
  bool is_same(const Shard& shard, std::size_t e) const;
  bool has_same_gradient(const Entry& entry, const char* impl);

  Records* const records_;
  const Overlaps* const overlaps_;
  Verification* const verification_;
  Recogniser* const recogniser_;
  Work* const work_;

  FoundGradients found_gradients_;
  std::vector<Entry> entries_;
  std::vector<std::uint32_t> in_order_;  // that of the groups
  std::vector<Known> tensors_;
  std::vector<Shard> shards_;
  std::vector<py::object> held_;
  bool has_dtensors_ = false;
  int patience_ = 0, resting_ = 0;  // steps
};

}  // namespace fusedopt
