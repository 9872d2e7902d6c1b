#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "../plan/record.h"
#include "../rules/registry.h"
#include "recogniser.h"

namespace fusedopt {

// Reads the param groups of a step.
class GroupReader {
 public:
  // `storage`: the options of the next group that decide how values are stored, by name.
  void add(const py::dict& storage);

  // False if the groups are not those of the records. `owner` is for messages.
  bool read(const py::list& groups, const RuleEntry& rule, const std::string& owner,
            const Recogniser& recogniser, std::vector<GroupRecord>* records) const;

  int traverse(visitproc visit, void* arg) const;

 private:
  std::vector<std::vector<std::pair<py::object, py::object>>> storage_;  // by group
};

}  // namespace fusedopt
