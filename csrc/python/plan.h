#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "../device/kernels.h"
#include "../plan/overlaps.h"
#include "../plan/record.h"
#include "../plan/verify.h"
#include "../plan/work.h"
#include "../rules/registry.h"
#include "group_reader.h"
#include "inspector.h"
#include "new_state.h"
#include "recogniser.h"
#include "recorder.h"
#include "repetition.h"

namespace fusedopt {

// What a step came to.
struct Outcome {
  bool is_done = false;
  bool is_stale = false;         // the plan does not fit any more: nothing was written
  std::vector<std::size_t> odd;  // entries that need the Python side: nothing was written
};

// The tensors of an optimizer as they were at the last full check. A step compares every tensor
// with it, writes only if all is as expected, and otherwise says what is not.
class Plan {
 public:
  Plan(const std::string& rule, std::string owner);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Memory for what the kernels of a device count, all zero; see apply_gpu. Tensors on a device
  // without it take the Python rule.
  void add_tickets(const py::object& tensor);
  // `storage`: the options that decide how values are stored, by name.
  void add_group(bool python, bool capturable, bool amp_fused, const py::dict& storage);
  // A parameter of the last group.
  void add(py::handle param, const py::object& state, const py::tuple& keys,
           const py::tuple& extras, bool first_step);
  void finish(const py::dict& state) { recorder_.finish(state); }

  // `created`: new state by parameter, or None, which becomes part of `owner` together with the
  // step, unless that is None.
  Outcome step(const py::object& groups, const py::object& state, int num_threads,
               const py::object& grads, const py::object& scaling, const py::object& created,
               const py::object& owner);

  // The last step once more, if it is that, with gradients clipped to a norm which is measured first:
  // see grad_norm.h for what `clip` is. Else false, and nothing was written but that.
  bool repeat_clipped(const py::object& groups, const py::object& state, int num_threads,
                      const py::object& clip, double max_norm);

  bool has_stepped() const { return has_stepped_; }
  // Whether that took the list of work of the one before it.
  bool has_repeated() const { return has_repeated_; }
  // Group and index, and whether the kernels can take it if its gradient is copied.
  py::tuple locate(std::size_t entry) const;

  // For the garbage collector.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  bool look(const py::list& groups, const py::dict& state, const py::object& grads);
  struct Running;
  // Calls and_then() once all is verified; it may say no.
  template <typename AndThen>
  bool repeat(const py::list& groups, const py::dict& state, const py::object& scaling,
              AndThen&& and_then);
  bool read_scaling(const py::object& scaling);
  void launch(int num_threads, const NewState& new_state, bool is_short = false);

  const RuleEntry& rule_;
  const std::string owner_;  // for messages
  Records records_;
  Overlaps overlaps_;
  Verification verification_{&records_, &overlaps_};
  Recogniser recogniser_;
  GroupReader group_reader_;
  Recorder recorder_{&records_, &overlaps_, &verification_, &recogniser_};
  Work work_{rule_.has_step, &records_, &overlaps_, &kernel_state};
  Inspector inspector_{rule_, &records_, &overlaps_, &verification_, &recogniser_, &work_};
  Repetition repetition_{&records_, &overlaps_, &verification_, &recogniser_, &work_};
  std::map<int, std::pair<py::object, std::uint32_t*>> tickets_;  // by device
  bool running_ = false;
  bool has_stepped_ = false;  // in the last call of step()
  bool has_repeated_ = false;
};

}  // namespace fusedopt
